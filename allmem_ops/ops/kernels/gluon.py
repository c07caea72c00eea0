"""Gluon operations under one name for Triton 3.6 to 3.9, which rename them, and one that 3.6 has no public name for.

tma_load(descriptor, coordinates, barrier, memory)     tma_store(descriptor, coordinates, memory)
tma_add(descriptor, coordinates, memory)               global += shared, without waiting
view(memory, dtype, shape, layout)                     the same shared memory as another type, shape and layout
"""

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma


@builtin
def _add(descriptor: Any, coordinates: Any, memory: Any, _semantic: Any = None) -> None:
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, memory.handle)


@builtin
def view(memory: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    shape = [_unwrap_if_constexpr(n) for n in _unwrap_if_constexpr(shape)]
    return _semantic.memdesc_reinterpret(memory, _unwrap_if_constexpr(dtype), shape, _unwrap_if_constexpr(layout))


# From Triton 3.7 on the old names are still there and only raise.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_add = getattr(tma, "async_atomic_add", None) or _add
