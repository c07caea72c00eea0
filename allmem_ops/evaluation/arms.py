"""The arms of a comparison: one converted model, read in different ways."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from allmem_ops._validation import check_float, fail
from allmem_ops.hf import full_attention, memory_mode, memory_parameters
from allmem_ops.hf.runtime import runtime_of

# Of dynamic NTK's factors 1, 2, 4 and 8 the best over 8k to 64k for SmolLM2, trained to 8k (docs/evaluation.md).
NTK_FACTOR = 2.0
FULL, NTK, WINDOW, ALLMEM, NO_WRITES, ADAPTER, LINEAR = "full", "ntk", "window", "allmem", "writes-off", "adapter", "linear"
LABELS = {
    FULL: "full attention",
    NTK: "full attention, dynamic NTK",
    WINDOW: "window + same sinks",
    ALLMEM: "AllMem",
    NO_WRITES: "AllMem, writes off",
    ADAPTER: "AllMem, trained without writes",
    LINEAR: "linear memory",
}


@dataclass(frozen=True)
class Arm:
    """One way to read a converted model.

    Args:
        key: its name in results; a key of `LABELS`, or one followed by "#" and what tells it apart from others of its kind.
        enter: (model) -> context manager inside which the model is this arm.
        constant: it reads a text in segments through a cache of constant size; else in one pass that sees every key.
        by_length: what it says about a token depends on how long the whole text is.
    """

    key: str
    enter: Callable[[Any], AbstractContextManager]
    constant: bool = True
    by_length: bool = False

    @property
    def label(self) -> str:
        kind, _, which = self.key.partition("#")
        return f"{LABELS[kind]}: {which}" if which else LABELS[kind]

    def named(self, which: str) -> "Arm":
        """The same arm, told apart from others of its kind."""
        return replace(self, key=f"{self.key.partition('#')[0]}#{which}")


ARMS: dict[str, Arm] = {
    FULL: Arm(FULL, full_attention, constant=False),
    WINDOW: Arm(WINDOW, lambda model: memory_mode(model, "off")),
    ALLMEM: Arm(ALLMEM, lambda model: memory_mode(model, "on")),
    NO_WRITES: Arm(NO_WRITES, lambda model: memory_mode(model, "no_writes")),
}


def ntk_arm(factor: float = NTK_FACTOR) -> Arm:
    """Full attention under transformers' own dynamic NTK scaling of RoPE.

    Frequencies follow from the length of the whole text, read in one pass: the form that is kindest to it. (Read in segments, transformers
    keeps keys that were rotated with earlier frequencies.)
    """
    check_float("factor", factor, above=0.0)
    return Arm(NTK, lambda model: _dynamic_ntk(model, factor), constant=False, by_length=True)


@contextmanager
def _dynamic_ntk(model: Any, factor: float) -> Iterator[Any]:
    runtime = runtime_of(model)
    decoder, name = runtime.decoder(model), runtime.family.rotary
    own = getattr(decoder, name)
    config = copy.deepcopy(model.config)
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        fail("model", "must have plain RoPE for dynamic NTK scaling", f"rope_type {kind!r}")
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": factor}
    setattr(decoder, name, type(own)(config).to(own.inv_freq.device))
    try:
        with full_attention(model):
            yield model
    finally:
        setattr(decoder, name, own)


def checkpoint_arm(key: str, parameters: dict[str, torch.Tensor]) -> Arm:
    """A memory of one checkpoint among several.

    Args:
        key: `ALLMEM`; or `ADAPTER`, for a memory that was trained with eta = 0, which is also how it is read.
        parameters: `memory_parameters` of that checkpoint.
    """
    mode = "no_writes" if key == ADAPTER else "on"

    @contextmanager
    def enter(model: Any) -> Iterator[Any]:
        with memory_tensors(model, parameters), memory_mode(model, mode):
            yield model

    return Arm(key, enter)


@contextmanager
def memory_tensors(model: Any, parameters: dict[str, torch.Tensor]) -> Iterator[Any]:
    """Inside, the memory's parameters have the values of `parameters`.

    Raises:
        ValueError: other names or shapes than the model's.
    """
    own = memory_parameters(model)
    shapes, given = ({name: tuple(t.shape) for name, t in p.items()} for p in (own, parameters))
    if shapes != given:
        differ = sorted(name for name in {*shapes, *given} if shapes.get(name) != given.get(name))
        fail("parameters", "must have the names and shapes of the model's memory", f"{len(differ)} that differ, the first {differ[0]}")
    saved = {name: p.detach().clone() for name, p in own.items()}
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(parameters[name])
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(saved[name])


def linear_arm(branches: list[nn.Module]) -> Arm:
    """Another memory in AllMem's place.

    Args:
        branches: one module a layer that has a memory, each with the interface of `MemoryBranch`.
    """

    @contextmanager
    def enter(model: Any) -> Iterator[Any]:
        attentions = [a for a in runtime_of(model).attentions(model) if hasattr(a, "memory")]
        if len(attentions) != len(branches):
            fail("branches", f"must be {len(attentions)} modules, one a layer with a memory", len(branches))
        own = [a.memory for a in attentions]
        _place(attentions, branches)
        try:
            with memory_mode(model, "on"):
                yield model
        finally:
            _place(attentions, own)

    return Arm(LINEAR, enter)


def _place(attentions: list[nn.Module], branches: list[nn.Module]) -> None:
    for attention, branch in zip(attentions, branches, strict=True):
        attention.memory = branch
