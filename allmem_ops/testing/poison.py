"""Uninitialised memory made visible: what the library allocates with `torch.empty` starts as NaN."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _sentinel(dtype: torch.dtype) -> float | int | bool:
    """NaN for floating dtypes; for integers a value that no offset, count or index of a test reaches."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max - 3


def _poisoning(function: Callable[..., torch.Tensor], package: str) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = function(*args, **kwargs)
        # Dynamo cannot trace a look at the caller's frame; compiled code allocates below Python in any case.
        if torch.compiler.is_compiling():
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller == package or caller.startswith(package + "."):
            with torch.no_grad():
                out.fill_(_sentinel(out.dtype))
        return out

    return wrapper


@functools.cache
def _let_dynamo_list_torch() -> None:
    """Dynamo lists torch's functions when it first compiles; an original that it does not find in torch's namespace then is a graph break
    for the rest of the process. So it compiles something before the first patch (1.5 s, once).
    """
    torch.compile(torch.neg, backend="eager")(torch.zeros(1))


@contextmanager
def poisoned_empty(package: str = "allmem_ops") -> Iterator[None]:
    """Inside, `torch.empty`, `empty_like`, `empty_strided` and `Tensor.new_empty` called by modules of `package` return
    NaN (integers: a huge value), so that an element nobody writes fails the comparison that reads it.

    Callers outside `package`, torch's own Python code among them, get the tensors that they would get without it.
    """
    _let_dynamo_list_torch()
    names = ("empty", "empty_like", "empty_strided")
    saved = {name: getattr(torch, name) for name in names}
    outer = torch.Tensor.__dict__.get("new_empty")  # set only inside another block of this kind
    try:
        for name in names:
            setattr(torch, name, _poisoning(saved[name], package))
        torch.Tensor.new_empty = _poisoning(torch.Tensor.new_empty, package)
        yield
    finally:
        for name in names:
            setattr(torch, name, saved[name])
        if outer is None:
            del torch.Tensor.new_empty  # the method of the C base class shows again
        else:
            torch.Tensor.new_empty = outer
