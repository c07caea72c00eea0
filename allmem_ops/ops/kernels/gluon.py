"""Gluon operations under one name for Triton 3.6 to 3.9, which rename them, and one that 3.6 has no public name for.

tma_load(descriptor, coordinates, barrier, memory)     tma_store(descriptor, coordinates, memory)
tma_add(descriptor, coordinates, memory)               global += shared, without waiting
view(memory, dtype, shape, layout)                     the same shared memory as another type, shape and layout
exp2(x, eighths)                                       2**x for finite or very negative float32 x, a part of it without the slow unit
"""

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
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


def _exp2_assembly(eighths: int) -> str:
    """2**x of eight numbers; of the first `eighths` as 2**i * 2**f with i the nearest integer and a polynomial of f.

    An SM takes 16 exponentials a cycle, and 128 operations of any other kind. Degree 3, relative error 7.5e-5 (half precision rounds
    by 5e-4 or more); below 2**-126 the result is 2**-126. A NaN gives an infinity or a NaN.
    """
    lines = ["{ .reg .b32 i; .reg .f32 f, p;"]
    for n in range(8):
        y, x = f"${n}", f"${n + 8}"
        if n >= eighths:
            lines.append(f"ex2.approx.ftz.f32 {y}, {x};")
            continue
        lines += [
            f"max.NaN.f32 f, {x}, 0fC2FC0000;",  # -126
            "add.rn.f32 p, f, 0f4B400000;",  # 1.5 * 2**23: the integer is in the low bits
            "mov.b32 i, p;",
            "add.rn.f32 p, p, 0fCB400000;",
            "sub.rn.f32 f, f, p;",
            "fma.rn.f32 p, f, 0f3D61FB34, 0f3E786ED4;",
            "fma.rn.f32 p, p, f, 0f3F31798D;",
            "fma.rn.f32 p, p, f, 0f3F7FFB4A;",
            "shl.b32 i, i, 23;",
            f"{{ .reg .b32 a; mov.b32 a, p; add.s32 a, a, i; mov.b32 {y}, a; }}",
        ]
    return "\n".join([*lines, "}"])


@builtin
def exp2(x: Any, eighths: Any, _semantic: Any = None) -> Any:
    eighths = _unwrap_if_constexpr(eighths)
    if not eighths:
        return gl.exp2(x, _semantic=_semantic)
    return gl.inline_asm_elementwise(
        _exp2_assembly(eighths), ",".join(["=f"] * 8 + ["f"] * 8), [x], dtype=gl.float32, is_pure=True, pack=8, _semantic=_semantic
    )


# From Triton 3.7 on the old names are still there and only raise.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_add = getattr(tma, "async_atomic_add", None) or _add
