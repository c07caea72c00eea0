"""Gradients of k, v and eta: a tile of a chunk, from the gradients dD that the reverse chain has stored."""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.common import chunk_span, sequence_span, slot_owner, written_chunks
from allmem_ops.ops.ttt_mlp.kernels.pairs import load_operand, operand, pair, part, silu, token_mask


@triton.jit
def tokens_tile(
    k, v, eta, dk, dv, deta, cu_seqlens, count, slots, gate_up, d_gate_up, down, i_r, i_t, T, chunk_size, H, steps,
    sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dK, dV and deta of tile `i_t` of slot and head `i_r`, the hidden units in their order; zeros where the chunk is not written.

    gate_up: pairs of the write point's gate and up; d_gate_up: of their gradients; down: of the write point's down and its gradient.
    dk, dv, deta are contiguous.
    """
    i_n, i_c = slot_owner(slots, i_r // H, steps, PACKED)
    i_b, begin, length, held = sequence_span(cu_seqlens, count, tl.maximum(i_n, 0), T, chunk_size, PACKED, STATE)
    start, stop = chunk_span(i_c, length, held, chunk_size)
    start += i_t * BT
    if (i_n >= 0) & (start < stop):
        o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
        m_t = o_t < stop - start
        mask = token_mask(m_t, o_d, D)
        j_b, i_h, t = tl.cast(i_b, tl.int64), tl.cast(i_r % H, tl.int64), tl.cast(begin + start, tl.int64)
        b_dk = tl.zeros([BT, BD], dtype=tl.float32)
        b_dv = tl.zeros([BT, BD], dtype=tl.float32)
        r_gate = tl.zeros([BT], dtype=tl.float32)
        r_up = tl.zeros([BT], dtype=tl.float32)
        r_down = tl.zeros([BT], dtype=tl.float32)
        if i_c < written_chunks(length, held, chunk_size, KEEP):
            dtype = gate_up.dtype.element_ty
            p_k = k + j_b * sk_b + i_h * sk_h + t * sk_t
            p_v = v + j_b * sv_b + i_h * sv_h + t * sv_t
            p_e = eta + j_b * se_b + i_h * se_h + t * se_t + o_t * se_t
            b_k = tl.cast(tl.load(p_k + (o_t[:, None] * sk_t + o_d[None, :] * sk_d), mask=mask, other=0.0), dtype)
            b_v = tl.cast(tl.load(p_v + (o_t[:, None] * sv_t + o_d[None, :] * sv_d), mask=mask, other=0.0), dtype)
            e_gate = tl.load(p_e, mask=m_t, other=0.0)[:, None]
            e_up = tl.load(p_e + se_e, mask=m_t, other=0.0)[:, None]
            e_down = tl.load(p_e + 2 * se_e, mask=m_t, other=0.0)[:, None]
            for i_k in tl.range(0, HID, BH):
                b_gu = operand(load_operand(gate_up, i_r, i_k, o_d, D, HID, BH, 2), dtype, PREC)
                b_dgu = operand(load_operand(d_gate_up, i_r, i_k, o_d, D, HID, BH, 2), dtype, PREC)
                b_wd = operand(load_operand(down, i_r, i_k, o_d, D, HID, BH, 2), dtype, PREC)
                # [BT, BD] @ [BD, 2BH] -> [BT, 2BH]
                b_a, b_b = part(tl.dot(b_k, b_gu, input_precision=PREC))
                b_silu, b_slope, b_curve = silu(b_a, FAST)
                b_p, b_rd = part(tl.dot(b_v, b_wd, input_precision=PREC))
                b_rg, b_ru = part(tl.dot(b_k, b_dgu, input_precision=PREC))
                z = b_silu * b_b
                b_bs = b_b * b_slope
                y_gate, y_up = b_p * b_bs, b_p * b_silu
                r_down += tl.sum(z * b_rd, 1)
                r_gate += tl.sum(y_gate * b_rg, 1)
                r_up += tl.sum(y_up * b_ru, 1)
                # [BT, 2BH] @ [2BH, BD] -> [BT, BD]
                b_dk = tl.dot(operand(pair(y_gate * e_gate, y_up * e_up), dtype, PREC), tl.trans(b_dgu), b_dk, input_precision=PREC)
                b_rg, b_ru, b_rd = b_rg * e_gate, b_ru * e_up, b_rd * e_down
                dp = b_rg * b_bs + b_ru * b_silu
                b_dv = tl.dot(operand(pair(dp, z * e_down), dtype, PREC), tl.trans(b_wd), b_dv, input_precision=PREC)
                da = b_p * (b_rg * b_b * b_curve + b_ru * b_slope) + b_rd * b_bs
                db = b_p * b_rg * b_slope + b_rd * b_silu
                b_dk = tl.dot(operand(pair(da, db), dtype, PREC), tl.trans(b_gu), b_dk, input_precision=PREC)
        row = (j_b * T + t) * H + i_h
        f_g = o_t[:, None] * (H * D) + o_d[None, :]
        tl.store(dk + row * D + f_g, tl.cast(b_dk, dk.dtype.element_ty), mask=mask)
        tl.store(dv + row * D + f_g, tl.cast(b_dv, dv.dtype.element_ty), mask=mask)
        p_e = deta + row * 3 + o_t * (3 * H)
        tl.store(p_e, r_gate, mask=m_t)
        tl.store(p_e + 1, r_up, mask=m_t)
        tl.store(p_e + 2, r_down, mask=m_t)
