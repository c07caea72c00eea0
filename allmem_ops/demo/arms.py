"""The arms that the demo compares, each on the same weights of one converted model, and how they are scored."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from allmem_ops.hf import full_attention, memory_mode
from allmem_ops.hf.convert import memory_branches
from allmem_ops.layers.memory import MemoryBranch
from allmem_ops.training import final_hidden, token_losses

FULL, WINDOW, ALLMEM, NO_WRITES = "full attention", "window + same sinks", "AllMem", "AllMem, writes off"
ARMS: dict[str, Callable[[Any], AbstractContextManager]] = {
    FULL: full_attention,
    WINDOW: lambda model: memory_mode(model, "off"),
    ALLMEM: lambda model: memory_mode(model, "on"),
    NO_WRITES: lambda model: memory_mode(model, "no_writes"),
}


@dataclass(frozen=True)
class Score:
    """Means over the scored positions, in nats a token: `kl` to the teacher, `loss` to the text."""

    kl: float
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(
    model: Any,
    rows: torch.Tensor,
    *,
    first_position: int,
    arms: tuple[str, ...] = tuple(ARMS),
    chunk_size: int = 256,
    on_pass: Callable[[], None] = lambda: None,
) -> dict[str, Score]:
    """Score arms on held-out rows at the positions from `first_position` on: those whose context the window cuts.

    Args:
        model: a converted model.
        rows: `[N, T]` int64 on the model's device.
        first_position: the first position that counts; its prediction is the token after it.
        arms: names from `ARMS`. Full attention always runs: it is the teacher.
        chunk_size: tokens whose logits exist at a time.
        on_pass: called after each forward pass; there are `N * (1 + arms other than full attention)`.

    Returns:
        The score of each arm.
    """
    head = model.get_output_embeddings().weight
    sums = {name: torch.zeros(2, dtype=torch.float64, device=rows.device) for name in arms}
    for row in rows.split(1):
        scored = slice(first_position, row.shape[1] - 1)
        targets = row[:, first_position + 1 :]

        def hidden(name: str, row: torch.Tensor = row, scored: slice = scored) -> torch.Tensor:
            with ARMS[name](model):
                out = final_hidden(model, row)[:, scored]
            on_pass()
            return out

        teacher = hidden(FULL)
        for name in arms:
            student = teacher if name == FULL else hidden(name)
            losses = token_losses(student, teacher, head, targets, chunk_size=chunk_size)
            sums[name] += torch.stack([losses.kl.double().sum(), losses.cross_entropy.double().sum()])
    count = rows.shape[0] * (rows.shape[1] - 1 - first_position)
    return {name: Score(*(total / count).tolist()) for name, total in sums.items()}


@torch.no_grad()
def written_share(model: Any, row: torch.Tensor, *, first_position: int) -> float:
    """How much of what the memory adds comes from what it wrote: |r - r_off| / |r|, mean over the layers.

    r is a branch's output before alpha, r_off the same branch on the same input with eta = 0. Positions from `first_position` on.
    """
    inputs: dict[MemoryBranch, torch.Tensor] = {}
    branches = memory_branches(model)
    handles = [b.register_forward_pre_hook(lambda branch, args: inputs.update({branch: args[0]})) for b in branches]
    try:
        final_hidden(model, row)
    finally:
        for handle in handles:
            handle.remove()
    shares = []
    for branch, x in inputs.items():
        on = branch(x)[:, first_position:].float()
        with memory_mode(model, "no_writes"):
            off = branch(x)[:, first_position:].float()
        shares.append((on - off).norm() / on.norm())
    return torch.stack(shares).mean().item()
