"""Forward-KL distillation of a converted model from the same weights with full attention: only the memory trains."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from allmem_ops._validation import check_float, check_int, check_shape, fail
from allmem_ops.hf import full_attention, trainable_parameters
from allmem_ops.training.graph import GraphedStep
from allmem_ops.training.kl import CHUNK_SIZE, forward_kl
from allmem_ops.training.schedule import wsd_factor


@dataclass(frozen=True)
class Step:
    """What one optimizer step saw: `kl` in nats a token, the base `lr`, the gradient's norm before clipping, `skipped` when not finite."""

    index: int
    kl: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    skipped: bool


@dataclass(frozen=True)
class FineTuneResult:
    """The steps of a run in order."""

    steps: list[Step] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradient was not finite; they changed nothing."""
        return sum(step.skipped for step in self.steps)


def final_hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """`[B, T, D]`: what the language-model head receives, without a cache."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def fine_tune(
    model: Any,
    batches: Iterable[torch.Tensor],
    *,
    steps: int,
    lr: float = 1e-4,
    warmup: int = 0,
    decay: int = 0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    grad_clip: float = 1.0,
    first_position: int = 0,
    chunk_size: int = CHUNK_SIZE,
    cuda_graph: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> FineTuneResult:
    """Train the memory of a converted model by forward KL to the same model with full attention.

    AdamW on `trainable_parameters(model)` (alpha has its own, larger rate) under the WSD schedule; a step whose loss or gradient
    is not finite is skipped and counted. The model's weights may be bf16: the memory's parameters, gradients and the optimizer are fp32.
    There is no randomness here: seed the conversion, which draws the memory's weights, and the order of `batches`.

    Args:
        model: a model that `allmem_ops.hf.convert` changed.
        batches: yields int64 `[B, T]` token rows on the model's device, at least `steps` of them.
        steps: optimizer steps, one a batch.
        lr: peak learning rate. Default 1e-4.
        warmup, decay: steps of the rise and of the fall. Default 0.
        weight_decay, betas: AdamW's. Default 0 and (0.9, 0.95).
        grad_clip: threshold on the norm of all gradients together. Default 1.
        first_position: the loss counts positions from here on. Default 0: all.
        chunk_size: tokens whose logits exist at a time.
        cuda_graph: replay the student's forward and backward as one CUDA graph: batches of one shape, and no change of window,
            sinks or chunk size between steps. Default False.
        on_step: called after every step.

    Returns:
        `FineTuneResult`.

    Raises:
        ValueError: for an argument out of range, for too few batches, and for a model that has anything but its memory to train.
    """
    check_int("steps", steps, 1)
    check_int("first_position", first_position, 0)
    check_float("lr", lr, above=0.0)
    check_float("grad_clip", grad_clip, above=0.0)
    groups = trainable_parameters(model, lr=lr)
    parameters = [p for group in groups for p in group["params"]]
    _check_only_memory_trains(model, parameters)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    head = model.get_output_embeddings().weight
    result = FineTuneResult()
    source = iter(batches)

    def student_step(ids: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        student = final_hidden(model, ids)[:, first_position:]
        loss = forward_kl(student, teacher, head, chunk_size=chunk_size)
        loss.backward()
        return loss.detach()

    run_student = GraphedStep(student_step, parameters) if cuda_graph else student_step
    for index in range(steps):
        ids = next(source, None)
        if ids is None:
            fail("batches", f"must yield at least steps={steps} batches", index)
        check_shape("batches", ids, "B T", {})
        if first_position >= ids.shape[1]:
            fail("first_position", f"must be below T={ids.shape[1]}", first_position)
        start = time.perf_counter()
        factor = wsd_factor(index, total=steps, warmup=warmup, decay=decay)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        with torch.no_grad(), full_attention(model):
            teacher = final_hidden(model, ids)[:, first_position:]
        loss = run_student(ids, teacher)
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        # The one host read of a step: whether to skip is decided here, and the progress line shows both numbers.
        kl, grad_norm = torch.stack([loss.float(), norm.float()]).tolist()
        skipped = not (abs(kl) < float("inf") and grad_norm < float("inf"))
        if not skipped:
            optimizer.step()
        if not cuda_graph:
            optimizer.zero_grad(set_to_none=True)
        step = Step(index, kl, lr * factor, grad_norm, ids.numel(), time.perf_counter() - start, skipped)
        result.steps.append(step)
        if on_step is not None:
            on_step(step)
    return result


def _check_only_memory_trains(model: Any, parameters: list[torch.nn.Parameter]) -> None:
    memory = {id(p) for p in parameters}
    stray = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in memory]
    if stray:
        fail("model", "must have nothing but its memory's parameters to train", stray[:3], "Set requires_grad_(False) on the others")
