"""Forward of `rotary`: RMSNorm and rotation of q and k in one pass; v stays where it is."""

import triton
import triton.language as tl

from allmem_ops.ops.rotary.kernels.rows import (
    head_offsets,
    inverse_rms,
    load_halves,
    load_turn,
    program_place,
    rounded,
    store_halves,
    turned,
)


@triton.jit
def _turn(
    p_x,
    p_cos,
    p_sin,
    p_norm,
    p_y,
    i_s,
    i_h,
    T,
    slots,
    eps,
    s_x_t,
    s_x_h,
    s_x_d,
    s_cos_t,
    s_cos_d,
    s_sin_t,
    s_sin_d,
    s_norm,
    H: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Block i_h of the H heads of one kind: x [T, H, 2 W] -> y, contiguous."""
    o_h, o_w, m_hw = head_offsets(i_h, H, W, BH, BW)
    if p_norm is not None:
        b_w1, b_w2 = load_halves(p_norm + o_w * s_norm, o_w < W, W * s_norm)
    for i_t in tl.range(i_s * BT, T, slots * BT, num_stages=1):
        o_t = (tl.cast(i_t, tl.int64) + tl.arange(0, BT))[:, None, None]
        m_x = (o_t < T) & m_hw
        b_x1, b_x2 = load_halves(p_x + o_t * s_x_t + o_h * s_x_h + o_w * s_x_d, m_x, W * s_x_d)
        b_cos, b_sin = load_turn(p_cos, p_sin, o_t * s_cos_t + o_h * 0 + o_w * s_cos_d, o_t * s_sin_t + o_h * 0 + o_w * s_sin_d, m_x)
        if p_norm is not None:
            b_r = inverse_rms(b_x1, b_x2, eps, W)
            b_x1 = rounded(rounded(b_x1 * b_r, p_cos) * b_w1, p_cos)
            b_x2 = rounded(rounded(b_x2 * b_r, p_cos) * b_w2, p_cos)
        b_y1, b_y2 = turned(b_x1, b_x2, b_cos, b_sin, p_cos)
        store_halves(p_y + (o_t * H + o_h) * (2 * W) + o_w, b_y1, b_y2, m_x, W)


@triton.jit(do_not_specialize=["T", "slots", "eps"], do_not_specialize_on_alignment=["T", "slots"])
def rotary_fwd_kernel(
    p_x,
    p_cos,
    p_sin,
    p_q_norm,
    p_k_norm,
    p_q,
    p_k,
    T,
    slots,
    eps,
    s_x_b,
    s_x_t,
    s_x_h,
    s_x_d,
    s_cos_b,
    s_cos_t,
    s_cos_d,
    s_sin_b,
    s_sin_t,
    s_sin_d,
    s_q_norm,
    s_k_norm,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """A program takes BH heads of q or of k of every `slots`-th tile of BT tokens of one sequence. W is half a head."""
    Q_BLOCKS: tl.constexpr = (HQ + BH - 1) // BH
    K_BLOCKS: tl.constexpr = (HK + BH - 1) // BH
    i_b, i_s, i_h = program_place(slots, Q_BLOCKS + K_BLOCKS)
    p_x += i_b * s_x_b
    p_cos += i_b * s_cos_b
    p_sin += i_b * s_sin_b
    # fmt: off
    if i_h < Q_BLOCKS:
        _turn(p_x, p_cos, p_sin, p_q_norm, p_q + i_b * T * (HQ * 2 * W), i_s, i_h, T, slots, eps,
              s_x_t, s_x_h, s_x_d, s_cos_t, s_cos_d, s_sin_t, s_sin_d, s_q_norm, HQ, W, BT, BH, BW)
    else:
        _turn(p_x + HQ * s_x_h, p_cos, p_sin, p_k_norm, p_k + i_b * T * (HK * 2 * W), i_s, i_h - Q_BLOCKS, T, slots, eps,
              s_x_t, s_x_h, s_x_d, s_cos_t, s_cos_d, s_sin_t, s_sin_d, s_k_norm, HK, W, BT, BH, BW)
    # fmt: on
