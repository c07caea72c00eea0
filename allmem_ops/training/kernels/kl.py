"""KL of two rows of logits and its gradient, each row read from memory twice and nothing between kept."""

import triton
import triton.language as tl

# Stands for -inf where a lane holds no token: exp(NOTHING - NOTHING) is 1 and not NaN, and its lane's weight is 0 in the end.
NOTHING = tl.constexpr(-1e30)


@triton.jit
def kl_rows_kernel(s, t, mask, kl, d, V, s_t, t_t, d_t, BV: tl.constexpr, GRAD: tl.constexpr):
    """One program a token: kl = sum_v p_t (log p_t - log p_s);  d = p_s - p_t, the gradient of the student's logits."""
    i_t = tl.cast(tl.program_id(0), tl.int64)
    o_v = tl.arange(0, BV)
    if tl.load(mask + i_t) == 0:
        tl.store(kl + i_t, 0.0)
        if GRAD:
            for i_v in range(0, V, BV):
                tl.store(d + i_t * d_t + i_v + o_v, tl.zeros([BV], d.dtype.element_ty), mask=i_v + o_v < V)
        return
    p_s, p_t = s + i_t * s_t + o_v, t + i_t * t_t + o_v
    # Every lane keeps a maximum and sums of its own: no reduction across lanes before the end.
    b_ms = tl.full([BV], NOTHING, tl.float32)
    b_mt = tl.full([BV], NOTHING, tl.float32)
    b_ls = tl.zeros([BV], tl.float32)
    b_lt = tl.zeros([BV], tl.float32)
    for i_v in range(0, V, BV):
        m_v = i_v + o_v < V
        b_s = tl.load(p_s + i_v, mask=m_v, other=NOTHING)
        b_t = tl.load(p_t + i_v, mask=m_v, other=NOTHING)
        b_m = tl.maximum(b_ms, b_s)
        b_ls = b_ls * tl.exp(b_ms - b_m) + tl.exp(b_s - b_m)
        b_ms = b_m
        b_m = tl.maximum(b_mt, b_t)
        b_lt = b_lt * tl.exp(b_mt - b_m) + tl.exp(b_t - b_m)
        b_mt = b_m
    m_s, m_t = tl.max(b_ms, 0), tl.max(b_mt, 0)
    l_s = tl.sum(b_ls * tl.exp(b_ms - m_s), 0)
    l_t = tl.sum(b_lt * tl.exp(b_mt - m_t), 0)
    # log p_t - log p_s = (t - s) - c. Never the log-sums themselves: their rounding is that of the logits' common offset.
    c = (m_t - m_s) + tl.log(l_t / l_s)
    b_kl = tl.zeros([BV], tl.float32)
    # From the end back: what was read last is still in the L2.
    count = (V + BV - 1) // BV
    for i in range(count):
        i_v = (count - 1 - i) * BV
        m_v = i_v + o_v < V
        b_s = tl.load(p_s + i_v, mask=m_v, other=NOTHING)
        b_t = tl.load(p_t + i_v, mask=m_v, other=NOTHING)
        b_p = tl.exp(b_t - m_t) / l_t
        b_kl += b_p * ((b_t - b_s) - c)
        if GRAD:
            b_d = tl.exp(b_s - m_s) / l_s - b_p
            tl.store(d + i_t * d_t + i_v + o_v, tl.cast(b_d, d.dtype.element_ty), mask=m_v)
    tl.store(kl + i_t, tl.sum(b_kl, 0))
