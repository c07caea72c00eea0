"""Forward of `gated_fusion`: every tensor once."""

import triton
import triton.language as tl

from allmem_ops.ops.fusion.kernels.rows import CHANNEL_GATE, HEAD_GATE, inverse_rms, tile_loop, tile_rows, token_offsets


@triton.jit(do_not_specialize=["tokens", "T", "eps"], do_not_specialize_on_alignment=["tokens", "T"])
def gated_fusion_fwd_kernel(
    p_attn,
    p_memory,
    p_alpha,
    p_gate,
    p_weight,
    p_y,
    tokens,
    T,
    eps,
    s_attn_b,
    s_attn_t,
    s_attn_c,
    s_memory_b,
    s_memory_t,
    s_memory_h,
    s_memory_w,
    s_alpha,
    s_gate_b,
    s_gate_t,
    s_gate_c,
    s_weight,
    H: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    BATCH: tl.constexpr,
    GATE: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
    STAGES: tl.constexpr,
):
    o_first, o_h = tile_rows(H, BR)
    o_w = tl.cast(tl.arange(0, BW), tl.int64)
    o_c = o_h[:, None] * W + o_w[None, :]
    m_c = (o_w[None, :] < W) & (o_c < D)
    o_memory = o_h[:, None] * s_memory_h + o_w[None, :] * s_memory_w
    if p_alpha is not None:
        b_alpha = tl.load(p_alpha + o_c * s_alpha, mask=m_c, other=0.0).to(tl.float32)
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_w * s_weight, mask=o_w < W, other=0.0).to(tl.float32)[None, :]

    last, step = tile_loop(tokens, H, BR)
    for i_t in tl.range(0, last, step, num_stages=STAGES):
        o_t = o_first + i_t
        m_t = o_t < tokens
        m_rows = m_t[:, None] & m_c
        b_y = tl.load(p_memory + token_offsets(o_t, T, s_memory_b, s_memory_t, BATCH)[:, None] + o_memory, mask=m_rows, other=0.0).to(
            tl.float32
        )
        if p_attn is not None:
            p_rows = p_attn + token_offsets(o_t, T, s_attn_b, s_attn_t, BATCH)[:, None]
            b_attn = tl.load(p_rows + o_c * s_attn_c, mask=m_rows, other=0.0).to(tl.float32)
        if GATE != 0:
            p_gates = p_gate + token_offsets(o_t, T, s_gate_b, s_gate_t, BATCH)
        if p_weight is not None:
            b_y = b_y * inverse_rms(b_y, eps, W) * b_weight
        if GATE == HEAD_GATE:
            b_y *= tl.sigmoid(tl.load(p_gates + o_h * s_gate_c, mask=m_t, other=0.0).to(tl.float32))[:, None]
        if GATE == CHANNEL_GATE:
            b_y *= tl.sigmoid(tl.load(p_gates[:, None] + o_c * s_gate_c, mask=m_rows, other=0.0).to(tl.float32))
        if p_alpha is not None:
            b_y *= b_alpha
        if p_attn is not None:
            # Not a sum: -0.0 + 0.0 is 0.0, and with alpha = 0 every bit of attn shall stay. 0.0 - y is +0.0 for either zero.
            b_y = b_attn - (0.0 - b_y)
        tl.store(p_y + o_t[:, None] * D + o_c, b_y.to(p_y.dtype.element_ty), mask=m_rows)
