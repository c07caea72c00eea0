"""Forward of `rotary`: RMSNorm and rotation of q and k in one pass; v stays where it is."""

import triton
import triton.language as tl

from allmem_ops.ops.rotary.kernels.rows import inverse_rms, load_halves, load_weights, program_place


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
    STAGES: tl.constexpr,
):
    """A program takes BH heads of every `slots`-th tile of BT tokens of one sequence. W is half a head."""
    i_b, i_s, i_h = program_place(slots, HQ + HK, BH)
    o_h = (i_h * BH + tl.cast(tl.arange(0, BH), tl.int64))[None, :, None]
    o_w = tl.cast(tl.arange(0, BW), tl.int64)[None, None, :]
    m_w = o_w < W
    m_hw = (o_h < HQ + HK) & m_w
    m_q = o_h < HQ
    p_x += i_b * s_x_b
    p_cos += i_b * s_cos_b
    p_sin += i_b * s_sin_b
    p_q += i_b * T * HQ * 2 * W
    p_k += i_b * T * HK * 2 * W
    if p_q_norm is not None:
        b_w1, b_w2 = load_weights(p_q_norm, p_k_norm, s_q_norm, s_k_norm, m_q, o_w, W)

    for i_t in tl.range(i_s * BT, T, slots * BT, num_stages=STAGES):
        o_t = (tl.cast(i_t, tl.int64) + tl.arange(0, BT))[:, None, None]
        m_t = o_t < T
        m_x = m_t & m_hw
        b_x1, b_x2 = load_halves(p_x + o_t * s_x_t + o_h * s_x_h + o_w * s_x_d, m_x, W * s_x_d)
        # Loaded for each head (from the L1): for one row a token Triton would pass the whole tile through shared memory.
        b_cos = tl.load(p_cos + o_t * s_cos_t + o_h * 0 + o_w * s_cos_d, mask=m_x, other=0.0)
        b_sin = tl.load(p_sin + o_t * s_sin_t + o_h * 0 + o_w * s_sin_d, mask=m_x, other=0.0)
        if p_q_norm is not None:
            b_r = inverse_rms(b_x1, b_x2, eps, W)
            b_x1 = b_x1 * b_r * b_w1
            b_x2 = b_x2 * b_r * b_w2
        b_y1 = (b_x1 * b_cos - b_x2 * b_sin).to(p_q.dtype.element_ty)
        b_y2 = (b_x2 * b_cos + b_x1 * b_sin).to(p_q.dtype.element_ty)
        p_y = p_q + (o_t * HQ + o_h) * (2 * W) + o_w
        tl.store(p_y, b_y1, mask=m_x & m_q)
        tl.store(p_y + W, b_y2, mask=m_x & m_q)
        p_y = p_k + (o_t * HK + (o_h - HQ)) * (2 * W) + o_w
        tl.store(p_y, b_y1, mask=m_x & (o_h >= HQ))
        tl.store(p_y + W, b_y2, mask=m_x & (o_h >= HQ))
