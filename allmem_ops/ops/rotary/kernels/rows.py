"""What forward and backward share: a program's place, and the halves and the norm of a tile [BT, BH, BW] of half heads."""

import triton
import triton.language as tl


@triton.jit
def program_place(slots, BLOCKS: tl.constexpr):
    """(sequence, slot, block of heads): blocks run fastest, so that programs side by side read a token's cos and sin together."""
    i_p = tl.program_id(0)
    return tl.cast(i_p // BLOCKS // slots, tl.int64), i_p // BLOCKS % slots, i_p % BLOCKS


@triton.jit
def head_offsets(i_h, H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """(o_h [1, BH, 1], o_w [1, 1, BW], their mask) of block i_h of H heads."""
    o_h = (i_h * BH + tl.cast(tl.arange(0, BH), tl.int64))[None, :, None]
    o_w = tl.cast(tl.arange(0, BW), tl.int64)[None, None, :]
    return o_h, o_w, (o_h < H) & (o_w < W)


@triton.jit
def load_halves(p_x, m_x, half):
    """The first and the second halves of heads in float32; `half` is the distance between them."""
    return tl.load(p_x, mask=m_x, other=0.0).to(tl.float32), tl.load(p_x + half, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def store_halves(p_y, b_y1, b_y2, m_y, W: tl.constexpr):
    tl.store(p_y, b_y1.to(p_y.dtype.element_ty), mask=m_y)
    tl.store(p_y + W, b_y2.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def rounded(b_x, p_table):
    """`b_x` as the dtype of cos and sin holds it, in float32."""
    if p_table.dtype.element_ty != tl.float32:
        b_x = b_x.to(p_table.dtype.element_ty).to(tl.float32)
    return b_x


@triton.jit
def turned(b_x1, b_x2, b_cos, b_sin, p_table):
    """[x1 cos - x2 sin, x2 cos + x1 sin], each product rounded to the dtype of cos and sin."""
    b_y1 = rounded(b_x1 * b_cos, p_table) - rounded(b_x2 * b_sin, p_table)
    b_y2 = rounded(b_x2 * b_cos, p_table) + rounded(b_x1 * b_sin, p_table)
    return b_y1, b_y2


@triton.jit
def load_turn(p_cos, p_sin, o_cos, o_sin, m_x):
    """cos and sin for each head of a tile (from the L1): for one row a token Triton would pass the whole tile through shared memory."""
    return tl.load(p_cos + o_cos, mask=m_x, other=0.0).to(tl.float32), tl.load(p_sin + o_sin, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(b_x1, b_x2, eps, W: tl.constexpr):
    # [BT, BH, BW] -> [BT, BH, 1]; channels past W are 0
    return tl.rsqrt(tl.sum(b_x1 * b_x1 + b_x2 * b_x2, 2) / (2 * W) + eps)[:, :, None]
