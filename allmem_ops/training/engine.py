"""`Distillation`: one run of forward-KL distillation, step by step, in one process or in several through accelerate."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from allmem_ops._impl import resolve_impl
from allmem_ops._validation import fail
from allmem_ops.hf import full_attention, memory_mode, memory_parameters, reconfigure, trainable_parameters
from allmem_ops.hf.runtime import runtime_of
from allmem_ops.hf.unmasked import unmasked
from allmem_ops.training.data import Batch
from allmem_ops.training.graph import GraphedSteps
from allmem_ops.training.kl import forward_kl
from allmem_ops.training.recipe import NO_DRAW, Draw, Recipe


@dataclass(frozen=True)
class Step:
    """What one optimizer step saw.

    Args:
        index: from 0.
        kl: nats a token that counts, over all processes.
        lr: the base rate.
        grad_norm: before clipping.
        tokens: read by this process.
        seconds: wall time.
        skipped: loss or gradient were not finite; the step changed nothing.
        draw: window, sinks and chunk size; None where the recipe leaves one alone.
    """

    index: int
    kl: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    skipped: bool
    draw: Draw = NO_DRAW


@dataclass(frozen=True)
class Launched:
    """A step that the device may not have finished: `numbers` holds kl and gradient norm, on the device."""

    index: int
    lr: float
    tokens: int
    draw: Draw
    numbers: Tensor

    def read(self, since: float) -> Step:
        """Wait for the step and read its two numbers, one transfer; `since` is a `time.perf_counter()` that its seconds count from."""
        kl, norm = self.numbers.tolist()
        skipped = not (abs(kl) < float("inf") and norm < float("inf"))
        return Step(self.index, kl, self.lr, norm, self.tokens, time.perf_counter() - since, skipped, self.draw)


def final_hidden(model: Any, ids: Tensor) -> Tensor:
    """`[B, T, D]`: what the language-model head receives, without a cache."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


class TeacherAndStudent(nn.Module):
    """One converted model read twice: with full attention, without gradients, and as it is. Returns the summed KL."""

    def __init__(self, model: nn.Module, first_position: int, kl_chunk: int) -> None:
        super().__init__()
        self.model, self.first_position, self.kl_chunk = model, first_position, kl_chunk

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.student(ids, self.teacher(ids), mask)

    @torch.no_grad()
    def teacher(self, ids: Tensor) -> Tensor:
        with self._full_attention(ids), unmasked(self.model):
            return final_hidden(self.model, ids)[:, self.first_position :]

    @contextmanager
    def _full_attention(self, ids: Tensor) -> Iterator[None]:
        """`full_attention`; where the kernels run, the student without its memory and with a window of the whole row, which is the same
        and spares the class's own RoPE, a dozen passes over q and k a layer."""
        runtime, weight = runtime_of(self.model), self.model.get_input_embeddings().weight
        kernels = weight.dtype.itemsize == 2 and resolve_impl("swa", runtime.config.impl, weight) == "triton"
        if not kernels or ids.shape[1] > runtime.trained_length:  # beyond it a student's positions are not the class's
            with full_attention(self.model):
                yield
            return
        before = runtime.config
        runtime.config = before.replace(window=ids.shape[1], sinks=0)
        try:
            with memory_mode(self.model, "off"):
                yield
        finally:
            runtime.config = before

    def student(self, ids: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        with unmasked(self.model):
            hidden = final_hidden(self.model, ids)[:, self.first_position :]
        mask = None if mask is None else mask[:, self.first_position :]
        head = self.model.get_output_embeddings().weight
        return forward_kl(hidden, teacher, head, mask=mask, reduction="sum", chunk_size=self.kl_chunk)


class Distillation:
    """Trains the memory of a converted model by forward KL to the same weights with full attention.

    AdamW on `trainable_parameters(model)` under the recipe's schedule. The model's weights may be bf16: the memory's parameters,
    their gradients and the optimizer stay fp32. A step whose loss or gradient is not finite changes nothing; whether it is finite
    is decided on the device (`found_inf` of the fused optimizer), so that no step waits for the host.

    Args:
        model: a model that `allmem_ops.hf.convert` changed; put into training mode.
        recipe: the steps.
        accelerator: an `accelerate.Accelerator`: several processes, by its own config. None: this process alone.
        cuda_graph: replay forward and backward, the teacher's too, as a CUDA graph for every draw, captured at the first step: batches
            of one shape, one process, a recipe with `distinct_draws` or with nothing to draw, and nothing else about the model that
            changes.

    Attributes:
        index: the next step; set by `load_optimizer_state`.
        module: what runs the passes, wrapped by the accelerator.
        optimizer, parameters: AdamW, and what it trains.

    Raises:
        ValueError: a model that is not converted or has anything but its memory to train; `cuda_graph` where it can't be.
    """

    def __init__(self, model: Any, recipe: Recipe, *, accelerator: Any = None, cuda_graph: bool = False) -> None:
        self.model, self.recipe, self.accelerator, self.index = model, recipe, accelerator, 0
        config = reconfigure(model)
        self._own = Draw(config.window, config.sinks, config.chunk_size)
        groups = trainable_parameters(model, lr=recipe.lr)
        for group in groups:  # a part of the memory may be frozen
            group["params"] = [p for p in group["params"] if p.requires_grad]
        _check_only_memory_trains(model, [p for group in groups for p in group["params"]])
        if cuda_graph:
            self._check_graph(next(iter(memory_parameters(model).values())).device)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.module: nn.Module = TeacherAndStudent(model.train(), recipe.first_position, recipe.kl_chunk)
        self._plain = self.module
        if accelerator is not None:
            self.module, self.optimizer = accelerator.prepare(self.module, self.optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._engine_steps = accelerator is not None and str(accelerator.distributed_type).endswith("DEEPSPEED")
        self._sharded = accelerator is not None and not self._engine_steps and any(hasattr(p, "full_tensor") for p in self.parameters)
        self._graphs = GraphedSteps(self._pass, self.parameters, recipe.all_draws(), self._choose) if cuda_graph else None

    def step(self, batch: Batch | Tensor) -> Launched:
        """Launch the next step; `read` on what comes back waits for it.

        Args:
            batch: ids [B, T], or ids and mask, on the model's device: this process's rows.
        """
        batch = Batch.of(batch)
        if self.recipe.first_position >= batch.ids.shape[1]:
            fail("first_position", f"must be below T={batch.ids.shape[1]}", self.recipe.first_position)
        draw = self.recipe.draw(self.index)
        self._choose(draw)
        factor = self.recipe.factor(self.index)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        kl = self._forward_backward(batch, draw)
        norm = self._update(kl)
        launched = Launched(self.index, self.recipe.lr * factor, batch.ids.numel(), draw, torch.stack([kl.float(), norm.float()]))
        self.index += 1
        return launched

    def _choose(self, draw: Draw) -> None:
        if draw != NO_DRAW:
            reconfigure(self.model, **draw._asdict())

    def _forward_backward(self, batch: Batch, draw: Draw) -> Tensor:
        """Fill the gradients; the mean KL over the tokens of all processes."""
        if self._graphs is not None:
            return self._graphs(draw, *batch)
        if self.accelerator is None:
            return self._pass(*batch)
        # The engine averages the gradients of its processes: each gives its sum over the mean count.
        count = torch.as_tensor(self._count(*batch), device=batch.ids.device, dtype=torch.float32)
        count = self.accelerator.reduce(count, "mean")
        return self.accelerator.reduce(self._backward(self.module(*batch), 1 / count), "mean")

    def _pass(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Forward and backward of this process alone."""
        return self._backward(self._plain(ids, mask), 1 / self._count(ids, mask))

    def _count(self, ids: Tensor, mask: Tensor | None) -> Tensor | int:
        first = self.recipe.first_position
        return ids[:, first:].numel() if mask is None else mask[:, first:].sum().clamp(min=1)

    def _check_graph(self, device: torch.device) -> None:
        if self.recipe.draws and not self.recipe.distinct_draws:
            fail("cuda_graph", "must be False where every step draws window, sinks or chunk size anew", True, "Set `distinct_draws`")
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            fail("cuda_graph", "must be False with several processes", True)
        if device.type != "cuda":
            fail("cuda_graph", "must be False on a CPU", True)
        if self.model.is_gradient_checkpointing:  # it asks for the state of the random numbers, which a capture does not give
            fail("cuda_graph", "must be False with gradient checkpointing", True)

    def _backward(self, kl: Tensor, scale: Tensor | float) -> Tensor:
        loss = kl * scale
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)
        return loss.detach()

    def _update(self, kl: Tensor) -> Tensor:
        """Clip and step, unless loss or gradient are not finite; the norm before clipping."""
        if self._engine_steps:  # DeepSpeed has clipped and stepped inside backward, by its own config
            norm = self.module.get_global_grad_norm()
            return kl.new_zeros(()) if norm is None else torch.as_tensor(float(norm), device=kl.device)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._sharded:  # the fused optimizer does not mix its predicate with sharded tensors: the host decides
            norm = norm.full_tensor()
            if torch.isfinite(norm + kl):
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.grad_clip, norm)
                self.optimizer.step()
            self.optimizer.zero_grad()
            return norm
        fused = getattr(self.optimizer, "optimizer", self.optimizer)
        fused.grad_scale = (norm / self.recipe.grad_clip).clamp(min=1.0).float()
        fused.found_inf = (~torch.isfinite(norm + kl)).float()
        self.optimizer.step()
        if self._graphs is None:
            self.optimizer.zero_grad()
        return norm

    def reset_draw(self) -> None:
        """Give the model back the window, sinks and chunk size that it had before the first step."""
        reconfigure(self.model, **self._own._asdict())

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts by name; empty before the first step. Not of a sharded run: accelerate saves that."""
        if self.sharded:
            raise RuntimeError("the state of a sharded run is saved by accelerate's own save_state")
        states = getattr(self.optimizer, "optimizer", self.optimizer).state
        return {f"{key}/{name}": x for name, p in self._trained().items() for key, x in states.get(p, {}).items()}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in memory_parameters(self.model).items() if p.requires_grad}

    def check_optimizer_state(self, tensors: dict[str, Tensor], index: int) -> None:
        """Raises:
        ValueError: `tensors` are not the `optimizer_state` of this model before step `index`.
        """
        keys = ("exp_avg", "exp_avg_sq", "step") if index else ()
        parameters = self._trained()
        expected = {f"{key}/{name}": () if key == "step" else tuple(p.shape) for name, p in parameters.items() for key in keys}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if found != expected:
            wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            fail("tensors", f"must be the {len(expected)} of this model's optimizer", f"{len(wrong)} that differ, the first {wrong[0]}")

    def load_optimizer_state(self, tensors: dict[str, Tensor], index: int) -> None:
        """Go on at step `index` with the `optimizer_state` of another run; the memory is `load_memory`'s business.

        Raises:
            ValueError: tensors that do not fit; nothing is changed then.
        """
        self.check_optimizer_state(tensors, index)
        states = getattr(self.optimizer, "optimizer", self.optimizer).state
        for name, p in self._trained().items():
            own = {key: tensors.get(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")} if index else {}
            states[p] = {key: x.to(p.device, torch.float32, copy=True) for key, x in own.items()}
        self.index = index

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Inside, every process holds whole parameters where FSDP2 has split them, to be saved. Called by all processes."""
        parts = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        for part in parts:
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()

    @property
    def sharded(self) -> bool:
        """Whether parameters or optimizer are spread over the processes, so that only accelerate can save them."""
        return self._sharded or self._engine_steps


def _check_only_memory_trains(model: Any, parameters: list[nn.Parameter]) -> None:
    memory = {id(p) for p in parameters}
    stray = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in memory]
    if stray:
        fail("model", "must have nothing but its memory's parameters to train", stray[:3], "Set requires_grad_(False) on the others")
