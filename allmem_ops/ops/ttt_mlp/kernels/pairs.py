"""Two matrices side by side, their hidden units interleaved: one dot in the place of two, and the halves part without moving data.

A pair [.., 2 * units] holds unit i of its first matrix in column 2i and of its second in column 2i + 1. In the accumulator of a
tensor core instruction these lie in two registers of one thread, so `part` and `pair` cost nothing. Compiled for sm_90, the second
order of a 64-token, 32-unit tile at d = 128: 40 wgmma instead of 72, no spills instead of 300 bytes.
"""

import triton
import triton.language as tl


@triton.jit
def part(b):
    """The two halves [R, C] of a pair [R, 2C]."""
    return tl.split(tl.reshape(b, (b.shape[0], b.shape[1] // 2, 2)))


@triton.jit
def pair(b_first, b_second):
    """The pair [R, 2C] of two halves [R, C]."""
    return tl.reshape(tl.join(b_first, b_second), (b_first.shape[0], 2 * b_first.shape[1]))


@triton.jit
def load_operand(p, row, i_h, o_d, D: tl.constexpr, HID: tl.constexpr, BH: tl.constexpr, WIDE: tl.constexpr):
    """Columns of hidden units [i_h, i_h + BH) of row `row` of [.., d, WIDE * h]; WIDE = 2 for a pair.

    `.cg`: another program may have written it in this launch.
    """
    o_h = WIDE * i_h + tl.arange(0, WIDE * BH)
    at = p + tl.cast(row, tl.int64) * (D * WIDE * HID) + (o_d[:, None] * (WIDE * HID) + o_h[None, :])
    return tl.load(at, mask=(o_d < D)[:, None] & (o_h < WIDE * HID)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def store_operand(p, row, i_h, o_d, m_d, b, D: tl.constexpr, HID: tl.constexpr, BH: tl.constexpr, WIDE: tl.constexpr):
    """The reverse of `load_operand` for rows `o_d`, in the dtype of `p`."""
    o_h = WIDE * i_h + tl.arange(0, WIDE * BH)
    at = p + tl.cast(row, tl.int64) * (D * WIDE * HID) + (o_d[:, None] * (WIDE * HID) + o_h[None, :])
    tl.store(at, tl.cast(b, p.dtype.element_ty), mask=m_d[:, None] & (o_h < WIDE * HID)[None, :])


@triton.jit
def token_mask(m_t, o_d, D: tl.constexpr):
    """The tokens' mask over their channels."""
    if o_d.shape[0] == D:
        return tl.broadcast_to(m_t[:, None], (m_t.shape[0], D))
    else:
        return m_t[:, None] & (o_d < D)[None, :]


@triton.jit
def operand(b, dtype: tl.constexpr, PREC: tl.constexpr):
    """A tile as a dot takes it. tf32 is cut off in the instruction, a bias that would add up; here it is rounded to the nearest first.

    (The rounding also keeps Triton 3.6 from carrying a pair's reshape into shared memory, where tf32 has no layout for it; for float32 on
    sm_100 adding zero does: Triton 3.6 and 3.7 abort with "Illegal shared layout" there.)
    """
    if PREC == "tf32":
        bits = tl.cast(b, tl.int32, bitcast=True)
        return tl.cast((bits + 0x1000) & -0x2000, tl.float32, bitcast=True)
    elif dtype == tl.float32:
        return tl.cast(b, dtype) + 0.0
    else:
        return tl.cast(b, dtype)


@triton.jit
def prefetch_lines(p, FAST: tl.constexpr):
    """Bring the lines that a tile of pointers points into to the L2 cache. FAST: as in `prefetch`."""
    if FAST:
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch(p, stride, first, rows, D: tl.constexpr, BT: tl.constexpr, FAST: tl.constexpr):
    """Bring BT rows of 2-byte channels, from `first` on, of the `rows` at `p` into the L2 cache. FAST: the interpreter knows no PTX."""
    if FAST:
        o_t = tl.cast(tl.minimum(first + tl.arange(0, BT), tl.maximum(rows - 1, 0)), tl.int64) * stride
        for i_d in tl.static_range(0, D, 64):
            prefetch_lines(p + o_t + i_d, FAST)


@triton.jit
def silu(b_a, FAST: tl.constexpr):
    """SiLU(A), its first and its second slope. FAST: the reciprocal in one instruction, off by one unit in the last place."""
    t = -1.4426950408889634 * b_a
    e = tl.exp2(t)
    if FAST:
        b_s = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1)
    else:
        # what rounding t has cost, and log2(e) beyond float32; float32's budget is that of a correct exponential
        rest = tl.fma(b_a, -1.4426950408889634, -t) + b_a * -1.925963033500011e-08
        b_s = tl.div_rn(1.0, 1.0 + tl.where(e < float("inf"), e + e * (0.6931471805599453 * rest), e))
    rest = 1.0 - b_s
    b_silu = b_a * b_s
    b_slope = b_s + b_silu * rest
    # s (1 - s) (2 + A (1 - 2 s))
    return b_silu, b_slope, rest * (2.0 * b_slope - b_silu)
