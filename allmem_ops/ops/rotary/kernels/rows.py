"""What forward and backward share: a program's place, and the halves, the norm and the weights of a tile [BT, BH, BW] of half heads."""

import triton
import triton.language as tl


@triton.jit
def program_place(slots, heads: tl.constexpr, BH: tl.constexpr):
    """(sequence, slot, block of heads): blocks run fastest, so that programs side by side read a token's cos and sin together."""
    BLOCKS: tl.constexpr = (heads + BH - 1) // BH
    i_p = tl.program_id(0)
    return tl.cast(i_p // BLOCKS // slots, tl.int64), i_p // BLOCKS % slots, i_p % BLOCKS


@triton.jit
def load_halves(p_x, m_x, half):
    """The first and the second halves of heads in float32; `half` is the distance between them."""
    return tl.load(p_x, mask=m_x, other=0.0).to(tl.float32), tl.load(p_x + half, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(b_x1, b_x2, eps, W: tl.constexpr):
    # [BT, BH, BW] -> [BT, BH, 1]; channels past W are 0
    return tl.rsqrt(tl.sum(b_x1 * b_x1 + b_x2 * b_x2, 2) / (2 * W) + eps)[:, :, None]


@triton.jit
def load_weights(p_q_norm, p_k_norm, s_q, s_k, m_q, o_w, W: tl.constexpr):
    """Halves [1, BH, BW] of the norms' weights: those of q in rows of q, else those of k."""
    m_w = o_w < W
    b_q1, b_q2 = load_halves(p_q_norm + o_w * s_q, m_w, W * s_q)
    b_k1, b_k2 = load_halves(p_k_norm + o_w * s_k, m_w, W * s_k)
    return tl.where(m_q, b_q1, b_k1), tl.where(m_q, b_q2, b_k2)
