"""The backward of the reads of `ttt_mlp`, every chunk at once: operands of the weights, dQ, and the reads' part of dW."""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.bwd_regions import GROUPS, gradient_regions, operand_regions, read_operands
from allmem_ops.ops.ttt_mlp.kernels.common import (
    NONE,
    POST_WRITE,
    PRE_WRITE,
    chunk_span,
    load_three,
    row_scale,
    sequence_span,
    slot_owner,
    store_three,
)
from allmem_ops.ops.ttt_mlp.kernels.pairs import load_operand, operand, pair, part, prefetch, silu, store_operand, token_mask


@triton.jit
def row_scales(size, n, i_r, i_h, i_c, o_d, o_h, eps, D: tl.constexpr, HID: tl.constexpr, NORM: tl.constexpr, FAST: tl.constexpr):
    """Factors of the rows of X before chunk `i_c` (slot and head `i_r`) that make it the chunk's write point: gate, up, down."""
    if NORM == NONE:
        one_h, one_d = tl.full([o_h.shape[0]], 1.0, dtype=tl.float32), tl.full([o_d.shape[0]], 1.0, dtype=tl.float32)
        return one_h, one_h, one_d
    else:
        p_size = size + tl.cast(i_r, tl.int64) * (2 * HID + D)
        p_n = n + i_h * (2 * HID + D)
        m_h, m_d = o_h < HID, o_d < D
        s_gate = row_scale(tl.load(p_n + o_h, mask=m_h, other=0.0), tl.load(p_size + o_h, mask=m_h, other=0.0), eps, FAST)
        s_up = row_scale(tl.load(p_n + HID + o_h, mask=m_h, other=0.0), tl.load(p_size + HID + o_h, mask=m_h, other=0.0), eps, FAST)
        s_down = row_scale(
            tl.load(p_n + 2 * HID + o_d, mask=m_d, other=0.0), tl.load(p_size + 2 * HID + o_d, mask=m_d, other=0.0), eps, FAST
        )
        if NORM == POST_WRITE:
            # the first weights are taken as they are
            s_gate, s_up, s_down = tl.where(i_c > 0, s_gate, 1.0), tl.where(i_c > 0, s_up, 1.0), tl.where(i_c > 0, s_down, 1.0)
        return s_gate, s_up, s_down


@triton.jit(do_not_specialize=["R", "H", "steps"])
def ttt_mlp_bwd_pack_kernel(
    x, size, n, slots, operands, scratch, R, H, steps, eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Operands from X: what queries read and, gate and up alone, the chunk's write point. Sets the chain's counters. Grid (R * slices,)."""
    SLICES: tl.constexpr = (HID + BH - 1) // BH
    i_r, i_k = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES * BH
    if i_r + i_k == 0:
        tl.store(tl.cast(scratch, tl.pointer_type(tl.int32)) + 32 * tl.arange(0, GROUPS), tl.zeros([GROUPS], dtype=tl.int32))
    i_n, i_c = slot_owner(slots, i_r // H, steps, PACKED)
    if i_n < 0:
        return
    point_gate_up, read_gate_up, read_down = operand_regions(operands, R, D, HID)
    o_d, o_h = tl.arange(0, BD), i_k + tl.arange(0, BH)
    m_d = o_d < D
    b_gate, b_up, b_down = load_three(x, i_r, o_d, o_h, m_d[:, None] & (o_h < HID)[None, :], D, HID)
    s_gate, s_up, s_down = row_scales(size, n, i_r, i_r % H, i_c, o_d, o_h, eps, D, HID, NORM, FAST)
    if NORM == PRE_WRITE:
        store_operand(read_gate_up, i_r, i_k, o_d, m_d, pair(b_gate, b_up), D, HID, BH, 2)
    else:
        b_down *= s_down[:, None]
    store_operand(read_down, i_r, i_k, o_d, m_d, b_down, D, HID, BH, 1)
    store_operand(point_gate_up, i_r, i_k, o_d, m_d, pair(b_gate * s_gate[None, :], b_up * s_up[None, :]), D, HID, BH, 2)


@triton.jit(do_not_specialize=["R", "T", "chunk_size", "H", "steps", "tiles"])
def ttt_mlp_bwd_dq_kernel(
    q, do, dq, cu_seqlens, count, slots, operands, R, T, chunk_size, H, steps, tiles,
    sq_b, sq_t, sq_h, sq_d, so_b, so_t, so_h, so_d,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, SAME: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, RESIDUAL: tl.constexpr, PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of a chunk's queries, the hidden units in their order. Grid (R * tiles,); dq is contiguous."""
    pid = tl.program_id(0)
    i_t, i_r = pid % tiles, pid // tiles
    i_n, i_c = slot_owner(slots, i_r // H, steps, PACKED)
    if i_n < 0:
        return
    i_b, begin, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    start, stop = chunk_span(i_c, length, held, chunk_size)
    start += i_t * BT
    if start >= stop:
        return
    gate_up, down = read_operands(operands, R, D, HID, SAME)
    dtype = gate_up.dtype.element_ty
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    mask = token_mask(o_t < stop - start, o_d, D)
    i_b, i_h, t = tl.cast(i_b, tl.int64), tl.cast(i_r % H, tl.int64), tl.cast(begin + start, tl.int64)
    p_q = q + i_b * sq_b + i_h * sq_h + t * sq_t
    p_do = do + i_b * so_b + i_h * so_h + t * so_t
    b_q = tl.cast(tl.load(p_q + (o_t[:, None] * sq_t + o_d[None, :] * sq_d), mask=mask, other=0.0), dtype)
    b_do = tl.cast(tl.load(p_do + (o_t[:, None] * so_t + o_d[None, :] * so_d), mask=mask, other=0.0), dtype)
    b_dq = tl.zeros([BT, BD], dtype=tl.float32)
    for i_k in tl.range(0, HID, BH):
        b_gu = operand(load_operand(gate_up, i_r, i_k, o_d, D, HID, BH, 2), dtype, PREC)
        b_w = operand(load_operand(down, i_r, i_k, o_d, D, HID, BH, 1), dtype, PREC)
        # [BT, BD] @ [BD, 2BH] -> [BT, 2BH];  [BT, BD] @ [BD, BH] -> [BT, BH]
        b_a, b_b = part(tl.dot(b_q, b_gu, input_precision=PREC))
        b_p = tl.dot(b_do, b_w, input_precision=PREC)
        b_silu, b_slope = silu(b_a, FAST)[:2]
        # [BT, 2BH] @ [2BH, BD] -> [BT, BD]
        b_dq = tl.dot(operand(pair(b_p * b_b * b_slope, b_p * b_silu), dtype, PREC), tl.trans(b_gu), b_dq, input_precision=PREC)
    if RESIDUAL:
        b_dq += tl.cast(b_do, tl.float32)
    p_dq = dq + ((i_b * T + t) * H + i_h) * D
    tl.store(p_dq + (o_t[:, None] * (H * D) + o_d[None, :]), tl.cast(b_dq, dq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "X", "T", "chunk_size", "H", "steps"])
def ttt_mlp_bwd_dread_kernel(
    q, do, cu_seqlens, count, slots, operands, scratch, R, X, T, chunk_size, H, steps,
    sq_b, sq_t, sq_h, sq_d, so_b, so_t, so_h, so_d,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, AHEAD: tl.constexpr, SAME: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradient [d, h] of what a slot's queries read, summed over its tokens. Grid (R * slices,).

    The slices of a slot are neighbours: its tokens come from memory once. AHEAD: see `second_order`.
    """
    SLICES: tl.constexpr = (HID + BH - 1) // BH
    i_k, i_r = tl.program_id(0) % SLICES * BH, tl.program_id(0) // SLICES
    i_n, i_c = slot_owner(slots, i_r // H, steps, PACKED)
    if i_n < 0:
        return
    i_b, begin, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    start, stop = chunk_span(i_c, length, held, chunk_size)
    gate_up, down = read_operands(operands, R, D, HID, SAME)
    dread, _, _, _ = gradient_regions(scratch, R, X, D, HID)
    dtype = gate_up.dtype.element_ty
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    i_b, i_h, t = tl.cast(i_b, tl.int64), tl.cast(i_r % H, tl.int64), tl.cast(begin + start, tl.int64)
    p_q = q + i_b * sq_b + i_h * sq_h + t * sq_t
    p_do = do + i_b * so_b + i_h * so_h + t * so_t
    f_q = o_t[:, None] * sq_t + o_d[None, :] * sq_d
    f_do = o_t[:, None] * so_t + o_d[None, :] * so_d
    b_gu = operand(load_operand(gate_up, i_r, i_k, o_d, D, HID, BH, 2), dtype, PREC)
    b_w = operand(load_operand(down, i_r, i_k, o_d, D, HID, BH, 1), dtype, PREC)
    g_gate_up = tl.zeros([BD, 2 * BH], dtype=tl.float32)
    g_down = tl.zeros([BD, BH], dtype=tl.float32)
    for i_t in tl.range(0, stop - start, BT):
        rest = stop - start - i_t
        mask = token_mask(o_t < rest, o_d, D)
        i_t = tl.cast(i_t, tl.int64)
        if AHEAD:
            prefetch(p_q + i_t * sq_t, sq_t, BT, rest, D, BT, FAST)
            prefetch(p_do + i_t * so_t, so_t, BT, rest, D, BT, FAST)
        b_q = tl.cast(tl.load(p_q + i_t * sq_t + f_q, mask=mask, other=0.0), dtype)
        b_do = tl.cast(tl.load(p_do + i_t * so_t + f_do, mask=mask, other=0.0), dtype)
        # [BT, BD] @ [BD, 2BH] -> [BT, 2BH];  [BT, BD] @ [BD, BH] -> [BT, BH]
        b_a, b_b = part(tl.dot(b_q, b_gu, input_precision=PREC))
        b_p = tl.dot(b_do, b_w, input_precision=PREC)
        b_silu, b_slope = silu(b_a, FAST)[:2]
        # [BD, BT] @ [BT, 2BH] -> [BD, 2BH];  [BD, BT] @ [BT, BH] -> [BD, BH]
        g_down = tl.dot(tl.trans(b_do), operand(b_silu * b_b, dtype, PREC), g_down, input_precision=PREC)
        b_y = operand(pair(b_p * b_b * b_slope, b_p * b_silu), dtype, PREC)
        g_gate_up = tl.dot(tl.trans(b_q), b_y, g_gate_up, input_precision=PREC)
    g_gate, g_up = part(g_gate_up)
    o_h = i_k + tl.arange(0, BH)
    store_three(dread, i_r, o_d, o_h, (o_d < D)[:, None] & (o_h < HID)[None, :], g_gate, g_up, g_down, D, HID)
