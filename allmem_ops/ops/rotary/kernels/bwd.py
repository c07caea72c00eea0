"""Backward of `rotary`: the whole projection's gradient in one pass over each tensor, sums over tokens in a fixed order."""

import triton
import triton.language as tl

from allmem_ops.ops.kernels.sums import column_sums
from allmem_ops.ops.rotary.kernels.rows import head_offsets, inverse_rms, load_halves, load_turn, program_place, store_halves, turned


@triton.jit
def _turn_back(
    p_dy,
    p_x,
    p_cos,
    p_sin,
    p_norm,
    p_dx,
    p_sums,
    o_x,
    i_row,
    i_s,
    i_h,
    T,
    slots,
    eps,
    s_dy_t,
    s_dy_h,
    s_dy_d,
    s_x_t,
    s_x_h,
    s_x_d,
    s_cos_t,
    s_cos_d,
    s_sin_t,
    s_sin_d,
    s_norm,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Block i_h of the H heads of one kind, which begin at x + o_x: dy -> their rows of dx [T, HEADS, 2 W], contiguous.

    A part of dweight's halves [2, BW] goes into row i_row of p_sums.
    """
    o_h, o_w, m_hw = head_offsets(i_h, H, W, BH, BW)
    if p_norm is not None:
        b_w1, b_w2 = load_halves(p_norm + o_w * s_norm, o_w < W, W * s_norm)
        b_sum1 = tl.zeros([BT, BH, BW], dtype=tl.float32)
        b_sum2 = tl.zeros([BT, BH, BW], dtype=tl.float32)
    for i_t in tl.range(i_s * BT, T, slots * BT, num_stages=1):
        o_t = (tl.cast(i_t, tl.int64) + tl.arange(0, BT))[:, None, None]
        m_x = (o_t < T) & m_hw
        b_dy1, b_dy2 = load_halves(p_dy + o_t * s_dy_t + o_h * s_dy_h + o_w * s_dy_d, m_x, W * s_dy_d)
        b_cos, b_sin = load_turn(p_cos, p_sin, o_t * s_cos_t + o_h * 0 + o_w * s_cos_d, o_t * s_sin_t + o_h * 0 + o_w * s_sin_d, m_x)
        b_dx1, b_dx2 = turned(b_dy1, b_dy2, b_cos, -b_sin, p_cos)
        if p_norm is not None:
            b_n1, b_n2 = load_halves(p_x + o_x + o_t * s_x_t + o_h * s_x_h + o_w * s_x_d, m_x, W * s_x_d)
            b_r = inverse_rms(b_n1, b_n2, eps, W)
            b_n1 *= b_r
            b_n2 *= b_r
            b_sum1 += b_dx1 * b_n1
            b_sum2 += b_dx2 * b_n2
            b_dx1 *= b_w1
            b_dx2 *= b_w2
            b_mean = tl.sum(b_dx1 * b_n1 + b_dx2 * b_n2, 2)[:, :, None] / (2 * W)
            b_dx1 = b_r * (b_dx1 - b_n1 * b_mean)
            b_dx2 = b_r * (b_dx2 - b_n2 * b_mean)
        store_halves(p_dx + (o_t * HEADS + o_h) * (2 * W) + o_w, b_dx1, b_dx2, m_x, W)
    if p_norm is not None:
        p_row = p_sums + i_row * (2 * BW) + tl.arange(0, BW)
        tl.store(p_row, tl.sum(tl.sum(b_sum1, 0), 0))
        tl.store(p_row + BW, tl.sum(tl.sum(b_sum2, 0), 0))


@triton.jit
def _copy(
    p_dy,
    p_dx,
    i_s,
    i_h,
    T,
    slots,
    s_dy_t,
    s_dy_h,
    s_dy_d,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    o_h, o_w, m_hw = head_offsets(i_h, H, W, BH, BW)
    for i_t in tl.range(i_s * BT, T, slots * BT, num_stages=1):
        o_t = (tl.cast(i_t, tl.int64) + tl.arange(0, BT))[:, None, None]
        m_x = (o_t < T) & m_hw
        b_dy1, b_dy2 = load_halves(p_dy + o_t * s_dy_t + o_h * s_dy_h + o_w * s_dy_d, m_x, W * s_dy_d)
        store_halves(p_dx + (o_t * HEADS + o_h) * (2 * W) + o_w, b_dy1, b_dy2, m_x, W)


@triton.jit(do_not_specialize=["T", "slots", "groups", "eps"], do_not_specialize_on_alignment=["T", "slots", "groups"])
def rotary_bwd_kernel(
    p_dq,
    p_dk,
    p_dv,
    p_x,
    p_cos,
    p_sin,
    p_q_norm,
    p_k_norm,
    p_dx,
    p_sums,
    T,
    slots,
    groups,
    eps,
    s_dq_b,
    s_dq_t,
    s_dq_h,
    s_dq_d,
    s_dk_b,
    s_dk_t,
    s_dk_h,
    s_dk_d,
    s_dv_b,
    s_dv_t,
    s_dv_h,
    s_dv_d,
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
    """As the forward, and after the blocks of k those of v, which are copied.

    p_sums fp32: parts of dq_norm [groups * blocks of q, 2, BW], then those of dk_norm; groups = sequences * slots.
    """
    HEADS: tl.constexpr = HQ + 2 * HK
    Q_BLOCKS: tl.constexpr = (HQ + BH - 1) // BH
    K_BLOCKS: tl.constexpr = (HK + BH - 1) // BH
    i_b, i_s, i_h = program_place(slots, Q_BLOCKS + 2 * K_BLOCKS)
    o_x = i_b * s_x_b
    p_cos += i_b * s_cos_b
    p_sin += i_b * s_sin_b
    p_dx += i_b * T * (HEADS * 2 * W)
    i_g = i_b * slots + i_s
    # fmt: off
    if i_h < Q_BLOCKS:
        _turn_back(p_dq + i_b * s_dq_b, p_x, p_cos, p_sin, p_q_norm, p_dx, p_sums, o_x, i_g * Q_BLOCKS + i_h,
                   i_s, i_h, T, slots, eps, s_dq_t, s_dq_h, s_dq_d, s_x_t, s_x_h, s_x_d, s_cos_t, s_cos_d, s_sin_t, s_sin_d, s_q_norm,
                   HQ, HEADS, W, BT, BH, BW)
    elif i_h < Q_BLOCKS + K_BLOCKS:
        i_k = i_h - Q_BLOCKS
        _turn_back(p_dk + i_b * s_dk_b, p_x, p_cos, p_sin, p_k_norm, p_dx + HQ * 2 * W,
                   p_sums, o_x + HQ * s_x_h, groups * Q_BLOCKS + i_g * K_BLOCKS + i_k,
                   i_s, i_k, T, slots, eps, s_dk_t, s_dk_h, s_dk_d, s_x_t, s_x_h, s_x_d, s_cos_t, s_cos_d, s_sin_t, s_sin_d, s_k_norm,
                   HK, HEADS, W, BT, BH, BW)
    else:
        _copy(p_dv + i_b * s_dv_b, p_dx + (HQ + HK) * 2 * W, i_s, i_h - (Q_BLOCKS + K_BLOCKS), T, slots, s_dv_t, s_dv_h, s_dv_d,
              HK, HEADS, W, BT, BH, BW)
    # fmt: on


@triton.jit
def _sum(p_sums, p_dnorm, rows, i_c, W: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    o_c, b_sum = column_sums(p_sums, rows, 2 * BW, i_c, BN, BC)
    o_w = o_c % BW
    tl.store(p_dnorm + o_c // BW * W + o_w, b_sum.to(p_dnorm.dtype.element_ty), mask=(o_c < 2 * BW) & (o_w < W))


@triton.jit(do_not_specialize=["q_rows", "k_rows"], do_not_specialize_on_alignment=["q_rows", "k_rows"])
def rotary_bwd_sums_kernel(
    p_sums, p_dq_norm, p_dk_norm, q_rows, k_rows, W: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """dq_norm and dk_norm [2 W] from the programs' parts, fp32 [q_rows + k_rows, 2, BW]: a program sums BC columns of one of them."""
    i_c = tl.program_id(0)
    COLUMNS: tl.constexpr = (2 * BW + BC - 1) // BC
    if i_c < COLUMNS:
        _sum(p_sums, p_dq_norm, q_rows, i_c, W, BW, BN, BC)
    if p_dk_norm is not None:
        if i_c >= COLUMNS:
            _sum(p_sums + tl.cast(q_rows, tl.int64) * (2 * BW), p_dk_norm, k_rows, i_c - COLUMNS, W, BW, BN, BC)
