"""Checkpoints of a run: what `save_memory` writes, the optimizer in files of limited size, and where the run stands."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from allmem_ops._validation import check_int, fail
from allmem_ops.hf import memory_parameters, reconfigure, save_memory
from allmem_ops.hf.checkpoint import read_tensors
from allmem_ops.training.engine import Distillation
from allmem_ops.training.recipe import Recipe

FORMAT = 1
DESCRIPTION = "run.json"
PART_BYTES = 48 * 2**20
_PREFIX = "step-"


def save_checkpoint(
    run: Distillation, directory: str | os.PathLike[str], *, extra: dict[str, Any] | None = None, part_bytes: int = PART_BYTES
) -> Path:
    """Write `directory/step-N`, N the next step, and remove the checkpoints before it.

    It holds `memory.safetensors` and `memory.json` (so it is a directory for `load_memory`), AdamW's state in fp32 as
    `optimizer-*.safetensors` of at most `part_bytes` each where tensors allow, and `run.json`. It is written under another
    name and then renamed: a broken write leaves the checkpoint before whole.

    Args:
        run: not sharded; of several processes one writes.
        directory: made where it does not exist.
        extra: JSON values to find again, of the caller's own.
        part_bytes: as said.

    Returns:
        The new checkpoint's directory.
    """
    check_int("part_bytes", part_bytes, 1)
    directory = Path(directory)
    target = directory / f"{_PREFIX}{run.index:07d}"
    part = directory / f".{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    run.reset_draw()
    save_memory(run.model, part)
    files = _split(run.optimizer_state(), part_bytes)
    for index, tensors in enumerate(files):
        save_file(tensors, part / f"optimizer-{index:02d}.safetensors")
    description = {"format": FORMAT, "index": run.index, "recipe": run.recipe.to_dict(), "parts": len(files), "extra": extra or {}}
    (part / DESCRIPTION).write_text(json.dumps(description, indent=1))
    before = [p for p in _checkpoints(directory) if p != target]
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    for old in before:
        shutil.rmtree(old)
    return target


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The last whole checkpoint in `directory`, or None."""
    return max(_checkpoints(Path(directory)), default=None)


def load_checkpoint(run: Distillation, checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Go on where `checkpoint` stands: the steps that follow are those of an unbroken run, bit for bit.

    Args:
        run: new, of the model and the recipe that the checkpoint was made with.
        checkpoint: a directory of `save_checkpoint`.

    Returns:
        The `extra` of `save_checkpoint`.

    Raises:
        ValueError: damaged or missing files, another recipe, model or AllMemConfig; nothing is changed then.
    """
    checkpoint = Path(checkpoint)
    try:
        description = json.loads((checkpoint / DESCRIPTION).read_text())
        if description["format"] != FORMAT:
            fail("checkpoint", f"must be of format {FORMAT}", description["format"])
        index, recipe, count, extra = (description[name] for name in ("index", "recipe", "parts", "extra"))
    except (OSError, json.JSONDecodeError, KeyError) as error:
        fail("checkpoint", f"must hold an undamaged {DESCRIPTION}", repr(error))
    check_recipe(Recipe.from_dict(recipe), run.recipe)
    tensors: dict[str, torch.Tensor] = {}
    try:
        for part in range(count):
            tensors |= load_file(checkpoint / f"optimizer-{part:02d}.safetensors")
    except (OSError, SafetensorError) as error:
        fail("checkpoint", "must hold its optimizer's files undamaged", error)
    run.check_optimizer_state(tensors, index)
    run.reset_draw()
    memory = _memory(run, checkpoint)
    with torch.no_grad():
        for name, p in memory_parameters(run.model).items():
            p.copy_(memory[name])
    run.load_optimizer_state(tensors, index)
    return extra


def _memory(run: Distillation, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The memory's tensors, checked against the run's model: whatever stands in the memory's place, a linear one too."""
    saved, tensors = read_tensors(run.model, checkpoint)
    now = reconfigure(run.model)
    differ = {name: value for name, value in saved.to_dict().items() if name != "impl" and getattr(now, name) != value}
    if differ:
        fail("run", f"must have the AllMemConfig of the checkpoint ({differ})", {name: getattr(now, name) for name in differ})
    expected = {name: p.shape for name, p in memory_parameters(run.model).items()}
    found = {name: t.shape for name, t in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        fail("checkpoint", f"must hold the {len(expected)} tensors of the run's memory", f"{len(wrong)} that differ, the first {wrong[0]}")
    return tensors


def check_recipe(saved: Recipe, now: Recipe) -> None:
    """Raises:
    ValueError: a run would go on with another recipe than it began with; the message holds what differs.
    """
    if saved != now:
        current = now.to_dict()
        differ = {name: value for name, value in saved.to_dict().items() if current[name] != value}
        fail("run", f"must have the recipe of the checkpoint ({differ})", {name: current[name] for name in differ})


def _split(tensors: dict[str, torch.Tensor], part_bytes: int) -> list[dict[str, torch.Tensor]]:
    """Files of at most `part_bytes`, or of one tensor."""
    files: list[dict[str, torch.Tensor]] = []
    size = part_bytes
    for name, tensor in tensors.items():
        if size + tensor.nbytes > part_bytes:
            files.append({})
            size = 0
        files[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    return files


def _checkpoints(directory: Path) -> list[Path]:
    return [p for p in directory.glob(f"{_PREFIX}*") if (p / DESCRIPTION).is_file()]
