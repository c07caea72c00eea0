"""The write chain of `ttt_mlp`: serial over chunks, parallel over sequences, heads, hidden units and a chunk's tokens.

A (sequence, head) is worked on by PARTS = ceil(h / HS) * SP programs. Program (i_s, i_k) sums the gradient of HS hidden units over
the tiles i_k, i_k + SP, ... of the chunk's tokens into a slab; then each program owns HP = HS / SP of these hidden units, adds their
SP slabs in order and carries W and M on. Programs are coupled only there, in the row norms of Wdown and, with a clip, in |G|.

Two forms with the same device functions: three kernels a step (`ttt_mlp_fwd_write_kernel`, `..._clip_kernel`, `..._commit_kernel`), and
one persistent kernel. Slots, spans and the names of what is stored: slots.py. The code works with D = -G, which removes every sign.
"""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.common import (
    NONE,
    POST_WRITE,
    chunk_span,
    column_size,
    load_public,
    load_sizes,
    load_three,
    point,
    row_scale,
    row_sizes,
    sequence_slots,
    sequence_span,
    sigmoid,
    store_public,
    store_three,
)
from allmem_ops.ops.ttt_mlp.kernels.pairs import load_operand, operand, pair, part, store_operand

# ---- one chunk


@triton.jit
def descent(
    p_k, p_v, p_eta, sk_t, sk_d, sv_t, sv_d, se_t, se_e,
    b_gate, b_up, b_down, start, stop, i_k,
    D: tl.constexpr, BT: tl.constexpr, SP: tl.constexpr, PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """D [BD, HS] for gate, up and down at the weights `b_*` [BD, HS] in the operands' dtype.

    Of tokens [start, stop) those in tiles i_k, i_k + SP, ...; the pointers point at token 0.
    """
    BD: tl.constexpr = b_gate.shape[0]
    HS: tl.constexpr = b_gate.shape[1]
    dtype = b_gate.dtype
    o_d = tl.arange(0, BD)
    # With gate and up as a pair, two products a side instead of three: a tile mostly consists of waiting for them. At d = 128 the pair's
    # operand and three stages of tiles are more than shared memory holds; float32 has no tensor cores to wait for.
    PAIRED: tl.constexpr = (BD <= 64) and (dtype != tl.float32)
    # factors that carry a rate leave the range of float16; tf32 has float16's mantissa and float32's range
    wide: tl.constexpr = tl.float32 if dtype == tl.float16 else dtype
    WIDE_PREC: tl.constexpr = "tf32" if dtype == tl.float16 else PREC
    d_down = tl.zeros([BD, HS], dtype=tl.float32)
    if PAIRED:
        b_gu = operand(pair(b_gate, b_up), dtype, PREC)
        d_gate_up = tl.zeros([BD, 2 * HS], dtype=tl.float32)
    else:
        d_gate = tl.zeros([BD, HS], dtype=tl.float32)
        d_up = tl.zeros([BD, HS], dtype=tl.float32)
    for i_t in tl.range(i_k, tl.cdiv(stop - start, BT), SP):
        t = start + i_t * BT
        o_t = tl.arange(0, BT)
        m_t = o_t < stop - t
        mask = m_t[:, None] & (o_d < D)[None, :]
        t = tl.cast(t, tl.int64)
        o_t = tl.cast(o_t, tl.int64)
        b_k = tl.load(p_k + t * sk_t + (o_t[:, None] * sk_t + o_d[None, :] * sk_d), mask=mask, other=0.0)
        b_v = tl.load(p_v + t * sv_t + (o_t[:, None] * sv_t + o_d[None, :] * sv_d), mask=mask, other=0.0)
        p_e = p_eta + t * se_t + o_t * se_t
        e_gate = tl.load(p_e, mask=m_t, other=0.0)[:, None]
        e_up = tl.load(p_e + se_e, mask=m_t, other=0.0)[:, None]
        e_down = tl.load(p_e + 2 * se_e, mask=m_t, other=0.0)[:, None]
        # [BT, BD] @ [BD, HS] -> [BT, HS], of a pair [BD, 2HS] -> [BT, 2HS]
        if PAIRED:
            b_a, b_b = part(tl.dot(b_k, b_gu, input_precision=PREC))
        else:
            b_a = tl.dot(b_k, b_gate, input_precision=PREC)
            b_b = tl.dot(b_k, b_up, input_precision=PREC)
        b_p = tl.dot(b_v, b_down, input_precision=PREC)
        b_s = sigmoid(b_a, FAST)
        b_silu = b_a * b_s
        b_slope = b_s + b_silu * (1.0 - b_s)
        y_gate = b_p * b_b * b_slope * e_gate
        y_up = b_p * b_silu * e_up
        y_down = b_silu * b_b * e_down
        # [BD, BT] @ [BT, HS] -> [BD, HS], of a pair [BT, 2HS] -> [BD, 2HS]; the order is the one that spills least
        b_kt = tl.trans(tl.cast(b_k, wide))
        if PAIRED:
            d_down = tl.dot(tl.trans(tl.cast(b_v, wide)), operand(y_down, wide, WIDE_PREC), d_down, input_precision=WIDE_PREC)
            d_gate_up = tl.dot(b_kt, operand(pair(y_gate, y_up), wide, WIDE_PREC), d_gate_up, input_precision=WIDE_PREC)
        else:
            d_gate = tl.dot(b_kt, operand(y_gate, wide, WIDE_PREC), d_gate, input_precision=WIDE_PREC)
            d_up = tl.dot(b_kt, operand(y_up, wide, WIDE_PREC), d_up, input_precision=WIDE_PREC)
            d_down = tl.dot(tl.trans(tl.cast(b_v, wide)), operand(y_down, wide, WIDE_PREC), d_down, input_precision=WIDE_PREC)
    if PAIRED:
        d_gate, d_up = part(d_gate_up)
    return d_gate, d_up, d_down


@triton.jit
def store_slab(slabs, row, i_h, o_d, d_gate, d_up, d_down, D: tl.constexpr, HID: tl.constexpr):
    """D of hidden units `i_h` on into slab `row`: [d, 2h] of gate and up, a pair, and [d, h] of down.

    As a pair one pass through shared memory takes both from the products' layout to that of the store.
    """
    HS: tl.constexpr = d_gate.shape[1]
    at = slabs + tl.cast(row, tl.int64) * (3 * D * HID)
    store_operand(at, 0, i_h, o_d, o_d < D, pair(d_gate, d_up), D, HID, HS, 2)
    store_operand(at + 2 * D * HID, 0, i_h, o_d, o_d < D, d_down, D, HID, HS, 1)


@triton.jit
def sum_slabs(slabs, i_x, i_h, o_d, D: tl.constexpr, HID: tl.constexpr, SP: tl.constexpr, HP: tl.constexpr):
    """D of a part's HP hidden units, `i_h` on: the slabs in order."""
    d_gate_up = tl.zeros([o_d.shape[0], 2 * HP], dtype=tl.float32)
    d_down = tl.zeros([o_d.shape[0], HP], dtype=tl.float32)
    for i_k in tl.static_range(SP):
        at = slabs + (tl.cast(i_x, tl.int64) * SP + i_k) * (3 * D * HID)
        d_gate_up += load_operand(at, 0, i_h, o_d, D, HID, HP, 2)
        d_down += load_operand(at + 2 * D * HID, 0, i_h, o_d, D, HID, HP, 1)
    d_gate, d_up = part(d_gate_up)
    return d_gate, d_up, d_down


@triton.jit
def with_held(
    d_gate, d_up, d_down, g_gate, g_up, g_down, i_x, o_d, o_h, mask, i_c, D: tl.constexpr, HID: tl.constexpr, STATE: tl.constexpr
):  # fmt: skip
    """D with what the open chunk of the initial state holds, in its first chunk."""
    if STATE:
        if i_c == 0:
            h_gate, h_up, h_down = load_public(g_gate, g_up, g_down, i_x, o_d, o_h, mask, D, HID)
            d_gate -= h_gate
            d_up -= h_up
            d_down -= h_down
    return d_gate, d_up, d_down


@triton.jit
def store_squares(p, i_x, i_p, d_gate, d_up, d_down, PARTS: tl.constexpr):
    """A part's share of |G|^2 of gate, up and down into [..., PARTS, 3]."""
    at = p + (tl.cast(i_x, tl.int64) * PARTS + i_p) * 3
    tl.store(at, tl.sum(tl.sum(d_gate * d_gate, 1), 0))
    tl.store(at + 1, tl.sum(tl.sum(d_up * d_up, 1), 0))
    tl.store(at + 2, tl.sum(tl.sum(d_down * d_down, 1), 0))


@triton.jit
def clip(d_gate, d_up, d_down, squares, g_size, i_x, i_r, i_p, grad_clip, PARTS: tl.constexpr):
    """D * min(1, grad_clip / |D|) for each matrix, from the parts' shares added in their order; |D| is kept in `g_size`."""
    at = squares + tl.cast(i_x, tl.int64) * (PARTS * 3)
    s_gate = 0.0
    s_up = 0.0
    s_down = 0.0
    for i in tl.static_range(PARTS):
        s_gate += tl.load(at + i * 3, cache_modifier=".cg")
        s_up += tl.load(at + i * 3 + 1, cache_modifier=".cg")
        s_down += tl.load(at + i * 3 + 2, cache_modifier=".cg")
    s_gate, s_up, s_down = tl.sqrt_rn(s_gate), tl.sqrt_rn(s_up), tl.sqrt_rn(s_down)
    if i_p == 0:
        p_g = g_size + tl.cast(i_r, tl.int64) * 3
        tl.store(p_g, s_gate)
        tl.store(p_g + 1, s_up)
        tl.store(p_g + 2, s_down)
    d_gate *= grad_clip / tl.maximum(s_gate, grad_clip)
    d_up *= grad_clip / tl.maximum(s_up, grad_clip)
    d_down *= grad_clip / tl.maximum(s_down, grad_clip)
    return d_gate, d_up, d_down


@triton.jit
def chunk_mus(
    p_mu, sm_t, mu_held, mu_mean, e_mu, i_x, i_r, i_p, written, length, held, chunk_size, H,
    PARTS: tl.constexpr, BM: tl.constexpr, STATE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The mean of mu of chunks i_p, i_p + PARTS, ... of a sequence, and of the open chunk the sum; `i_r`: slot 0 and head.

    All of them before the chain begins: inside it, their loads would be waited for in every chunk.
    """
    o_m = tl.arange(0, BM)
    for i_c in tl.range(i_p, written + KEEP, PARTS):
        start, stop = chunk_span(i_c, length, held, chunk_size)
        b_mu = tl.zeros([BM], dtype=tl.float32)
        for t in tl.range(start, stop, BM):
            b_mu += tl.load(p_mu + (tl.cast(t, tl.int64) + o_m) * sm_t, mask=o_m < stop - t, other=0.0)
        total = tl.sum(b_mu, 0)
        if STATE:
            if i_c == 0:
                total += tl.load(mu_held + i_x)
        if i_c < written:
            tl.store(mu_mean + i_r + i_c * H, total / chunk_size)
        else:
            if KEEP:
                tl.store(e_mu + i_x, total)


@triton.jit
def store_weights(
    x, x_read, size, rows, i_x, i_r, i_p, i_c, o_d, o_h, mask, b_gate, b_up, b_down, n_gate, n_up, eps,
    D: tl.constexpr, HID: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A part of X before chunk `i_c` into slot and head `i_r`: fp32, as the read's operand, and what its norms need.

    The read's operand is Wgate and Wup as they are read and Wdown raw: the read scales its rows, the channels of its output.
    """
    store_three(x, i_r, o_d, o_h, mask, b_gate, b_up, b_down, D, HID)
    if NORM != NONE:
        s_gate = column_size(b_gate, FAST)
        s_up = column_size(b_up, FAST)
        p_size = size + tl.cast(i_r, tl.int64) * (2 * HID + D) + o_h
        tl.store(p_size, s_gate, mask=o_h < HID)
        tl.store(p_size + HID, s_up, mask=o_h < HID)
        tl.store(rows + (tl.cast(i_x, tl.int64) * PARTS + i_p) * D + o_d, tl.sum(b_down * b_down, 1), mask=o_d < D)
        if NORM == POST_WRITE:
            b_gate *= tl.where(i_c > 0, row_scale(n_gate, s_gate, eps, FAST), 1.0)[None, :]
            b_up *= tl.where(i_c > 0, row_scale(n_up, s_up, eps, FAST), 1.0)[None, :]
    store_three(x_read, i_r, o_d, o_h, mask, b_gate, b_up, b_down, D, HID)


# ---- a kernel for each part of a step


@triton.jit(do_not_specialize=["T", "chunk_size", "H", "steps", "sm_b"])
def ttt_mlp_fwd_init_kernel(
    mu, cu_seqlens, count, first, w_gate, w_up, w_down, s_gate, s_up, s_down, m_gate, m_up, m_down, mu_held,
    x, x_read, m, m_slots, size, n, mu_mean, e_mu, rows, n_rows, T, chunk_size, H, steps, eps, sm_b, sm_t, sm_h,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr, NORM: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, SAVE_M: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Slot 0 of every sequence, the row norms N, the means of mu. Grid (N * H, PARTS)."""
    HP: tl.constexpr = HS // SP
    PARTS: tl.constexpr = (HID + HS - 1) // HS * SP
    i_x, i_p = tl.program_id(0), tl.program_id(1)
    o_d, o_h = tl.arange(0, BD), i_p * HP + tl.arange(0, HP)
    mask = (o_d < D)[:, None] & (o_h < HID)[None, :]
    i_h = i_x % H
    b_gate, b_up, b_down = load_public(w_gate, w_up, w_down, i_h, o_d, o_h, mask, D, HID)
    n_gate, n_up = column_size(b_gate), column_size(b_up)
    tl.store(n_rows + (tl.cast(i_x, tl.int64) * PARTS + i_p) * D + o_d, tl.sum(b_down * b_down, 1), mask=o_d < D)
    p_n = n + i_h * (2 * HID + D) + o_h
    if i_x < H:
        tl.store(p_n, n_gate, mask=o_h < HID)
        tl.store(p_n + HID, n_up, mask=o_h < HID)
    i_n = i_x // H
    i_b, begin, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    slot, written = sequence_slots(first, i_n, steps, length, held, chunk_size, PACKED, KEEP)
    i_r = slot * H + i_h
    p_mu = mu + tl.cast(i_b, tl.int64) * sm_b + tl.cast(begin, tl.int64) * sm_t + tl.cast(i_h, tl.int64) * sm_h
    chunk_mus(p_mu, sm_t, mu_held, mu_mean, e_mu, i_x, i_r, i_p, written, length, held, chunk_size, H, PARTS, BM, STATE, KEEP)
    z_gate = tl.zeros([BD, HP], dtype=tl.float32)
    z_up = z_gate
    z_down = z_gate
    if STATE:
        b_gate, b_up, b_down = load_public(s_gate, s_up, s_down, i_x, o_d, o_h, mask, D, HID)
        z_gate, z_up, z_down = load_public(m_gate, m_up, m_down, i_x, o_d, o_h, mask, D, HID)
    store_weights(
        x, x_read, size, rows, i_x, i_r, i_p, 0, o_d, o_h, mask, b_gate, b_up, b_down, n_gate, n_up, eps, D, HID, PARTS, NORM, FAST
    )  # fmt: skip
    store_three(m, i_x, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)
    if SAVE_M:
        store_three(m_slots, i_r, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)


@triton.jit(do_not_specialize=["i_c", "T", "chunk_size", "H", "steps"])
def ttt_mlp_fwd_write_kernel(
    k, v, eta, cu_seqlens, count, first, w_gate, w_up, w_down, x, size, rows, n_rows, slabs,
    i_c, T, chunk_size, H, steps, eps,
    sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, SP: tl.constexpr, BT: tl.constexpr,
    NORM: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr,
    PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Slabs of chunk `i_c`'s D. Grid (N * H, slices, SP)."""
    PARTS: tl.constexpr = (HID + HS - 1) // HS * SP
    i_x, i_s, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_n, i_h = i_x // H, i_x % H
    i_b, begin, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    slot, written = sequence_slots(first, i_n, steps, length, held, chunk_size, PACKED, KEEP)
    if i_c >= written + KEEP:
        return
    start, stop = chunk_span(i_c, length, held, chunk_size)
    o_d, o_h = tl.arange(0, BD), i_s * HS + tl.arange(0, HS)
    mask = (o_d < D)[:, None] & (o_h < HID)[None, :]
    i_r = (slot + i_c) * H + i_h
    b_gate, b_up, b_down = load_three(x, i_r, o_d, o_h, mask, D, HID)
    if NORM != NONE:
        w = load_public(w_gate, w_up, w_down, i_h, o_d, o_h, mask, D, HID)
        size_down = row_sizes(rows, i_x, o_d, D, PARTS, FAST)
        n_down = row_sizes(n_rows, i_x, o_d, D, PARTS)
        size_gate, size_up = load_sizes(size, i_r, o_h, D, HID)
        b_gate, b_up, b_down = point(
            b_gate, b_up, b_down, column_size(w[0]), column_size(w[1]), n_down, size_gate, size_up, size_down, i_c, eps, NORM, FAST
        )  # fmt: skip
        if i_s + i_k == 0:
            tl.store(size + tl.cast(i_r, tl.int64) * (2 * HID + D) + 2 * HID + o_d, size_down, mask=o_d < D)
    i_b, begin, i_h = tl.cast(i_b, tl.int64), tl.cast(begin, tl.int64), tl.cast(i_h, tl.int64)
    dtype = k.dtype.element_ty
    d_gate, d_up, d_down = descent(
        k + i_b * sk_b + begin * sk_t + i_h * sk_h, v + i_b * sv_b + begin * sv_t + i_h * sv_h,
        eta + i_b * se_b + begin * se_t + i_h * se_h, sk_t, sk_d, sv_t, sv_d, se_t, se_e,
        tl.cast(b_gate, dtype), tl.cast(b_up, dtype), tl.cast(b_down, dtype),
        start, stop, i_k, D, BT, SP, PREC, FAST,
    )  # fmt: skip
    store_slab(slabs, i_x * SP + i_k, i_s * HS, o_d, d_gate, d_up, d_down, D, HID)


@triton.jit(do_not_specialize=["i_c", "T", "chunk_size", "H", "steps"])
def ttt_mlp_fwd_clip_kernel(
    cu_seqlens, count, first, g_gate, g_up, g_down, slabs, squares, i_c, T, chunk_size, H, steps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, SP: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Sums of squares of every part of chunk `i_c`'s G. Grid (N * H, PARTS)."""
    HP: tl.constexpr = HS // SP
    PARTS: tl.constexpr = (HID + HS - 1) // HS * SP
    i_x, i_p = tl.program_id(0), tl.program_id(1)
    _, _, length, held = sequence_span(cu_seqlens, count, i_x // H, T, chunk_size, PACKED, STATE)
    _, written = sequence_slots(first, i_x // H, steps, length, held, chunk_size, PACKED, KEEP)
    if i_c >= written:
        return
    o_d, o_h = tl.arange(0, BD), i_p * HP + tl.arange(0, HP)
    mask = (o_d < D)[:, None] & (o_h < HID)[None, :]
    d_gate, d_up, d_down = sum_slabs(slabs, i_x, i_p * HP, o_d, D, HID, SP, HP)
    d_gate, d_up, d_down = with_held(d_gate, d_up, d_down, g_gate, g_up, g_down, i_x, o_d, o_h, mask, i_c, D, HID, STATE)
    store_squares(squares, i_x, i_p, d_gate, d_up, d_down, PARTS)


@triton.jit(do_not_specialize=["i_c", "T", "chunk_size", "H", "steps"])
def ttt_mlp_fwd_commit_kernel(
    cu_seqlens, count, first, w_gate, w_up, w_down, g_gate, g_up, g_down,
    x, x_read, m, m_slots, size, rows_in, rows_out, n_rows, slabs, squares, mu_mean, g_size, e_gate, e_up, e_down,
    i_c, T, chunk_size, H, steps, eps, grad_clip,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, SP: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, SAVE_M: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """W and M after chunk `i_c`, or what the open chunk holds at the end. Grid (N * H, PARTS)."""
    HP: tl.constexpr = HS // SP
    PARTS: tl.constexpr = (HID + HS - 1) // HS * SP
    i_x, i_p = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_x // H, i_x % H
    _, _, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    slot, written = sequence_slots(first, i_n, steps, length, held, chunk_size, PACKED, KEEP)
    if i_c >= written + KEEP:
        return
    o_d, o_h = tl.arange(0, BD), i_p * HP + tl.arange(0, HP)
    mask = (o_d < D)[:, None] & (o_h < HID)[None, :]
    d_gate, d_up, d_down = sum_slabs(slabs, i_x, i_p * HP, o_d, D, HID, SP, HP)
    d_gate, d_up, d_down = with_held(d_gate, d_up, d_down, g_gate, g_up, g_down, i_x, o_d, o_h, mask, i_c, D, HID, STATE)
    if i_c == written:
        if KEEP:
            store_public(e_gate, e_up, e_down, i_x, o_d, o_h, mask, 0.0 - d_gate, 0.0 - d_up, 0.0 - d_down, D, HID)
    else:
        i_r = (slot + i_c) * H + i_h
        if CLIP:
            d_gate, d_up, d_down = clip(d_gate, d_up, d_down, squares, g_size, i_x, i_r, i_p, grad_clip, PARTS)
        b_mu = tl.load(mu_mean + i_r)
        z_gate, z_up, z_down = load_three(m, i_x, o_d, o_h, mask, D, HID)
        z_gate, z_up, z_down = b_mu * z_gate + d_gate, b_mu * z_up + d_up, b_mu * z_down + d_down
        b_gate, b_up, b_down = load_three(x, i_r, o_d, o_h, mask, D, HID)
        w = load_public(w_gate, w_up, w_down, i_h, o_d, o_h, mask, D, HID)
        n_gate, n_up = column_size(w[0]), column_size(w[1])
        if NORM != NONE:
            size_down = row_sizes(rows_in, i_x, o_d, D, PARTS, FAST)
            n_down = row_sizes(n_rows, i_x, o_d, D, PARTS)
            size_gate, size_up = load_sizes(size, i_r, o_h, D, HID)
            b_gate, b_up, b_down = point(
                b_gate, b_up, b_down, n_gate, n_up, n_down, size_gate, size_up, size_down, i_c, eps, NORM, FAST
            )  # fmt: skip
        b_gate, b_up, b_down = b_gate + z_gate, b_up + z_up, b_down + z_down
        store_weights(
            x, x_read, size, rows_out, i_x, i_r + H, i_p, i_c + 1, o_d, o_h, mask, b_gate, b_up, b_down, n_gate, n_up, eps,
            D, HID, PARTS, NORM, FAST,
        )  # fmt: skip
        store_three(m, i_x, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)
        if SAVE_M:
            store_three(m_slots, i_r + H, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)


@triton.jit(do_not_specialize=["T", "chunk_size", "H", "steps"])
def ttt_mlp_fwd_finish_kernel(
    cu_seqlens, count, first, w_gate, w_up, w_down, x, m, size, n, rows, n_rows, e_gate, e_up, e_down, f_gate, f_up, f_down,
    T, chunk_size, H, steps, eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, SP: tl.constexpr, NORM: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Row norms of Wdown in every sequence's last slot and in N; the final W and M. Grid (N * H, PARTS)."""
    HP: tl.constexpr = HS // SP
    PARTS: tl.constexpr = (HID + HS - 1) // HS * SP
    i_x, i_p = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_x // H, i_x % H
    _, _, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    slot, i_c = sequence_slots(first, i_n, steps, length, held, chunk_size, PACKED, KEEP)
    i_r = (slot + i_c) * H + i_h
    o_d, o_h = tl.arange(0, BD), i_p * HP + tl.arange(0, HP)
    mask = (o_d < D)[:, None] & (o_h < HID)[None, :]
    n_down = row_sizes(n_rows, i_x, o_d, D, PARTS)
    if i_n + i_p == 0:
        tl.store(n + i_h * (2 * HID + D) + 2 * HID + o_d, n_down, mask=o_d < D)
    size_down = n_down
    if NORM != NONE:
        size_down = row_sizes(rows + (i_c % 2) * tl.num_programs(0) * PARTS * D, i_x, o_d, D, PARTS, FAST)
        if i_p == 0:
            tl.store(size + tl.cast(i_r, tl.int64) * (2 * HID + D) + 2 * HID + o_d, size_down, mask=o_d < D)
    if KEEP:
        b_gate, b_up, b_down = load_three(x, i_r, o_d, o_h, mask, D, HID)
        if NORM == POST_WRITE:
            w = load_public(w_gate, w_up, w_down, i_h, o_d, o_h, mask, D, HID)
            size_gate, size_up = load_sizes(size, i_r, o_h, D, HID)
            b_gate, b_up, b_down = point(
                b_gate, b_up, b_down, column_size(w[0]), column_size(w[1]), n_down, size_gate, size_up, size_down, i_c, eps, NORM, FAST
            )  # fmt: skip
        store_public(e_gate, e_up, e_down, i_x, o_d, o_h, mask, b_gate, b_up, b_down, D, HID)
        b_gate, b_up, b_down = load_three(m, i_x, o_d, o_h, mask, D, HID)
        store_public(f_gate, f_up, f_down, i_x, o_d, o_h, mask, b_gate, b_up, b_down, D, HID)
