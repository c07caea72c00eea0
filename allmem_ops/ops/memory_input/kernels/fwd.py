"""Forward of the convolution, its activation and the norms: q, k and v from their columns of the projection."""

import triton
import triton.language as tl

from allmem_ops.ops.memory_input.kernels.heads import heads_forward
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
    b_w,
    b_w1,
    b_w2,
    b_w3,
    b_norm,
    p_out,
    p_tail,
    p_sequence,
    p_position,
    end,
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
    if p_position is not None:
        position, o_tail = token_place(i_b, i_t, end, p_tail, p_sequence, p_position, (TAPS - 1) * 3 * H * W)
        b_x1 = within(b_x1, p_tail, o_tail, position, m_x, 1, TAPS, 3 * H * W)
        b_x2 = within(b_x2, p_tail, o_tail, position, m_x, 2, TAPS, 3 * H * W)
        b_x3 = within(b_x3, p_tail, o_tail, position, m_x, 3, TAPS, 3 * H * W)
    b_y = convolved(b_x, b_x1, b_x2, b_x3, b_w, b_w1, b_w2, b_w3, TAPS)
    if SILU:
        b_y *= sigmoid(b_y, FAST)
    if RMS or L2:
        b_z = b_y
        if RMS:
            b_z = b_y * b_norm
        b_r, b_l = norm_factors(b_y, b_z, rms_eps, l2_eps, W, RMS, L2)
        b_y = b_z * (b_r * b_l)
    tl.store(p_out, b_y.to(p_out.dtype.element_ty), mask=below(m_x, i_t, end))


@triton.jit
def _walk(
    i_b,
    first,
    end,
    p_x,
    p_taps,
    p_norm,
    p_out,
    p_tail,
    p_sequence,
    p_position,
    o_c,
    m_x,
    s_t,
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
    """p_x, p_out: at token 0 of the row."""
    D: tl.constexpr = H * W
    C: tl.constexpr = 3 * D
    # Before everything else: they wait for the memory, and the taps' loads end at a barrier.
    p_now = p_x + tl.cast(first, tl.int64) * s_t
    b_next, b_next1 = load_pair(p_now, s_t, first, end, m_x)
    b_next2, b_next3 = load_pair(p_now + 2 * s_t, s_t, first + 2, end, m_x)
    position, o_tail = token_place(i_b, first, end, p_tail, p_sequence, p_position, (TAPS - 1) * C)
    b_x1 = earlier(p_x, s_t, p_tail, o_tail, first, position, m_x, 1, TAPS, C)
    b_x2 = earlier(p_x, s_t, p_tail, o_tail, first, position, m_x, 2, TAPS, C)
    b_x3 = earlier(p_x, s_t, p_tail, o_tail, first, position, m_x, 3, TAPS, C)
    b_w, b_w1, b_w2, b_w3 = load_taps(p_taps, o_c, m_x, TAPS)
    b_norm = b_w
    if RMS:
        o_w = tl.arange(0, m_x.shape[1])
        b_norm = tl.load(p_norm + o_w, mask=o_w < W, other=0.0).to(tl.float32)[None, :]
    # Pointers move on with the loop: the products of 64 bits for a token's place were a tenth of all instructions.
    p_out += tl.cast(first, tl.int64) * D
    for i_t in tl.range(first, end, 4):
        b_a, b_b, b_c, b_d = b_next, b_next1, b_next2, b_next3
        p_now += 4 * s_t
        b_next, b_next1 = load_pair(p_now, s_t, i_t + 4, end, m_x)
        b_next2, b_next3 = load_pair(p_now + 2 * s_t, s_t, i_t + 6, end, m_x)
        b_a, b_b, b_c, b_d = b_a.to(tl.float32), b_b.to(tl.float32), b_c.to(tl.float32), b_d.to(tl.float32)
        # fmt: off
        _token(i_b, i_t, b_a, b_x1, b_x2, b_x3, b_w, b_w1, b_w2, b_w3, b_norm, p_out, p_tail, p_sequence, p_position, end, m_x,
               rms_eps, l2_eps, H, W, TAPS, SILU, RMS, L2, FAST)
        _token(i_b, i_t + 1, b_b, b_a, b_x1, b_x2, b_w, b_w1, b_w2, b_w3, b_norm, p_out + D, p_tail, p_sequence, p_position, end, m_x,
               rms_eps, l2_eps, H, W, TAPS, SILU, RMS, L2, FAST)
        _token(i_b, i_t + 2, b_c, b_b, b_a, b_x1, b_w, b_w1, b_w2, b_w3, b_norm, p_out + 2 * D, p_tail, p_sequence, p_position, end, m_x,
               rms_eps, l2_eps, H, W, TAPS, SILU, RMS, L2, FAST)
        _token(i_b, i_t + 3, b_d, b_c, b_b, b_a, b_w, b_w1, b_w2, b_w3, b_norm, p_out + 3 * D, p_tail, p_sequence, p_position, end, m_x,
               rms_eps, l2_eps, H, W, TAPS, SILU, RMS, L2, FAST)
        # fmt: on
        b_x1, b_x2, b_x3 = b_d, b_c, b_b
        p_out += 4 * D


@triton.jit
def _update_tail(i_b, p_x, p_tail, p_active, T, m_x, s_t, TAPS: tl.constexpr, C: tl.constexpr):
    """The inputs before token T of the row, which is one sequence, in the place of its tail."""
    o_tail = i_b * ((TAPS - 1) * C)
    b_x1 = earlier(p_x, s_t, p_tail, o_tail, T, T, m_x, 1, TAPS, C)
    b_x2 = earlier(p_x, s_t, p_tail, o_tail, T, T, m_x, 2, TAPS, C)
    b_x3 = earlier(p_x, s_t, p_tail, o_tail, T, T, m_x, 3, TAPS, C)
    if p_active is not None:
        m_x = below(m_x, 0, tl.cast(tl.load(p_active + i_b), tl.int32))
    if TAPS > 1:
        tl.store(p_tail + o_tail + (TAPS - 2) * C, b_x1.to(p_tail.dtype.element_ty), mask=m_x)
    if TAPS > 2:
        tl.store(p_tail + o_tail + (TAPS - 3) * C, b_x2.to(p_tail.dtype.element_ty), mask=m_x)
    if TAPS > 3:
        tl.store(p_tail + o_tail + (TAPS - 4) * C, b_x3.to(p_tail.dtype.element_ty), mask=m_x)


@triton.jit(
    do_not_specialize=["T", "span", "spans", "rms_eps", "l2_eps", "s_b", "s_t"],
    do_not_specialize_on_alignment=["T", "span", "spans", "s_b", "s_t"],
)
def memory_input_fwd_kernel(
    p_x,
    p_taps,
    p_q_norm,
    p_k_norm,
    p_bias,
    p_q,
    p_k,
    p_v,
    p_eta,
    p_mu,
    p_gate,
    p_tail,
    p_active,
    p_sequence,
    p_position,
    T,
    span,
    spans,
    rms_eps,
    l2_eps,
    s_b,
    s_t,
    s_c,
    UNIT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    UPDATE: tl.constexpr,
    SILU: tl.constexpr,
    L2: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    FAST: tl.constexpr,
):
    """A program: a span of tokens, BR heads of q, of k or of v, and its share of the columns after them.

    Strides s_b and s_t are in units of UNIT elements. UPDATE: p_tail becomes what comes before token T, in the rows that p_active
    names; needs one span, so that no other program reads what this one overwrites.
    """
    s_b, s_t = times(s_b, UNIT), times(s_t, UNIT)
    i_b, i_span, i_kind, i_block = program_place(tl.program_id(0), spans, H, BR)
    o_h, o_w = i_block * BR + tl.arange(0, BR), tl.arange(0, BW)
    m_x = (o_h < H)[:, None] & (o_w < W)[None, :]
    o_out = o_h[:, None] * W + o_w[None, :]
    o_c = i_kind * (H * W) + o_out
    p_logits = p_x + 3 * H * W * tl.cast(s_c, tl.int64)
    p_x += i_b * s_b + tl.cast(o_c, tl.int64) * s_c
    if p_tail is not None:
        p_tail += o_c
    first = i_span * span
    end = tl.minimum(first + span, T)
    o_out = i_b * T * (H * W) + o_out
    # fmt: off
    if i_kind == 2:
        _walk(i_b, first, end, p_x, p_taps, None, p_v + o_out, p_tail, p_sequence, p_position, o_c, m_x, s_t, rms_eps, l2_eps,
              H, W, TAPS, True, False, False, FAST)
    else:
        p_out, p_norm = p_q, p_q_norm
        if i_kind == 1:
            p_out = p_k
            if p_k_norm is not None:
                p_norm = p_k_norm
        _walk(i_b, first, end, p_x, p_taps, p_norm, p_out + o_out, p_tail, p_sequence, p_position, o_c, m_x, s_t, rms_eps, l2_eps,
              H, W, TAPS, SILU, p_q_norm is not None, L2, FAST)
    # fmt: on
    NB: tl.constexpr = (H + BR - 1) // BR
    if 4 * H + G <= BE:
        if i_kind == 2:  # whose walkers have no norms
            heads_forward(i_b, first, end, i_block, p_logits, p_bias, p_eta, p_mu, p_gate, T, s_b, s_t, s_c, H, G, NB, BT, BE, FAST)
    else:
        i_share = i_kind * NB + i_block
        heads_forward(i_b, first, end, i_share, p_logits, p_bias, p_eta, p_mu, p_gate, T, s_b, s_t, s_c, H, G, 3 * NB, BT, BE, FAST)
    if UPDATE:
        _update_tail(i_b, p_x, p_tail, p_active, T, m_x, s_t, TAPS, 3 * H * W)
