"""Backward of `rotary`: the whole projection's gradient in one pass over each tensor, sums over tokens in a fixed order."""

import triton
import triton.language as tl

from allmem_ops.ops.kernels.sums import column_sums
from allmem_ops.ops.rotary.kernels.rows import inverse_rms, load_halves, load_weights, program_place


@triton.jit(do_not_specialize=["T", "slots", "eps"], do_not_specialize_on_alignment=["T", "slots"])
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
    STAGES: tl.constexpr,
):
    """As the forward, with the heads of v after those of k, which are copied.

    p_sums fp32 [programs, 4, BW]: a program's part of the gradients of q_norm's halves and of k_norm's.
    """
    i_b, i_s, i_h = program_place(slots, HQ + 2 * HK, BH)
    o_h = (i_h * BH + tl.cast(tl.arange(0, BH), tl.int64))[None, :, None]
    o_w = tl.cast(tl.arange(0, BW), tl.int64)[None, None, :]
    m_w = o_w < W
    m_hw = (o_h < HQ + 2 * HK) & m_w
    m_q = o_h < HQ
    m_k = (o_h >= HQ) & (o_h < HQ + HK)
    m_v = o_h >= HQ + HK
    p_dq += i_b * s_dq_b
    p_dk += i_b * s_dk_b
    p_dv += i_b * s_dv_b
    p_cos += i_b * s_cos_b
    p_sin += i_b * s_sin_b
    p_dx += i_b * T * (HQ + 2 * HK) * 2 * W
    if p_q_norm is not None:
        p_x += i_b * s_x_b
        b_w1, b_w2 = load_weights(p_q_norm, p_k_norm, s_q_norm, s_k_norm, m_q, o_w, W)
        b_sum1 = tl.zeros([BT, BH, BW], dtype=tl.float32)
        b_sum2 = tl.zeros([BT, BH, BW], dtype=tl.float32)

    for i_t in tl.range(i_s * BT, T, slots * BT, num_stages=STAGES):
        o_t = (tl.cast(i_t, tl.int64) + tl.arange(0, BT))[:, None, None]
        m_t = o_t < T
        m_x = m_t & m_hw
        b_q1, b_q2 = load_halves(p_dq + o_t * s_dq_t + o_h * s_dq_h + o_w * s_dq_d, m_x & m_q, W * s_dq_d)
        b_k1, b_k2 = load_halves(p_dk + o_t * s_dk_t + (o_h - HQ) * s_dk_h + o_w * s_dk_d, m_x & m_k, W * s_dk_d)
        b_v1, b_v2 = load_halves(p_dv + o_t * s_dv_t + (o_h - (HQ + HK)) * s_dv_h + o_w * s_dv_d, m_x & m_v, W * s_dv_d)
        b_dy1 = tl.where(m_q, b_q1, b_k1)
        b_dy2 = tl.where(m_q, b_q2, b_k2)
        # Loaded for each head (from the L1): for one row a token Triton would pass the whole tile through shared memory.
        b_cos = tl.load(p_cos + o_t * s_cos_t + o_h * 0 + o_w * s_cos_d, mask=m_x, other=0.0)
        b_sin = tl.load(p_sin + o_t * s_sin_t + o_h * 0 + o_w * s_sin_d, mask=m_x, other=0.0)
        b_dx1 = b_dy1 * b_cos + b_dy2 * b_sin
        b_dx2 = b_dy2 * b_cos - b_dy1 * b_sin
        if p_q_norm is not None:
            b_n1, b_n2 = load_halves(p_x + o_t * s_x_t + o_h * s_x_h + o_w * s_x_d, m_x & (m_q | m_k), W * s_x_d)
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
        p_y = p_dx + (o_t * (HQ + 2 * HK) + o_h) * (2 * W) + o_w
        tl.store(p_y, tl.where(m_v, b_v1, b_dx1).to(p_dx.dtype.element_ty), mask=m_x)
        tl.store(p_y + W, tl.where(m_v, b_v2, b_dx2).to(p_dx.dtype.element_ty), mask=m_x)

    if p_q_norm is not None:
        p_row = p_sums + tl.cast(tl.program_id(0), tl.int64) * 4 * BW + tl.arange(0, BW)
        tl.store(p_row, tl.sum(tl.sum(tl.where(m_q, b_sum1, 0.0), 0), 0))
        tl.store(p_row + BW, tl.sum(tl.sum(tl.where(m_q, b_sum2, 0.0), 0), 0))
        tl.store(p_row + 2 * BW, tl.sum(tl.sum(tl.where(m_k, b_sum1, 0.0), 0), 0))
        tl.store(p_row + 3 * BW, tl.sum(tl.sum(tl.where(m_k, b_sum2, 0.0), 0), 0))


@triton.jit(do_not_specialize=["programs"], do_not_specialize_on_alignment=["programs"])
def rotary_bwd_sums_kernel(p_sums, p_dq_norm, p_dk_norm, programs, W: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """The gradients of q_norm and k_norm [2 W] from the programs' parts, fp32 [programs, 4, BW]: BC columns a program."""
    o_c, b_sum = column_sums(p_sums, programs, 4 * BW, tl.program_id(0), BN, BC)
    o_part = o_c // BW
    o_w = o_c % BW
    o_out = o_part % 2 * W + o_w
    tl.store(p_dq_norm + o_out, b_sum.to(p_dq_norm.dtype.element_ty), mask=(o_part < 2) & (o_w < W))
    tl.store(p_dk_norm + o_out, b_sum.to(p_dk_norm.dtype.element_ty), mask=(o_part >= 2) & (o_part < 4) & (o_w < W))
