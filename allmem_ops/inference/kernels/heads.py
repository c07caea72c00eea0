"""Queries, keys and the sinks' queries of one token, from its projection: RMSNorm and RoPE of each head in one kernel."""

import triton
import triton.language as tl


@triton.jit
def _store_turned(p, b_1, b_2, cos, sin, o_d, m_d, HALF: tl.constexpr):
    """The head turned by the angles whose cosines and sines stand at `cos` and `sin`, both halves of them alike."""
    b_c = tl.cast(tl.load(cos + o_d, mask=m_d, other=0.0), tl.float32)
    b_s = tl.cast(tl.load(sin + o_d, mask=m_d, other=0.0), tl.float32)
    dtype = p.dtype.element_ty
    tl.store(p + o_d, tl.cast(b_1 * b_c - b_2 * b_s, dtype), mask=m_d)
    tl.store(p + HALF + o_d, tl.cast(b_2 * b_c + b_1 * b_s, dtype), mask=m_d)


@triton.jit
def step_heads_kernel(
    y, q_norm, k_norm, cos, sin, cos_f, sin_f, q, k, q_sinks, HQ, HK, stride_y, stride_c, eps,
    HALF: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (HQ + HK, B). y: [B, .], the heads of q, then of k; cos, sin [B, 2 HALF]; *_f: those of the last trained position."""
    i_h, i_b = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    o_d = tl.arange(0, BH)
    m_d = o_d < HALF
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    p_y = y + i_b * stride_y + i_h * (2 * HALF)
    dtype = y.dtype.element_ty
    b_1 = tl.cast(tl.load(p_y + o_d, mask=m_d, other=0.0), tl.float32)
    b_2 = tl.cast(tl.load(p_y + HALF + o_d, mask=m_d, other=0.0), tl.float32)
    if q_norm is not None:
        rsqrt = tl.rsqrt((tl.sum(b_1 * b_1, 0) + tl.sum(b_2 * b_2, 0)) / (2 * HALF) + eps)
        norm = q_norm if i_h < HQ else k_norm
        # rounded as the model does: before the weight and after it
        b_1 = tl.cast(tl.cast(b_1 * rsqrt, dtype), tl.float32) * tl.cast(tl.load(norm + o_d, mask=m_d, other=0.0), tl.float32)
        b_2 = tl.cast(tl.cast(b_2 * rsqrt, dtype), tl.float32) * tl.cast(tl.load(norm + HALF + o_d, mask=m_d, other=0.0), tl.float32)
        b_1, b_2 = tl.cast(tl.cast(b_1, dtype), tl.float32), tl.cast(tl.cast(b_2, dtype), tl.float32)
    if i_h < HQ:
        at = (i_b * HQ + i_h) * (2 * HALF)
        _store_turned(q + at, b_1, b_2, cos + i_b * stride_c, sin + i_b * stride_c, o_d, m_d, HALF)
        if q_sinks is not None:
            _store_turned(q_sinks + at, b_1, b_2, cos_f + i_b * stride_c, sin_f + i_b * stride_c, o_d, m_d, HALF)
    else:
        at = (i_b * HK + i_h - HQ) * (2 * HALF)
        _store_turned(k + at, b_1, b_2, cos + i_b * stride_c, sin + i_b * stride_c, o_d, m_d, HALF)
