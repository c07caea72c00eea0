"""The reads of `ttt_mlp`: every chunk's queries through the weights that its slot holds, all in one launch."""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.common import POST_WRITE, chunk_span, row_scale, sequence_span, sigmoid, slot_owner


@triton.jit
def load_slice(p_w, i_k, m_d, D: tl.constexpr, HID: tl.constexpr, BH: tl.constexpr):
    """Wgate, Wup, Wdown of BH hidden units from `i_k` on, each [BD, BH]."""
    o_k = i_k + tl.arange(0, BH)[None, :]
    mask = m_d[:, None] & (o_k < HID)
    return (
        tl.load(p_w + o_k, mask=mask, other=0.0),
        tl.load(p_w + D * HID + o_k, mask=mask, other=0.0),
        tl.load(p_w + 2 * D * HID + o_k, mask=mask, other=0.0),
    )


@triton.jit
def read_slice(b_q, b_gate, b_up, b_down, b_o, PREC: tl.constexpr, FAST: tl.constexpr):
    """O plus what these hidden units add to it."""
    # [BT, BD] @ [BD, BH] -> [BT, BH]
    b_a = tl.dot(b_q, b_gate, input_precision=PREC)
    b_b = tl.dot(b_q, b_up, input_precision=PREC)
    b_y = tl.cast(b_a * sigmoid(b_a, FAST) * b_b, b_q.dtype)
    # [BT, BH] @ [BH, BD] -> [BT, BD]
    return tl.dot(b_y, tl.trans(b_down), b_o, input_precision=PREC)


@triton.jit(do_not_specialize=["T", "chunk_size", "H", "steps", "programs"])
def ttt_mlp_fwd_read_kernel(
    q, o, cu_seqlens, count, slots, w, size, n,
    T, chunk_size, H, steps, programs, eps,
    sq_b, sq_t, sq_h, sq_d, so_b, so_t, so_h, so_d,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
    NORM: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
    RESIDUAL: tl.constexpr, RESIDENT: tl.constexpr, PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """O = f(W, Q). Grid (slots * H * programs,): program i_p of a (slot, head) reads its tiles i_p, i_p + programs, ...

    RESIDENT: one or two slices of BH hidden units are all there are; they are loaded once. Else all slices for every tile.
    """
    pid = tl.program_id(0)
    i_p, i_r = pid % programs, pid // programs
    i_h, i_s = i_r % H, i_r // H
    i_n, i_c = slot_owner(slots, i_s, steps, PACKED)
    if i_n < 0:
        return
    i_b, begin, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    start, stop = chunk_span(i_c, length, held, chunk_size)
    tiles = tl.cdiv(stop - start, BT)
    if i_p >= tiles:
        return
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    j_t = tl.cast(o_t, tl.int64)
    m_d = o_d < D
    p_w = w + tl.cast(i_r, tl.int64) * (3 * D * HID) + o_d[:, None] * HID
    s_down = tl.full([BD], 1.0, dtype=tl.float32)
    if NORM == POST_WRITE:
        if i_c > 0:
            b_size = tl.load(size + tl.cast(i_r, tl.int64) * (2 * HID + D) + 2 * HID + o_d, mask=m_d, other=0.0)
            s_down = row_scale(tl.load(n + i_h * (2 * HID + D) + 2 * HID + o_d, mask=m_d, other=0.0), b_size, eps)
    i_b, begin, i_h = tl.cast(i_b, tl.int64), tl.cast(begin, tl.int64), tl.cast(i_h, tl.int64)
    p_q = q + i_b * sq_b + begin * sq_t + i_h * sq_h
    p_o = o + i_b * so_b + begin * so_t + i_h * so_h
    if RESIDENT:
        w_0 = load_slice(p_w, 0, m_d, D, HID, BH)
        w_1 = load_slice(p_w, BH, m_d, D, HID, BH) if HID > BH else w_0
    for i_t in tl.range(i_p, tiles, programs):
        t = start + i_t * BT
        mask = (o_t < stop - t)[:, None] & m_d[None, :]
        t = tl.cast(t, tl.int64)
        b_q = tl.load(p_q + t * sq_t + (j_t[:, None] * sq_t + o_d[None, :] * sq_d), mask=mask, other=0.0)
        b_o = tl.zeros([BT, BD], dtype=tl.float32)
        if RESIDENT:
            b_o = read_slice(b_q, w_0[0], w_0[1], w_0[2], b_o, PREC, FAST)
            if HID > BH:
                b_o = read_slice(b_q, w_1[0], w_1[1], w_1[2], b_o, PREC, FAST)
        else:
            for i_k in tl.range(0, HID, BH):
                b_gate, b_up, b_down = load_slice(p_w, i_k, m_d, D, HID, BH)
                b_o = read_slice(b_q, b_gate, b_up, b_down, b_o, PREC, FAST)
        if NORM == POST_WRITE:
            b_o *= s_down[None, :]
        if RESIDUAL:
            b_o += tl.cast(b_q, tl.float32)
        tl.store(p_o + t * so_t + (j_t[:, None] * so_t + o_d[None, :] * so_d), tl.cast(b_o, o.dtype.element_ty), mask=mask)
