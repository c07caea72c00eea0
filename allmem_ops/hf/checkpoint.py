"""`save_memory` and `load_memory`: the memory's own tensors, tied to the base model that they were trained beside."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from allmem_ops._validation import fail
from allmem_ops.hf.convert import convert, memory_parameters
from allmem_ops.hf.families import family_of
from allmem_ops.hf.runtime import ATTRIBUTE, runtime_of
from allmem_ops.layers.config import AllMemConfig
from allmem_ops.layers.memory import MemoryBranch

FORMAT = 1
TENSORS, DESCRIPTION = "memory.safetensors", "memory.json"
_SAMPLES = 4  # values of each base matrix that the fingerprint keeps
_TOLERANCE = 0.02  # relative: the same checkpoint in bf16 differs by 0.4 %, another checkpoint by about 100 %
# fields of a config that a trained memory's tensors don't depend on
_FREE = {
    "window",
    "sinks",
    "chunk_size",
    "impl",
    "eta_init",
    "mu_init",
    "gate_init",
    "conv_init",
    "qk_init",
    "projection_init",
    "feature_init",
    "w_init_scale",
    "alpha_lr_scale",
}


def save_memory(model: PreTrainedModel, directory: str | os.PathLike[str]) -> Path:
    """Write the memory of a converted model: `memory.safetensors` (its tensors only) and `memory.json`.

    The description holds the AllMemConfig and a fingerprint of the base model. Each file is written beside its final
    name and then renamed, so that a broken write leaves the old file whole.

    Args:
        model: a converted model.
        directory: made where it does not exist.

    Returns:
        The directory.

    Raises:
        ValueError: `model` is not converted.
        OSError: the directory can't be written.
    """
    runtime = runtime_of(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in memory_parameters(model).items()}
    description = {"format": FORMAT, "config": runtime.config.to_dict(), "base": _describe(model)}
    for name, write in (
        (TENSORS, lambda path: save_file(tensors, path)),
        (DESCRIPTION, lambda path: path.write_text(json.dumps(description, indent=1))),
    ):
        part = directory / f"{name}.part"
        write(part)
        part.replace(directory / name)
    return directory


def load_memory(model: PreTrainedModel, directory: str | os.PathLike[str]) -> PreTrainedModel:
    """Give a model the memory that `save_memory` wrote: all of it, or an error and no change.

    Args:
        model: the base model, which is converted with the saved config; or a converted model of the same config.
        directory: what `save_memory` returned.

    Returns:
        The same `model`.

    Raises:
        ValueError: files that are missing or damaged, another base model, or another config; the message gives the reason.
    """
    config, tensors = read_tensors(model, directory)
    converted = hasattr(getattr(model, family_of(model).decoder), ATTRIBUTE)
    if converted:
        current = runtime_of(model).config
        differ = [name for name, value in config.to_dict().items() if getattr(current, name) != value]
        if differ:
            saved, now = ({name: getattr(c, name) for name in differ} for c in (config, current))
            fail("model", f"must have the config of the saved memory ({saved})", now)
    _check_shapes(tensors, _memory_shapes(model, config))
    if not converted:
        convert(model, config)
    with torch.no_grad():
        for name, parameter in memory_parameters(model).items():
            parameter.copy_(tensors[name])
    return model


def read_memory(model: PreTrainedModel, directory: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors that `save_memory` wrote, by the names of `memory_parameters(model)`; the model stays as it is.

    The saved config may differ from the model's in what is chosen at run time or before training (window, sinks, chunk size,
    implementation, initial values and rates), and in nothing else.

    Args:
        model: a converted model.
        directory: what `save_memory` returned.

    Raises:
        ValueError: `model` is not converted; files that are missing or damaged, another base model, or another config.
    """
    current = runtime_of(model).config
    config, tensors = read_tensors(model, directory)
    differ = [name for name, value in config.to_dict().items() if name not in _FREE and getattr(current, name) != value]
    if differ:
        saved, now = ({name: getattr(c, name) for name in differ} for c in (config, current))
        fail("directory", f"must hold a memory of the model's form ({now})", saved)
    _check_shapes(tensors, _memory_shapes(model, config))
    return tensors


def read_tensors(model: PreTrainedModel, directory: str | os.PathLike[str]) -> tuple[AllMemConfig, dict[str, torch.Tensor]]:
    """The saved config and tensors, checked against the base model and nothing else.

    Raises:
        ValueError: files that are missing or damaged, or another base model.
    """
    description, tensors = _read(Path(directory))
    config = AllMemConfig.from_dict(description["config"])
    _check_base(description["base"], _describe(model))
    return config, tensors


def _check_shapes(tensors: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if shapes != expected:
        wrong = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        fail("directory", f"must hold the memory's {len(expected)} tensors", f"{len(wrong)} that differ, the first {wrong[0]}")


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    for name in (TENSORS, DESCRIPTION):
        if not (directory / name).is_file():
            fail("directory", f"must hold {TENSORS} and {DESCRIPTION}", f"no {name} in {directory}")
    try:
        description = json.loads((directory / DESCRIPTION).read_text())
        if description["format"] != FORMAT:
            fail("directory", f"must be of format {FORMAT}", description["format"])
        if not isinstance(description["config"], dict) or not isinstance(description["base"], dict):
            fail("directory", f"must hold an undamaged {DESCRIPTION}", "a config or base that is no mapping")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        fail("directory", f"must hold an undamaged {DESCRIPTION}", repr(error))
    try:
        with safe_open(directory / TENSORS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors handle is no mapping
    except (SafetensorError, OSError) as error:
        fail("directory", f"must hold an undamaged {TENSORS}", error)
    return description, tensors


def _memory_shapes(model: PreTrainedModel, config: AllMemConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the memory's parameters that `config` gives `model`, without building them."""
    family = family_of(model)
    layers = getattr(getattr(model, family.decoder), family.layers)
    branch = MemoryBranch(model.config.hidden_size, config, heads=model.config.num_key_value_heads, device="meta")
    chosen = range(len(layers)) if config.memory_layers is None else config.memory_layers
    prefixes = [f"{family.decoder}.{family.layers}.{index}.{family.attention}.memory" for index in chosen]
    return {f"{prefix}.{name}": tuple(p.shape) for prefix in prefixes for name, p in branch.named_parameters()}


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one base model from another: its shape, and a few values of every matrix."""
    family = family_of(model)
    config = model.config
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    samples = {}
    for index, layer in enumerate(getattr(getattr(model, family.decoder), family.layers)):
        weight = getattr(layer, family.attention).q_proj.weight.detach().flatten()
        picks = torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(weight.device)
        samples[str(index)] = [round(x, 6) for x in weight[picks].float().tolist()]
    return {"shape": {name: getattr(config, name) for name in names}, "q_proj": samples}


def _check_base(saved: dict[str, Any], found: dict[str, Any]) -> None:
    for name, value in found["shape"].items():
        wanted = saved.get("shape", {}).get(name)
        if wanted != value:
            fail("model", f"must be the base model that the memory was trained beside, with {name}={wanted!r}", repr(value))
    for index, values in found["q_proj"].items():
        other = saved.get("q_proj", {}).get(index, [])
        scale = max(map(abs, values), default=0.0)
        if len(other) != len(values) or any(abs(a - b) > _TOLERANCE * scale + 1e-6 for a, b in zip(values, other, strict=True)):
            fail("model", "must have the base weights that the memory was trained beside", f"other values in layer {index}'s q_proj")
