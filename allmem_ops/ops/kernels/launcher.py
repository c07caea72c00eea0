"""Launches that do not pay for Triton's argument binding a second time.

Binding the 25 arguments of the Hopper `swa` forward, six of them tensor descriptors, takes 130 us of host time a call, where the kernel
itself takes 94 us at T = 8192 (Triton 3.6; host time measured with a stand-in for the driver). The launch code knows what a kernel is
compiled for, so it keeps the compiled kernel under that key and hands the arguments to it as they are: 9 us, of which a third were
for the launch hooks of profilers (Triton 3.6): they are called where there are any.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

_compiled: dict[Hashable, tuple[Any, Any]] = {}


Grid = int | tuple[int, int, int]


def launch(kernel: Any, key: Hashable, device: torch.device, programs: Grid, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Run `kernel` with `programs` programs on `device`.

    Args:
        kernel: of `triton.jit` or `gluon.jit`.
        key: everything that Triton compiles a kernel anew for: dtypes, constexpr arguments, which arguments are None, and for those
            that it may specialise whether they are 1 or divisible by 16 (`pointer_class`, `stride_class`).
        args: every argument of the kernel in order, constexpr ones too.
        options: `num_warps`, `num_stages`, `maxnreg`, `launch_pdl`.

    Returns:
        The compiled kernel, None where `device` is not the current GPU.
    """
    grid = programs if isinstance(programs, tuple) else (programs, 1, 1)
    if device.type != "cuda":  # the interpreter, or a compilation for a GPU that is not there
        kernel[grid](*args, **options)
        return None
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, key, device, programs, args, options)
        return None
    full = id(kernel), device.index, key
    found = _compiled.get(full)
    if found is None:
        found = _compiled[full] = kernel[grid](*args, **options), kernel  # the kernel is held, so that its id stays its own
    else:
        # For a tensor the driver is asked whose memory it is, which the first launch has shown; its address is taken as it is.
        addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in args]
        if hooked():
            found[0][grid](*addresses)
        else:
            start(found[0], grid, current_stream(device), addresses)
    return found[0]


def hooked() -> bool:
    """Whether somebody wants to hear of launches."""
    return any(getattr(hook, "calls", hook) for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook))


def current_stream(device: torch.device) -> int:
    return driver.active.get_current_stream(device.index)


def start(compiled: Any, grid: tuple[int, int, int], stream: int, addresses: Sequence[Any]) -> None:
    """Launch a kernel that has been launched before, on the current device; no hook is called."""
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses)


def launch_plain(kernel: Any, device: torch.device, programs: Grid, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """`launch` for a kernel of plain pointers and numbers, whose key the arguments themselves give."""
    launch(kernel, plain_key(kernel, device, args, options), device, programs, args, options)


def plain_key(kernel: Any, device: torch.device, args: Sequence[Any], options: Mapping[str, Any]) -> Hashable:
    """The key of such a kernel's launch; on a CPU none is needed."""
    return tuple(map(_argument_class, kernel.params, args)) + tuple(options.values()) if device.type == "cuda" else None


def _argument_class(parameter: Any, value: Any) -> Hashable:
    """What Triton compiles anew for in an argument. Unspecialised numbers are of one class, as long as they fit into 32 bits."""
    if value is None or parameter.is_constexpr:
        return value
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "float"
    wide = not -(2**31) <= value < 2**31
    return wide if parameter.do_not_specialize else (wide, value == 1, value % 16 == 0)


def pointer_class(x: Tensor | None) -> Hashable:
    """What Triton compiles anew for in a pointer."""
    return None if x is None else (x.dtype, x.data_ptr() % 16 == 0)


def stride_class(x: Tensor | None) -> Hashable:
    """What Triton compiles anew for in the strides of [..., D]; all but the last are int64 arguments."""
    if x is None:
        return None
    *outer, last = x.stride()
    return tuple([s % 16 == 0 for s in outer]), last if last == 1 else (last % 16 == 0, last < 2**31)


def unchecked(descriptor: type, **fields: Any) -> Any:
    """A tensor descriptor without its constructor's checks, which take 5 us each; the caller has made them."""
    x = object.__new__(descriptor)
    x.__dict__.update(fields)  # fields that are not given have their defaults in the class
    return x
