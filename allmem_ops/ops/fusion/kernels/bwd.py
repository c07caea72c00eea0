"""Backward of `gated_fusion`: every tensor once, sums over tokens in a fixed order."""

import triton
import triton.language as tl

from allmem_ops.ops.fusion.kernels.rows import CHANNEL_GATE, HEAD_GATE, inverse_rms, tile_loop, tile_rows, token_offsets
from allmem_ops.ops.kernels.sums import column_sums


@triton.jit(do_not_specialize=["tokens", "T", "eps"], do_not_specialize_on_alignment=["tokens", "T"])
def gated_fusion_bwd_kernel(
    p_dy,
    p_memory,
    p_alpha,
    p_gate,
    p_weight,
    p_dmemory,
    p_dgate,
    p_alpha_sums,
    p_weight_sums,
    tokens,
    T,
    eps,
    s_dy_b,
    s_dy_t,
    s_dy_c,
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
    FOLD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dmemory and dgate, and the program's part of two sums.

    With z = sum_t dy * sigmoid(gate) * memory/rms (a row of the tile stays with one head): dalpha = weight * z and
    dweight = sum_h alpha * z, so one accumulator serves both. p_alpha_sums fp32 [programs * BR / FOLD, BW]: rows are heads
    counted on (FOLD rows of the tile that share a head are summed); p_weight_sums fp32 [programs, BW].
    """
    o_first, o_h = tile_rows(H, BR)
    o_w = tl.cast(tl.arange(0, BW), tl.int64)
    o_c = o_h[:, None] * W + o_w[None, :]
    m_c = (o_w[None, :] < W) & (o_c < D)
    o_memory = o_h[:, None] * s_memory_h + o_w[None, :] * s_memory_w
    if p_alpha is not None:
        b_alpha = tl.load(p_alpha + o_c * s_alpha, mask=m_c, other=0.0).to(tl.float32)
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_w * s_weight, mask=o_w < W, other=0.0).to(tl.float32)[None, :]
    b_z = tl.zeros([BR, BW], dtype=tl.float32)

    last, step = tile_loop(tokens, H, BR)
    for i_t in tl.range(0, last, step, num_stages=STAGES):
        o_t = o_first + i_t
        m_t = o_t < tokens
        m_rows = m_t[:, None] & m_c
        b_x = tl.load(p_memory + token_offsets(o_t, T, s_memory_b, s_memory_t, BATCH)[:, None] + o_memory, mask=m_rows, other=0.0).to(
            tl.float32
        )
        p_rows = p_dy + token_offsets(o_t, T, s_dy_b, s_dy_t, BATCH)[:, None]
        b_dy = tl.load(p_rows + o_c * s_dy_c, mask=m_rows, other=0.0).to(tl.float32)
        if GATE == HEAD_GATE:
            p_rows = p_gate + token_offsets(o_t, T, s_gate_b, s_gate_t, BATCH)
            b_s = tl.sigmoid(tl.load(p_rows + o_h * s_gate_c, mask=m_t, other=0.0).to(tl.float32))[:, None]
        if GATE == CHANNEL_GATE:
            p_rows = p_gate + token_offsets(o_t, T, s_gate_b, s_gate_t, BATCH)[:, None]
            b_s = tl.sigmoid(tl.load(p_rows + o_c * s_gate_c, mask=m_rows, other=0.0).to(tl.float32))

        # x = memory/rms, n = x weight, g = dy alpha, dn = g s
        if p_weight is not None:
            b_r = inverse_rms(b_x, eps, W)
            b_x *= b_r
        b_g = b_dy
        if p_alpha is not None:
            b_g = b_dy * b_alpha
        b_n = b_x
        if p_weight is not None:
            b_n = b_x * b_weight
        b_dn = b_g
        if GATE != 0:
            b_dn = b_g * b_s
            b_dy *= b_s
        b_z += b_dy * b_x
        if GATE == HEAD_GATE:
            b_dot = tl.sum(b_g * b_n, 1)[:, None]
            b_dgate = b_s * (1 - b_s) * b_dot
            tl.store(p_dgate + (o_t * H + o_h)[:, None], b_dgate.to(p_dgate.dtype.element_ty), mask=m_t[:, None])
            b_dot *= b_s
        if GATE == CHANNEL_GATE:
            b_dgate = b_g * b_n * b_s * (1 - b_s)
            tl.store(p_dgate + o_t[:, None] * D + o_c, b_dgate.to(p_dgate.dtype.element_ty), mask=m_rows)
        if p_weight is not None:
            if GATE != HEAD_GATE:
                b_dot = tl.sum(b_dn * b_n, 1)[:, None]
            b_dn = b_r * (b_dn * b_weight - b_x * (b_dot / W))
        tl.store(p_dmemory + o_t[:, None] * D + o_c, b_dn.to(p_dmemory.dtype.element_ty), mask=m_rows)

    if p_alpha_sums is not None:
        b_sum = b_z
        if p_weight is not None:
            b_sum = b_z * b_weight
        NR: tl.constexpr = BR // FOLD
        if FOLD > 1:
            b_sum = tl.sum(tl.reshape(b_sum, [FOLD, NR, BW]), 0)
        o_r = tl.cast(tl.program_id(0), tl.int64) * NR + tl.arange(0, NR)
        tl.store(p_alpha_sums + o_r[:, None] * BW + tl.arange(0, BW)[None, :], b_sum)
    if p_weight_sums is not None:
        if p_alpha is not None:
            b_z *= b_alpha
        tl.store(p_weight_sums + tl.program_id(0) * BW + tl.arange(0, BW), tl.sum(b_z, 0))


@triton.jit(do_not_specialize=["alpha_rows", "programs"], do_not_specialize_on_alignment=["alpha_rows", "programs"])
def gated_fusion_bwd_sums_kernel(
    p_alpha_sums,
    p_weight_sums,
    p_dalpha,
    p_dweight,
    alpha_rows,
    programs,
    H: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """dalpha from fp32 [alpha_rows, H, BW], dweight from fp32 [programs, BW]: a program sums BC columns of one of them."""
    i_c = tl.program_id(0)
    NA: tl.constexpr = 0 if p_alpha_sums is None else (H * BW + BC - 1) // BC
    # Nested: Triton would compile both sides of `and`, also with a pointer that is None.
    if p_alpha_sums is not None:
        if i_c < NA:
            o_c, b_sum = column_sums(p_alpha_sums, alpha_rows, H * BW, i_c, BN, BC)
            o_out = o_c // BW * W + o_c % BW
            m_out = (o_c < H * BW) & (o_c % BW < W) & (o_out < D)
            tl.store(p_dalpha + o_out, b_sum.to(p_dalpha.dtype.element_ty), mask=m_out)
    if p_weight_sums is not None:
        if i_c >= NA:
            o_c, b_sum = column_sums(p_weight_sums, programs, BW, i_c - NA, BN, BC)
            tl.store(p_dweight + o_c, b_sum.to(p_dweight.dtype.element_ty), mask=o_c < W)
