"""The projection's columns after q, k and v, forward and backward: rates, momentum and gate logits from their logits and biases.

Who walks through a span of tokens does its share of them afterwards: a launch of its own took a tenth of the time for 2 % of the bytes.
"""

import triton
import triton.language as tl

from allmem_ops.ops.memory_input.kernels.walk import sigmoid


@triton.jit
def heads_forward(
    i_b,
    first,
    end,
    i_share,
    p_x,
    p_bias,
    p_eta,
    p_mu,
    p_gate,
    T,
    s_b,
    s_t,
    s_c,
    H: tl.constexpr,
    G: tl.constexpr,
    SHARES: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    FAST: tl.constexpr,
):
    """Of the tokens [first, end) every SHARES-th tile of BT. Columns, where p_x points: 3*H of eta, H of mu, G of the gate."""
    for i_t in range(first + i_share * BT, end, SHARES * BT):
        o_t = tl.cast(i_t + tl.arange(0, BT), tl.int64)[:, None]
        for i_e in range(0, 4 * H + G, BE):
            o_e = (i_e + tl.arange(0, BE))[None, :]
            m_x = (o_t < end) & (o_e < 4 * H + G)
            b_bias = tl.load(p_bias + o_e, mask=o_e < 4 * H + G, other=0.0).to(tl.float32)
            b_x = tl.load(p_x + i_b * s_b + o_t * s_t + o_e * s_c, mask=m_x, other=0.0).to(tl.float32) + b_bias
            o_row = i_b * T + o_t
            # log(1 + e) with the error of the sum taken out: eta is often 1e-3 and less, where that error is 1e-4 of it.
            b_e = tl.exp(-tl.abs(b_x))
            b_u = 1 + b_e
            b_log = tl.where(b_u > 1, tl.log(b_u) * (b_e / tl.where(b_u > 1, b_u - 1, 1.0)), b_e)
            b_soft = tl.maximum(b_x, 0.0) + b_log
            tl.store(p_eta + o_row * (3 * H) + o_e, b_soft, mask=m_x & (o_e < 3 * H))
            tl.store(p_mu + o_row * H + (o_e - 3 * H), sigmoid(b_x, FAST), mask=m_x & (o_e >= 3 * H) & (o_e < 4 * H))
            if G > 0:
                tl.store(p_gate + o_row * G + (o_e - 4 * H), b_x.to(p_gate.dtype.element_ty), mask=m_x & (o_e >= 4 * H))


@triton.jit
def heads_backward(
    i_b,
    first,
    end,
    i_share,
    p_deta,
    p_dmu,
    p_dgate,
    p_x,
    p_bias,
    p_dx,
    p_bias_sums,
    s_b,
    s_t,
    s_c,
    s_deta_b,
    s_deta_t,
    s_deta_h,
    s_deta_i,
    s_dmu_b,
    s_dmu_t,
    s_dmu_h,
    s_dgate_b,
    s_dgate_t,
    s_dgate_c,
    s_dx_b,
    s_dx_t,
    H: tl.constexpr,
    G: tl.constexpr,
    SHARES: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    FAST: tl.constexpr,
):
    """As `heads_forward`; the sums over these tokens go to p_bias_sums fp32 [4*H + G]."""
    p_deta, p_dmu, p_dgate = p_deta + i_b * s_deta_b, p_dmu + i_b * s_dmu_b, p_dgate + i_b * s_dgate_b
    for i_e in range(0, 4 * H + G, BE):
        o_e = (i_e + tl.arange(0, BE))[None, :]
        m_e = o_e < 4 * H + G
        b_bias = tl.load(p_bias + o_e, mask=m_e, other=0.0).to(tl.float32)
        o_c = tl.cast(o_e, tl.int64)
        is_eta, is_mu = m_e & (o_e < 3 * H), m_e & (o_e >= 3 * H) & (o_e < 4 * H)
        b_sum = tl.zeros([BT, BE], dtype=tl.float32)
        for i_t in range(first + i_share * BT, end, SHARES * BT):
            o_t = tl.cast(i_t + tl.arange(0, BT), tl.int64)[:, None]
            m_t = o_t < end
            b_x = tl.load(p_x + i_b * s_b + o_t * s_t + o_c * s_c, mask=m_t & m_e, other=0.0).to(tl.float32) + b_bias
            p_row = p_deta + o_t * s_deta_t
            b_deta = tl.load(p_row + o_c // 3 * s_deta_h + o_c % 3 * s_deta_i, mask=m_t & is_eta, other=0.0)
            b_dmu = tl.load(p_dmu + o_t * s_dmu_t + (o_c - 3 * H) * s_dmu_h, mask=m_t & is_mu, other=0.0)
            b_s = sigmoid(b_x, FAST)
            b_dx = b_deta * b_s + b_dmu * (b_s * (1 - b_s))
            if G > 0:
                p_row = p_dgate + o_t * s_dgate_t
                b_dx += tl.load(p_row + (o_c - 4 * H) * s_dgate_c, mask=m_t & m_e & (o_e >= 4 * H), other=0.0).to(tl.float32)
            b_sum += b_dx
            tl.store(p_dx + i_b * s_dx_b + o_t * s_dx_t + o_c, b_dx.to(p_dx.dtype.element_ty), mask=m_t & m_e)
        o_out = i_e + tl.arange(0, BE)
        tl.store(p_bias_sums + o_out, tl.sum(b_sum, 0), mask=o_out < 4 * H + G)
