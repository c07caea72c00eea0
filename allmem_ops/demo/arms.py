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
def teacher_hidden(model: Any, rows: torch.Tensor, *, rows_per_pass: int = 1, on_pass: Callable[[], Any] = lambda: None) -> torch.Tensor:
    """The teacher's final hidden states, `[N, T, D]`: they stay the same while the memory trains."""
    hidden = []
    with full_attention(model):
        for part in rows.split(rows_per_pass):
            hidden.append(final_hidden(model, part))
            on_pass()
    return torch.cat(hidden)


@torch.no_grad()
def evaluate(
    model: Any,
    rows: torch.Tensor,
    teacher: torch.Tensor,
    *,
    first_position: int,
    arms: tuple[str, ...] = tuple(ARMS),
    chunk_size: int = 256,
    rows_per_pass: int = 1,
    on_pass: Callable[[], Any] = lambda: None,
) -> dict[str, Score]:
    """Score arms on held-out rows at the positions from `first_position` on: those whose context the window cuts.

    Args:
        model: a converted model.
        rows: `[N, T]` int64 on the model's device.
        teacher: `teacher_hidden(model, rows)`; it is also what full attention is scored by.
        first_position: the first position that counts; its prediction is the token after it.
        arms: names from `ARMS`.
        chunk_size: tokens whose logits exist at a time.
        rows_per_pass: rows of one forward pass.
        on_pass: called after each forward pass; there are none for full attention.

    Returns:
        The score of each arm.
    """
    head = model.get_output_embeddings().weight
    scored = slice(first_position, rows.shape[1] - 1)
    scores = {}
    for name in arms:
        total = torch.zeros(2, dtype=torch.float64, device=rows.device)
        for part, expected in zip(rows.split(rows_per_pass), teacher.split(rows_per_pass), strict=True):
            hidden = expected
            if name != FULL:
                with ARMS[name](model):
                    hidden = final_hidden(model, part)
                on_pass()
            losses = token_losses(hidden[:, scored], expected[:, scored], head, part[:, first_position + 1 :], chunk_size=chunk_size)
            total += torch.stack([losses.kl.double().sum(), losses.cross_entropy.double().sum()])
        scores[name] = Score(*(total / (rows.shape[0] * (rows.shape[1] - 1 - first_position))).tolist())
    return scores


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
