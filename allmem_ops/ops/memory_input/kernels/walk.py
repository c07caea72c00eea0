"""What forward and backward share: a program's place, the inputs before a token, the taps, a head's norms.

A program walks through `span` tokens of one sequence batch for BR heads of q, of k or of v, forward four tokens a step and backward two.
Each input is read once, a step before its tokens' turn, and stays in registers for the taps of the next three tokens. More than one
token a step: their reductions hide each other's latency, and fewer registers change their names at its end. Backward, four were as many
instructions as do not stay in the instruction cache, and more registers.
"""

import triton
import triton.language as tl


@triton.jit
def program_place(i, spans, H: tl.constexpr, BR: tl.constexpr):
    """(batch row, span, 0 q | 1 k | 2 v, block of heads) of program i: programs that share tokens are neighbours."""
    NB: tl.constexpr = (H + BR - 1) // BR
    i_block = i % NB
    i_kind = i // NB % 3
    i = i // (3 * NB)
    return tl.cast(i // spans, tl.int64), i % spans, i_kind, i_block


@triton.jit
def times(stride, UNIT: tl.constexpr):
    """A stride that came in units of UNIT elements, int64. Triton takes a number that is not a multiple of 16 for one of 1; a row of the
    projection is often 8 more (a multiple of 16 bytes), which the product shows: without it every load is of one element.
    """
    return tl.cast(stride, tl.int64) * UNIT


@triton.jit
def below(m_x, a, b):
    """`m_x` where a < b, two scalars. As [1, 1]: the interpreter makes an integer of a mask that meets a scalar condition."""
    return m_x & (tl.zeros([1, 1], tl.int32) + a < b)


@triton.jit
def load_pair(p_x, s_t, i_t, end, m_x):
    """[BR, BW] each, as stored: the tiles at token i_t, where p_x points, and at the next; zeros from `end` on."""
    b_x = tl.load(p_x, mask=below(m_x, i_t, end), other=0.0)
    b_x1 = tl.load(p_x + s_t, mask=below(m_x, i_t + 1, end), other=0.0)
    return b_x, b_x1


@triton.jit
def sigmoid(b_c, FAST: tl.constexpr):
    """FAST: four instructions, where `tl.sigmoid` takes twelve (range checks of exponential and division), off by as little. The
    interpreter knows no PTX.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [b_c], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.sigmoid(b_c)


@triton.jit
def load_taps(p_taps, o_c, m_x, TAPS: tl.constexpr):
    """[BR, BW] fp32 each: the taps of the token itself and of one, two and three before it; absent ones are not used."""
    b_w = tl.load(p_taps + o_c * TAPS + (TAPS - 1), mask=m_x, other=0.0).to(tl.float32)
    b_w1, b_w2, b_w3 = b_w, b_w, b_w
    if TAPS > 1:
        b_w1 = tl.load(p_taps + o_c * TAPS + (TAPS - 2), mask=m_x, other=0.0).to(tl.float32)
    if TAPS > 2:
        b_w2 = tl.load(p_taps + o_c * TAPS + (TAPS - 3), mask=m_x, other=0.0).to(tl.float32)
    if TAPS > 3:
        b_w3 = tl.load(p_taps + o_c * TAPS + (TAPS - 4), mask=m_x, other=0.0).to(tl.float32)
    return b_w, b_w1, b_w2, b_w3


@triton.jit
def token_place(i_b, i_t, end, p_tail, p_sequence, p_position, ROW: tl.constexpr):
    """Where token i_t stands in its sequence, and the offset of the sequence's row in the tails, ROW elements each. Without p_position
    batch row i_b is one sequence.
    """
    position, sequence = i_t, i_b
    if p_position is not None:
        position = tl.load(p_position + i_t, mask=i_t < end, other=0)
        if p_tail is not None:
            sequence = tl.cast(tl.load(p_sequence + i_t, mask=i_t < end, other=0), tl.int64)
    return position, sequence * ROW


@triton.jit
def earlier(p_x, s_t, p_tail, o_tail, i_t, position, m_x, j: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr):
    """[BR, BW] fp32: the input j tokens before token i_t, the `position`-th of its sequence: the tail's, or zero, before the first."""
    b_x = tl.zeros(m_x.shape, dtype=tl.float32)
    if j < TAPS:
        b_x = tl.load(p_x + tl.cast(i_t - j, tl.int64) * s_t, mask=below(m_x, j - 1, position), other=0.0).to(tl.float32)
        if p_tail is not None:
            b_x += tl.load(p_tail + o_tail + (TAPS - 1 + position - j) * C, mask=below(m_x, position, j), other=0.0).to(tl.float32)
    return b_x


@triton.jit
def within(b_x, p_tail, o_tail, position, m_x, j: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr):
    """`b_x`, the input j tokens back, where that is in the same packed sequence; else the tail's, or zero."""
    if j < TAPS:
        b_x = tl.where(position >= j, b_x, 0.0)
        if p_tail is not None:
            b_x += tl.load(p_tail + o_tail + (TAPS - 1 + position - j) * C, mask=below(m_x, position, j), other=0.0).to(tl.float32)
    return b_x


@triton.jit
def convolved(b_x, b_x1, b_x2, b_x3, b_w, b_w1, b_w2, b_w3, TAPS: tl.constexpr):
    b_c = b_x * b_w
    if TAPS > 1:
        b_c += b_x1 * b_w1
    if TAPS > 2:
        b_c += b_x2 * b_w2
    if TAPS > 3:
        b_c += b_x3 * b_w3
    return b_c


@triton.jit
def norm_factors(b_y, b_z, rms_eps, l2_eps, W: tl.constexpr, RMS: tl.constexpr, L2: tl.constexpr):
    """(r, l) [BR, 1]: rmsnorm(y) = y r weight and l2norm(rmsnorm(y)) = y r weight l, with z = y weight.

    The second norm's sum is that of z, times r squared: so both sums run side by side.
    """
    b_r = tl.full([b_y.shape[0], 1], 1.0, tl.float32)
    b_l = b_r
    if RMS:
        b_r = tl.rsqrt(tl.sum(b_y * b_y, 1) / W + rms_eps)[:, None]
    if L2:
        b_l = tl.rsqrt(tl.sum(b_z * b_z, 1)[:, None] * (b_r * b_r) + l2_eps)
    return b_r, b_l
