"""Losses of every token under an arm: texts of any length, and never a [T, vocab] tensor of logits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from allmem_ops.evaluation.arms import ARMS, FULL, Arm
from allmem_ops.hf import AllMemCache, full_attention, memory_mode
from allmem_ops.hf.convert import memory_branches
from allmem_ops.layers.memory import MemoryBranch
from allmem_ops.ops.precision import matmul
from allmem_ops.training import final_hidden, token_losses

SEGMENT = 8192


@dataclass(frozen=True)
class Score:
    """Means over the scored positions, in nats a token: `kl` to the teacher, `loss` to the text."""

    kl: float
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def read(model: Any, arm: Arm, ids: torch.Tensor, *, segment: int = SEGMENT) -> Iterator[tuple[int, torch.Tensor]]:
    """The final hidden states of `ids` [B, T] under `arm`, piece by piece: (start, [B, t, D]).

    An arm of constant cache reads a text longer than `segment` in segments through one `AllMemCache`; every other arm in one pass.
    """
    with arm.enter(model):
        if not arm.constant or ids.shape[1] <= segment:
            yield 0, final_hidden(model, ids)
            return
        cache = AllMemCache(model, ids.shape[0])
        for start in range(0, ids.shape[1], segment):
            piece = ids[:, start : start + segment]
            yield start, model.base_model(input_ids=piece, past_key_values=cache, use_cache=True).last_hidden_state


@torch.no_grad()
def cross_entropies(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, *, chunk_size: int = 2048) -> torch.Tensor:
    """Cross-entropy of every position, [B, T] in float32, from hidden states [B, T, D]; logits exist for `chunk_size` tokens at a time."""
    parts = zip(hidden.flatten(0, 1).split(chunk_size), targets.flatten().split(chunk_size), strict=True)
    losses = [torch.nn.functional.cross_entropy(matmul(h, head.T), target, reduction="none") for h, target in parts]
    return torch.cat(losses).view(targets.shape)


@torch.no_grad()
def text_losses(
    model: Any,
    arm: Arm,
    rows: torch.Tensor,
    *,
    segment: int = SEGMENT,
    ends: tuple[int, ...] = (),
    rows_per_pass: int = 1,
    on_pass: Callable[[int], Any] = lambda _: None,
) -> torch.Tensor:
    """The loss of every token of `rows` [N, T] but the first, [N, T-1], as its prediction stands at the position before it.

    Args:
        model: a converted model.
        arm: how it is read.
        rows: int64, on the model's device.
        segment: tokens a pass, for an arm of constant cache.
        ends: for an arm whose answer depends on the whole text's length: the lengths at which it is read anew, rising; a token is scored
            in the shortest reading that holds it. T is added.
        rows_per_pass: rows of one pass.
        on_pass: called with the number of tokens read.
    """
    head = model.get_output_embeddings().weight
    length = rows.shape[1]
    cuts = [*(end for end in ends if end < length), length] if arm.by_length else [length]
    found = []
    for part in rows.split(rows_per_pass):
        losses, done = [], 0
        for cut in cuts:
            for start, hidden in read(model, arm, part[:, :cut], segment=segment):
                stop = min(start + hidden.shape[1], length - 1)
                scored = hidden[:, max(done - start, 0) : stop - start]
                if scored.shape[1]:
                    losses.append(cross_entropies(scored, head, part[:, stop - scored.shape[1] + 1 : stop + 1]))
                    done = stop
                on_pass(part.shape[0] * hidden.shape[1])
        found.append(torch.cat(losses, 1))
    return torch.cat(found)


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
def row_scores(
    model: Any,
    arm: Arm,
    rows: torch.Tensor,
    teacher: torch.Tensor,
    *,
    first_position: int = 0,
    chunk_size: int = 256,
    rows_per_pass: int = 1,
    on_pass: Callable[[], Any] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss to the text, KL to the teacher) at the positions from `first_position` on, both [N, T - 1 - first_position].

    Args:
        model: a converted model.
        arm: how it is read; full attention is scored by `teacher` itself.
        rows: `[N, T]` int64 on the model's device.
        teacher: `teacher_hidden(model, rows)`.
        first_position: the first position that counts; its prediction is the token after it.
        chunk_size: tokens whose logits exist at a time.
        rows_per_pass: rows of one forward pass.
        on_pass: called after each forward pass; there are none for full attention.
    """
    head = model.get_output_embeddings().weight
    scored = slice(first_position, rows.shape[1] - 1)
    losses, kls = [], []
    for part, expected in zip(rows.split(rows_per_pass), teacher.split(rows_per_pass), strict=True):
        hidden = expected
        if arm.key != FULL:
            with arm.enter(model):
                hidden = final_hidden(model, part)
            on_pass()
        found = token_losses(hidden[:, scored], expected[:, scored], head, part[:, first_position + 1 :], chunk_size=chunk_size)
        losses.append(found.cross_entropy)
        kls.append(found.kl)
    return torch.cat(losses), torch.cat(kls)


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
    """The mean score of arms (keys of `ARMS`) at the positions from `first_position` on; the other arguments are those of `row_scores`."""
    options = {"first_position": first_position, "chunk_size": chunk_size, "rows_per_pass": rows_per_pass, "on_pass": on_pass}
    scores = {}
    for key in arms:
        loss, kl = row_scores(model, ARMS[key], rows, teacher, **options)
        scores[key] = Score(kl.double().mean().item(), loss.double().mean().item())
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
