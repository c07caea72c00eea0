"""Backward: the projection's gradient, and parts of the parameters' sums."""

import triton
import triton.language as tl

from allmem_ops.ops.memory_input.kernels.heads import heads_backward
from allmem_ops.ops.memory_input.kernels.walk import (
    below,
    convolved,
    earlier,
    load_pair,
    load_taps,
    norm_factors,
    program_place,
    sigmoid,
    times,
    token_place,
    within,
)


@triton.jit
def _token(
    i_b,
    i_t,
    b_x,
    b_x1,
    b_x2,
    b_x3,
    b_dy,
    b_dx1,
    b_dx2,
    b_dx3,
    b_dw,
    b_dw1,
    b_dw2,
    b_dw3,
    b_dnorm,
    b_w,
    b_w1,
    b_w2,
    b_w3,
    b_norm,
    p_done,
    p_tail,
    p_sequence,
    p_position,
    first,
    end,
    T,
    m_x,
    rms_eps,
    l2_eps,
    H: tl.constexpr,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    RMS: tl.constexpr,
    L2: tl.constexpr,
    FAST: tl.constexpr,
):
    """One token: its convolution again, what it adds to the gradients of itself and of the TAPS - 1 inputs before it, and to the sums.

    b_dx1..3 are the gradients so far of the inputs one, two and three before it; the oldest is complete with this token and
    stored at p_done.
    """
    position = i_t
    if p_position is not None:
        position, o_tail = token_place(i_b, i_t, T, p_tail, p_sequence, p_position, (TAPS - 1) * 3 * H * W)
        b_x1 = within(b_x1, p_tail, o_tail, position, m_x, 1, TAPS, 3 * H * W)
        b_x2 = within(b_x2, p_tail, o_tail, position, m_x, 2, TAPS, 3 * H * W)
        b_x3 = within(b_x3, p_tail, o_tail, position, m_x, 3, TAPS, 3 * H * W)
    b_c = convolved(b_x, b_x1, b_x2, b_x3, b_w, b_w1, b_w2, b_w3, TAPS)
    b_y = b_c
    if SILU:
        b_s = sigmoid(b_c, FAST)
        b_y = b_c * b_s
    own = i_t < end
    if RMS or L2:
        # o = z r l with z = y weight. Without the part along o, do -> l (do - o <do, o>); without the mean along y, the same for r.
        b_z = b_y
        if RMS:
            b_z = b_y * b_norm
        b_r, b_l = norm_factors(b_y, b_z, rms_eps, l2_eps, W, RMS, L2)
        b_rl = b_r * b_l
        b_dot = tl.sum(b_dy * b_z, 1)[:, None] * b_rl  # <do, o>
        if L2:
            b_dy -= b_z * (b_rl * b_dot)
            # <dz, z r>: <do, o> less its part along o, which leaves l2_eps's share of it, here without the cancellation
            b_dot *= l2_eps * b_l * b_l
        # now dz is b_dy b_l
        if RMS:
            b_dnorm += b_dy * b_y * tl.where(own, b_rl, 0.0)
            b_dy = b_dy * b_norm * b_rl - b_y * (b_r * b_r * b_dot / W)
        else:
            b_dy *= b_l
    b_dc = b_dy
    if SILU:
        b_dc = b_dy * (b_s + b_y * (1 - b_s))
    b_own = tl.where(own, b_dc, 0.0)
    b_dw += b_own * b_x
    b_oldest = b_dc * b_w
    if TAPS > 1:
        b_dw1 += b_own * b_x1
        b_now = b_oldest
        b_dc1 = b_dc
        if p_position is not None:
            b_dc1 = tl.where(position >= 1, b_dc, 0.0)
        b_oldest = b_dx1 + b_dc1 * b_w1
        b_dx1 = b_now
    if TAPS > 2:
        b_dw2 += b_own * b_x2
        b_now = b_oldest
        b_dc2 = b_dc
        if p_position is not None:
            b_dc2 = tl.where(position >= 2, b_dc, 0.0)
        b_oldest = b_dx2 + b_dc2 * b_w2
        b_dx2 = b_now
    if TAPS > 3:
        b_dw3 += b_own * b_x3
        b_now = b_oldest
        b_dc3 = b_dc
        if p_position is not None:
            b_dc3 = tl.where(position >= 3, b_dc, 0.0)
        b_oldest = b_dx3 + b_dc3 * b_w3
        b_dx3 = b_now
    i_done = i_t - (TAPS - 1)
    m_done = below(below(m_x, first - 1, i_done), i_done, end)
    tl.store(p_done, b_oldest.to(p_done.dtype.element_ty), mask=m_done)
    return b_dx1, b_dx2, b_dx3, b_dw, b_dw1, b_dw2, b_dw3, b_dnorm


@triton.jit
def _walk(
    i_b,
    first,
    end,
    T,
    p_x,
    p_taps,
    p_norm,
    p_do,
    p_dx,
    p_tail,
    p_sequence,
    p_position,
    p_tap_sums,
    p_norm_sums,
    o_c,
    m_x,
    s_t,
    s_do_t,
    s_dx_t,
    rms_eps,
    l2_eps,
    H: tl.constexpr,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    RMS: tl.constexpr,
    L2: tl.constexpr,
    FAST: tl.constexpr,
):
    """p_x, p_do, p_dx: at token 0 of the row."""
    C: tl.constexpr = 3 * H * W
    BW: tl.constexpr = m_x.shape[1]
    # Before everything else: they wait for the memory, and the taps' loads end at a barrier.
    p_now = p_x + tl.cast(first, tl.int64) * s_t
    p_do += tl.cast(first, tl.int64) * s_do_t
    b_next, b_next1 = load_pair(p_now, s_t, first, T, m_x)
    b_dnext, b_dnext1 = load_pair(p_do, s_do_t, first, T, m_x)
    position, o_tail = token_place(i_b, first, T, p_tail, p_sequence, p_position, (TAPS - 1) * C)
    b_x1 = earlier(p_x, s_t, p_tail, o_tail, first, position, m_x, 1, TAPS, C)
    b_x2 = earlier(p_x, s_t, p_tail, o_tail, first, position, m_x, 2, TAPS, C)
    b_x3 = earlier(p_x, s_t, p_tail, o_tail, first, position, m_x, 3, TAPS, C)
    b_w, b_w1, b_w2, b_w3 = load_taps(p_taps, o_c, m_x, TAPS)
    b_norm = b_w
    if RMS:
        o_w = tl.arange(0, BW)
        b_norm = tl.load(p_norm + o_w, mask=o_w < W, other=0.0).to(tl.float32)[None, :]
    b_zero = tl.zeros(m_x.shape, dtype=tl.float32)
    b_dx1, b_dx2, b_dx3 = b_zero, b_zero, b_zero
    b_dw, b_dw1, b_dw2, b_dw3, b_dnorm = b_zero, b_zero, b_zero, b_zero, b_zero
    p_dx += tl.cast(first - (TAPS - 1), tl.int64) * s_dx_t
    # TAPS - 1 tokens past the span add to the gradients of its last inputs.
    for i_t in tl.range(first, end + (TAPS - 1), 2):
        b_a, b_b, b_da, b_db = b_next, b_next1, b_dnext, b_dnext1
        p_now += 2 * s_t
        p_do += 2 * s_do_t
        b_next, b_next1 = load_pair(p_now, s_t, i_t + 2, T, m_x)
        b_dnext, b_dnext1 = load_pair(p_do, s_do_t, i_t + 2, T, m_x)
        b_a, b_b, b_da, b_db = b_a.to(tl.float32), b_b.to(tl.float32), b_da.to(tl.float32), b_db.to(tl.float32)
        # fmt: off
        b_dx1, b_dx2, b_dx3, b_dw, b_dw1, b_dw2, b_dw3, b_dnorm = _token(
            i_b, i_t, b_a, b_x1, b_x2, b_x3, b_da, b_dx1, b_dx2, b_dx3, b_dw, b_dw1, b_dw2, b_dw3, b_dnorm, b_w, b_w1, b_w2, b_w3,
            b_norm, p_dx, p_tail, p_sequence, p_position, first, end, T, m_x, rms_eps, l2_eps, H, W, TAPS, SILU, RMS, L2, FAST)
        b_dx1, b_dx2, b_dx3, b_dw, b_dw1, b_dw2, b_dw3, b_dnorm = _token(
            i_b, i_t + 1, b_b, b_a, b_x1, b_x2, b_db, b_dx1, b_dx2, b_dx3, b_dw, b_dw1, b_dw2, b_dw3, b_dnorm, b_w, b_w1, b_w2, b_w3,
            b_norm, p_dx + s_dx_t, p_tail, p_sequence, p_position, first, end, T, m_x, rms_eps, l2_eps, H, W, TAPS, SILU, RMS, L2, FAST)
        # fmt: on
        b_x1, b_x2, b_x3 = b_b, b_a, b_x1
        p_dx += 2 * s_dx_t
    tl.store(p_tap_sums + (TAPS - 1) * C, b_dw, mask=m_x)
    if TAPS > 1:
        tl.store(p_tap_sums + (TAPS - 2) * C, b_dw1, mask=m_x)
    if TAPS > 2:
        tl.store(p_tap_sums + (TAPS - 3) * C, b_dw2, mask=m_x)
    if TAPS > 3:
        tl.store(p_tap_sums + (TAPS - 4) * C, b_dw3, mask=m_x)
    if RMS:
        tl.store(p_norm_sums + tl.arange(0, BW), tl.sum(b_dnorm, 0))


@triton.jit(
    do_not_specialize=["T", "span", "spans", "rms_eps", "l2_eps", "s_b", "s_t", "s_dx_b", "s_dx_t"],
    do_not_specialize_on_alignment=["T", "span", "spans", "s_b", "s_t", "s_dx_b", "s_dx_t"],
)
def memory_input_bwd_kernel(
    p_dq,
    p_dk,
    p_dv,
    p_deta,
    p_dmu,
    p_dgate,
    p_x,
    p_taps,
    p_q_norm,
    p_k_norm,
    p_bias,
    p_dx,
    p_tail,
    p_sequence,
    p_position,
    p_tap_sums,
    p_norm_sums,
    p_bias_sums,
    T,
    span,
    spans,
    rms_eps,
    l2_eps,
    s_b,
    s_t,
    s_c,
    s_dq_b,
    s_dq_t,
    s_dq_h,
    s_dq_w,
    s_dk_b,
    s_dk_t,
    s_dk_h,
    s_dk_w,
    s_dv_b,
    s_dv_t,
    s_dv_h,
    s_dv_w,
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
    UNIT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    L2: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    FAST: tl.constexpr,
):
    """A program: a span of tokens, BR heads of q, of k or of v, and its share of the columns after them.

    Strides of the projection and its gradient are in units of UNIT elements. What each program adds:
    p_tap_sums fp32 [B * spans, TAPS, 3*H*W], p_norm_sums fp32 [B * spans * blocks of heads, 2, BW], p_bias_sums fp32
    [B * spans, shares, 4*H + G].
    """
    s_b, s_t, s_dx_b, s_dx_t = times(s_b, UNIT), times(s_t, UNIT), times(s_dx_b, UNIT), times(s_dx_t, UNIT)
    i_b, i_span, i_kind, i_block = program_place(tl.program_id(0), spans, H, BR)
    o_h, o_w = i_block * BR + tl.arange(0, BR), tl.arange(0, BW)
    m_x = (o_h < H)[:, None] & (o_w < W)[None, :]
    o_c = i_kind * (H * W) + o_h[:, None] * W + o_w[None, :]
    p_logits, p_dlogits = p_x + 3 * H * W * tl.cast(s_c, tl.int64), p_dx + 3 * H * W
    p_x += i_b * s_b + tl.cast(o_c, tl.int64) * s_c
    p_dx += i_b * s_dx_b + o_c
    if p_tail is not None:
        p_tail += o_c
    first = i_span * span
    end = tl.minimum(first + span, T)
    i_part = i_b * spans + i_span
    NB: tl.constexpr = (H + BR - 1) // BR
    p_tap_sums += i_part * (TAPS * 3 * H * W) + o_c
    if p_norm_sums is not None:
        p_norm_sums += ((i_part * NB + i_block) * 2 + i_kind) * BW
    o_h, o_w = tl.cast(o_h, tl.int64)[:, None], tl.cast(o_w, tl.int64)[None, :]
    # fmt: off
    if i_kind == 2:
        p_do = p_dv + i_b * s_dv_b + o_h * s_dv_h + o_w * s_dv_w
        _walk(i_b, first, end, T, p_x, p_taps, None, p_do, p_dx, p_tail, p_sequence, p_position, p_tap_sums, p_norm_sums, o_c, m_x,
              s_t, s_dv_t, s_dx_t, rms_eps, l2_eps, H, W, TAPS, True, False, False, FAST)
    else:
        p_do, p_norm, s_do_t = p_dq + i_b * s_dq_b + o_h * s_dq_h + o_w * s_dq_w, p_q_norm, s_dq_t
        if i_kind == 1:
            p_do, s_do_t = p_dk + i_b * s_dk_b + o_h * s_dk_h + o_w * s_dk_w, s_dk_t
            if p_k_norm is not None:
                p_norm = p_k_norm
        _walk(i_b, first, end, T, p_x, p_taps, p_norm, p_do, p_dx, p_tail, p_sequence, p_position, p_tap_sums, p_norm_sums, o_c, m_x,
              s_t, s_do_t, s_dx_t, rms_eps, l2_eps, H, W, TAPS, SILU, p_q_norm is not None, L2, FAST)
    if 4 * H + G <= BE:
        if i_kind == 2:  # whose walkers have no norms
            heads_backward(i_b, first, end, i_block, p_deta, p_dmu, p_dgate, p_logits, p_bias, p_dlogits,
                           p_bias_sums + (i_part * NB + i_block) * (4 * H + G), s_b, s_t, s_c, s_deta_b, s_deta_t, s_deta_h, s_deta_i,
                           s_dmu_b, s_dmu_t, s_dmu_h, s_dgate_b, s_dgate_t, s_dgate_c, s_dx_b, s_dx_t, H, G, NB, BT, BE, FAST)
    else:
        i_share = i_kind * NB + i_block
        heads_backward(i_b, first, end, i_share, p_deta, p_dmu, p_dgate, p_logits, p_bias, p_dlogits,
                       p_bias_sums + (i_part * 3 * NB + i_share) * (4 * H + G), s_b, s_t, s_c, s_deta_b, s_deta_t, s_deta_h, s_deta_i,
                       s_dmu_b, s_dmu_t, s_dmu_h, s_dgate_b, s_dgate_t, s_dgate_c, s_dx_b, s_dx_t, H, G, 3 * NB, BT, BE, FAST)
    # fmt: on
