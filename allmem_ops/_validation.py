"""Argument checks: every public function raises the same form of `ValueError`.

    `k` must have shape [B, T, HK, D] with T=64; got [2, 63, 4, 64]

The argument comes first, then what was expected, then what came. The helpers trace under
`torch.compile(fullgraph=True)`: strings are built only on the way to an error.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NoReturn

import torch

MATMUL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def fail(name: str, expected: str, got: object, hint: str = "") -> NoReturn:
    """Raise the library's `ValueError` for argument `name`."""
    raise ValueError(f"`{name}` {expected}; got {got}" + (f". {hint}" if hint else ""))


def short(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        fail(name, "must be a torch.Tensor", type(value).__name__)


def check_shape(name: str, value: object, dims: str, known: dict[str, int]) -> None:
    """Check that `value` is a tensor whose shape matches `dims`, e.g. `"B T HK D"` or `"N 3"`.

    A name that `known` holds must have that size; a name that it does not hold is added to it.
    A number stands for itself.
    """
    check_tensor(name, value)
    names = dims.split()
    shape = value.shape
    ok = len(shape) == len(names)
    if ok:
        for dim, size in zip(names, shape, strict=True):
            want = int(dim) if dim.isdigit() else known.get(dim)
            if want is not None and want != size:
                ok = False
    if not ok:
        fixed = [d for d in names if not d.isdigit() and d in known]
        if len(shape) == len(names):
            fixed = [d for d, s in zip(names, shape, strict=True) if d in fixed and known[d] != s]
        sizes = ", ".join(f"{d}={known[d]}" for d in dict.fromkeys(fixed))
        fail(name, f"must have shape [{', '.join(names)}]" + (f" with {sizes}" if sizes else ""), list(shape))
    for dim, size in zip(names, shape, strict=True):
        if not dim.isdigit():
            known.setdefault(dim, size)


def check_dtype(name: str, value: torch.Tensor, allowed: torch.dtype | Sequence[torch.dtype], why: str = "") -> None:
    """Check `value.dtype`; `why` says where the expectation comes from ("the dtype of `q`")."""
    choices = (allowed,) if isinstance(allowed, torch.dtype) else tuple(allowed)
    if value.dtype not in choices:
        fail(name, f"must have dtype {' or '.join(map(short, choices))}" + (f" ({why})" if why else ""), short(value.dtype))


def check_device(name: str, value: torch.Tensor, device: torch.device, of: str = "q") -> None:
    if value.device != device:
        fail(name, f"must be on {device}, the device of `{of}`", value.device)


def check_int(name: str, value: object, minimum: int) -> None:
    """An int (or a symbolic int under torch.compile), not a bool, at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(name, f"must be an int of at least {minimum}", f"{type(value).__name__} {value!r}")
    if value < minimum:
        fail(name, f"must be at least {minimum}", value)


def check_float(name: str, value: object, above: float | None = None, minimum: float | None = None) -> None:
    """A finite real number, greater than `above` and at least `minimum` where given."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        fail(name, "must be a number", f"{type(value).__name__} {value!r}")
    if above is not None and not value > above:
        fail(name, f"must be greater than {above}", value)
    if minimum is not None and not value >= minimum:
        fail(name, f"must be at least {minimum}", value)
    if not float("-inf") < value < float("inf"):
        fail(name, "must be finite", value)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        fail(name, "must be a bool", f"{type(value).__name__} {value!r}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    options = tuple(choices)
    if value not in options:
        fail(name, f"must be one of {', '.join(map(repr, options))}", repr(value))


def check_cu_seqlens(cu_seqlens: object, q: torch.Tensor, name: str = "q") -> None:
    """Packed sequences: `q`, the argument `name`, has batch size 1; `cu_seqlens` int32 or int64 [N+1] from 0 to T, not decreasing.

    The values are checked on CPU tensors only: on a GPU that would need a host synchronisation.
    """
    check_shape("cu_seqlens", cu_seqlens, "N+1", {})
    check_dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    check_device("cu_seqlens", cu_seqlens, q.device, name)
    if cu_seqlens.shape[0] < 2:
        fail("cu_seqlens", "must have at least 2 elements", cu_seqlens.shape[0])
    if q.shape[0] != 1:
        fail(name, "must have batch size 1 with `cu_seqlens`", q.shape[0], "Flatten the batch into T first")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        values = cu_seqlens.tolist()  # a CPU tensor: nothing to wait for
        if values[0] != 0 or values[-1] != q.shape[1] or any(a > b for a, b in pairwise(values)):
            fail("cu_seqlens", f"must rise from 0 to T={q.shape[1]} without decreasing", values)
