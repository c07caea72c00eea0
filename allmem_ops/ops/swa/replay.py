"""Calls like one before: the same launches with other addresses, without working out again what they are.

A backward at T = 8192 and window 512 takes 0.3 ms on an H100. Sizes, grids, keys and nine tensor descriptors took 0.13 ms of a host's time
(measured), and a training run calls with few shapes over and over.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allmem_ops.ops.kernels.launcher import Grid, current_stream, hooked, launch, start

_MOST = 256  # replays that are kept; beyond that all are forgotten
_ALIGNED = 256  # bytes that a piece of the workspace starts at a multiple of
_replays: dict[Hashable, "_Replay"] = {}


class _Address:
    """Stands for a tensor in a descriptor, which is asked for its address alone."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Launch(NamedTuple):
    """A launch: its arguments but those that have an address; which of a call's addresses these get, and what else a descriptor has."""

    compiled: Any
    grid: Grid
    args: Sequence[Any]
    pointers: Sequence[tuple[int, int]]
    descriptors: Sequence[tuple[int, int, type, Mapping[str, Any]]]


class _Replay(NamedTuple):
    """What a call made and launched. Addresses are those of its inputs, its results, and its pieces of one workspace, in this order."""

    device: torch.device
    results: Sequence[tuple[torch.Size, torch.dtype]]
    offsets: Sequence[int]
    size: int
    zeros: Sequence[slice]
    launches: Sequence[_Launch]


class Recorder:
    """Makes and launches what a call needs, and can write it down for the next one like it.

    Args:
        inputs: the call's tensors, which the next call brings its own of.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.inputs = inputs
        self.results: list[Tensor] = []
        self.work: list[tuple[Tensor, bool]] = []
        self.launches: list[tuple[Any, Grid, Sequence[Any]]] = []

    def result(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor that the call returns."""
        self.results.append(torch.empty(shape, dtype=dtype, device=device))
        return self.results[-1]

    def workspace(self, *shape: int, dtype: torch.dtype, device: torch.device, zero: bool = False) -> Tensor:
        """A contiguous tensor that only the call's kernels see; `zero`: they count on zeros in it."""
        x = torch.zeros(shape, dtype=dtype, device=device) if zero else torch.empty(shape, dtype=dtype, device=device)
        self.work.append((x, zero))
        return x

    def launch(
        self, kernel: Any, key: Hashable, device: torch.device, programs: int, args: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        """As `launcher.launch`."""
        self.launches.append((launch(kernel, key, device, programs, args, options), (programs, 1, 1), args))

    def file(self, key: Hashable) -> None:
        """Keep the call for others with this key, if all of it can be done again."""
        tensors = [*self.inputs, *self.results, *(x for x, _ in self.work)]
        place = {id(x): i for i, x in enumerate(tensors) if x is not None}
        if len(place) + sum(x is None for x in tensors) < len(tensors):
            return  # one tensor as two inputs: which of them a kernel got can't be told
        launches = []
        for compiled, grid, args in self.launches:
            if compiled is None:
                return
            bases = [(i, x if isinstance(x, Tensor) else getattr(x, "base", None)) for i, x in enumerate(args)]
            if any(base is not None and id(base) not in place for _, base in bases):
                return  # a copy of an input
            pointers = [(i, place[id(x)]) for i, x in bases if x is not None and args[i] is x]
            descriptors = [
                (i, place[id(x)], type(args[i]), {**vars(args[i]), "base": None}) for i, x in bases if x is not None and args[i] is not x
            ]
            rest = [x if base is None else None for x, (_, base) in zip(args, bases, strict=True)]
            launches.append(_Launch(compiled, grid, rest, pointers, descriptors))
        offsets, zeros, size = [], [], 0
        for x, zero in self.work:
            offsets.append(size)
            if zero:
                zeros.append(slice(size, size + x.nbytes))
            size += -(-x.nbytes // _ALIGNED) * _ALIGNED
        if len(_replays) >= _MOST:
            _replays.clear()
        results = [(x.shape, x.dtype) for x in self.results]
        _replays[key] = _Replay(self.results[0].device, results, offsets, size, zeros, launches)


def traits(inputs: Sequence[Tensor | None], *others: Hashable) -> Hashable:
    """A key of calls that launch the same: all but addresses."""
    return (*[None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in inputs], *others)


def replay(key: Hashable, inputs: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The results of a call like one before; None, and nothing done, where it has to be worked out.

    That is also where a kernel would have to be another (inputs that are not aligned), or is listened to.
    """
    found = _replays.get(key)
    if found is None:
        return None
    addresses, bits = [], 0
    for x in inputs:
        address = None if x is None else x.data_ptr()
        addresses.append(address)
        bits |= address or 0
    device = found.device
    if bits & 15 or device.index != torch.cuda.current_device() or hooked():
        return None
    results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in found.results]
    addresses.extend([x.data_ptr() for x in results])
    workspace = torch.empty(found.size, dtype=torch.uint8, device=device)
    first = workspace.data_ptr()
    addresses.extend([first + offset for offset in found.offsets])
    for zeros in found.zeros:
        workspace[zeros].zero_()
    stream = current_stream(device)
    for compiled, grid, rest, pointers, descriptors in found.launches:
        args = list(rest)
        for i, at in pointers:
            args[i] = addresses[at]
        for i, at, kind, fields in descriptors:
            args[i] = x = object.__new__(kind)
            x.__dict__.update(fields)
            x.base = _Address(addresses[at])
        start(compiled, grid, stream, args)
    return results
