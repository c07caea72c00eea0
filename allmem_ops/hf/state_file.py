"""`save_cache` and `load_cache`: what a model has read, as one file of fixed size."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from allmem_ops._validation import check_int, fail, short
from allmem_ops.hf.cache import AllMemCache, AllMemCacheLayer
from allmem_ops.hf.checkpoint import _check_base, _describe
from allmem_ops.hf.convert import memory_parameters
from allmem_ops.hf.runtime import runtime_of

FORMAT = 1
_SAMPLES = 8  # values of each of the memory's parameters that the fingerprint keeps


def save_cache(model: PreTrainedModel, cache: AllMemCache, path: str | os.PathLike[str]) -> Path:
    """Write a cache, all its sequences, to one safetensors file. The file has one size, whatever the length of what was read.

    The file is written beside its name, with the suffix `.part`, and then renamed: a write that breaks off leaves the old file whole.

    Args:
        model: the converted model that has read the text; the file holds a fingerprint of it, not the model.
        cache: of that model.
        path: the file; its folder exists.

    Returns:
        The path.

    Raises:
        ValueError: `model` is not converted, or the cache is not one of its present config.
        OSError: the file can't be written.
    """
    path = Path(path)
    runtime = runtime_of(model)
    cache.check_fits(runtime.config, len(runtime.own_windows), cache.batch_size)
    tensors = {name: t.detach().cpu().contiguous() for name, t in _tensors(cache).items()}
    description = json.dumps(_describe_cache(model, cache), sort_keys=True)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"allmem_cache": description, "sha256": _digest(description, tensors)})
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
    return path


def load_cache(model: PreTrainedModel, path: str | os.PathLike[str], cache: AllMemCache | None = None) -> AllMemCache:
    """The cache that `save_cache` wrote: all of it, or an error and no change.

    Args:
        model: the model that has read the text: the same base weights, memory and config (but for its `impl`), on any device.
        path: the file.
        cache: is overwritten, in place; None: a new one.

    Returns:
        `cache`, or the new one.

    Raises:
        ValueError: a file that is missing, cut off, damaged or something else; of another model, memory, config, dtype or number of
            sequences. The message gives the reason.
    """
    runtime = runtime_of(model)
    description, tensors = _read(Path(path))
    _check_base(description["base"], _describe(model))
    _check_config(description["config"], {k: v for k, v in runtime.config.to_dict().items() if k != "impl"})
    if description["memory"] != _memory_samples(model):
        fail("model", "must have the memory that the file was written with", "other values in the memory's parameters")
    batch_size = description["batch_size"]
    if cache is None:
        check_int("path", batch_size, 1)
        cache = AllMemCache(model, batch_size)
    else:
        cache.check_fits(runtime.config, len(runtime.own_windows), cache.batch_size)
        if batch_size != cache.batch_size:
            fail("path", f"must hold {cache.batch_size} sequences, as `cache` does", batch_size)
    mine = _tensors(cache)
    expected, found = ({name: (list(t.shape), short(t.dtype)) for name, t in some.items()} for some in (mine, tensors))
    if expected != found:
        name = min(n for n in {*expected, *found} if expected.get(n) != found.get(n))
        fail("path", f"must hold {name} as {expected.get(name)}, shape and dtype of the model's cache", found.get(name))
    _check_states(cache, tensors)
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
    for layer, started in zip(cache.layers, description["started"], strict=True):
        layer.seen = int(description["seen"])
        if layer.memory is not None:
            layer.memory.started = bool(started)
            layer.memory.memory.refresh()
    cache.align()
    return cache


def _tensors(cache: AllMemCache) -> dict[str, Tensor]:
    """Every tensor of the cache's rows by its name in the file."""
    found = {}
    for index, layer in enumerate(cache.layers):
        for part, state in _states(layer).items():
            found |= {f"layers.{index}.{part}.{name}": t for name, t in state.tensors().items()}
    return found


def _states(layer: AllMemCacheLayer) -> dict[str, Any]:
    if layer.memory is None:
        return {"window": layer.window}
    return {"window": layer.window, "memory": layer.memory.memory, "conv": layer.memory.conv}


def _describe_cache(model: PreTrainedModel, cache: AllMemCache) -> dict[str, Any]:
    config = {name: value for name, value in cache.config.to_dict().items() if name != "impl"}
    return {
        "format": FORMAT,
        "batch_size": cache.batch_size,
        "seen": f"{cache.get_seq_length():020d}",  # as wide at every length: so is the file
        "started": [int(layer.memory is not None and layer.memory.started) for layer in cache.layers],
        "config": config,
        "base": _describe(model),
        "memory": _memory_samples(model),
    }


def _memory_samples(model: PreTrainedModel) -> dict[str, list[float]]:
    """A few values of each of the memory's parameters: after one more training step they are others."""
    samples = {}
    for name, p in memory_parameters(model).items():
        flat = p.detach().flatten()
        picks = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(flat.device)
        samples[name] = flat[picks].double().tolist()
    return samples


def _digest(description: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the description and of every tensor's name and bytes."""
    hasher = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of an undamaged file."""
    if not path.is_file():
        fail("path", "must be a file that `save_cache` wrote", f"{path}, which is not there")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "allmem_cache" not in metadata:
                fail("path", "must be a file that `save_cache` wrote", f"{path}, a safetensors file of something else")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors handle is no mapping
        if metadata.get("sha256") != _digest(metadata["allmem_cache"], tensors):
            fail("path", "must hold an undamaged cache", f"{path}, whose content does not have its checksum")
        description = json.loads(metadata["allmem_cache"])
    except (SafetensorError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        fail("path", "must be an undamaged file that `save_cache` wrote", f"{path}: {error}")
    if description.get("format") != FORMAT:
        fail("path", f"must be of format {FORMAT}", description.get("format"))
    return description, tensors


def _check_config(saved: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))  # tuples as lists
    differ = sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name))
    if differ:
        was, present = ({name: c.get(name) for name in differ} for c in (saved, now))
        fail("model", f"must have the config that the file was written with ({was})", present)


def _check_states(cache: AllMemCache, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless the counters are legal: kernels take them as places in memory."""
    for index, layer in enumerate(cache.layers):
        for part, state in _states(layer).items():
            rows = {name: tensors[f"layers.{index}.{part}.{name}"] for name in state.tensors()}
            shared = {name: t.cpu() for name, t in state.shared().items()}
            type(state)(**rows, **shared, **state.options()).check()
