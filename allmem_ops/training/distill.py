"""`fine_tune`: a whole distillation run in one call."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from allmem_ops._validation import fail
from allmem_ops.training.data import Batch
from allmem_ops.training.engine import Distillation, Step
from allmem_ops.training.kl import CHUNK_SIZE
from allmem_ops.training.recipe import Range, Recipe


@dataclass(frozen=True)
class FineTuneResult:
    """The steps of a run in order."""

    steps: list[Step] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradient was not finite; they changed nothing."""
        return sum(step.skipped for step in self.steps)


def fine_tune(
    model: Any,
    batches: Iterable[torch.Tensor | Batch],
    *,
    steps: int,
    lr: float = 1e-4,
    warmup: int = 0,
    decay: int = 0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    grad_clip: float = 1.0,
    window: Range | None = None,
    sinks: Range | None = None,
    chunk_size_range: Range | None = None,
    distinct_draws: int = 0,
    first_position: int = 0,
    chunk_size: int = CHUNK_SIZE,
    seed: int = 0,
    cuda_graph: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> FineTuneResult:
    """Train the memory of a converted model by forward KL to the same model with full attention.

    `Recipe` and `Distillation` in one call, for a run that ends in the process that began it; `python -m allmem_ops.train` is the
    resumable form. There is no randomness but the draws from `window`, `sinks` and `chunk_size_range`: seed the conversion, which
    draws the memory's weights, and the order of `batches`.

    Args:
        model: a model that `allmem_ops.hf.convert` changed. In training mode during the run.
        batches: yields `[B, T]` int64 token rows on the model's device, or `Batch(ids, mask)`, at least `steps` of them.
        steps, lr, warmup, decay, weight_decay, betas, grad_clip, first_position, seed, window, sinks: as in `Recipe`.
        chunk_size_range, distinct_draws: the memory's chunk size and the number of draws, as `Recipe.chunk_size` and its namesake.
        chunk_size: tokens whose logits exist at a time, `Recipe.kl_chunk`.
        cuda_graph: as in `Distillation`: batches of one shape, and `distinct_draws` or nothing to draw. Default False.
        on_step: called after every step, whose two numbers the host waits for.

    Returns:
        `FineTuneResult`.

    Raises:
        ValueError: for an argument out of range, for too few batches, and for a model that has anything but its memory to train.
    """
    recipe = Recipe(
        steps=steps,
        lr=lr,
        warmup=warmup,
        decay=decay,
        weight_decay=weight_decay,
        betas=betas,
        grad_clip=grad_clip,
        window=window,
        sinks=sinks,
        chunk_size=chunk_size_range,
        distinct_draws=distinct_draws,
        first_position=first_position,
        kl_chunk=chunk_size,
        seed=seed,
    )
    training = model.training
    run = Distillation(model, recipe, cuda_graph=cuda_graph)
    result = FineTuneResult()
    source = iter(batches)
    try:
        for index in range(steps):
            batch = next(source, None)
            if batch is None:
                fail("batches", f"must yield at least steps={steps} batches", index)
            start = time.perf_counter()
            step = run.step(batch).read(start)
            result.steps.append(step)
            if on_step is not None:
                on_step(step)
    finally:
        model.train(training)
    return result
