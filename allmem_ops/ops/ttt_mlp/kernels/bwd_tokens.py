"""Gradients of k, v, eta and mu: every written chunk at once, from the gradients dD that the reverse chain has stored."""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.common import chunk_span, sequence_span, slot_owner, written_chunks
from allmem_ops.ops.ttt_mlp.kernels.pairs import load_operand, pair, part, silu, token_mask


@triton.jit(do_not_specialize=["T", "chunk_size", "H", "steps", "tiles", "se_b"])
def ttt_mlp_bwd_tokens_kernel(
    k, v, eta, dk, dv, deta, dmu, cu_seqlens, count, slots, gate_up, d_gate_up, down, mu_parts, T, chunk_size, H, steps, tiles,
    sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e, sg_b, sg_t, sg_h,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One tile of a chunk's tokens, the hidden units in their order; zeros where the chunk is not written. Grid (slots * H * tiles,).

    gate_up: pairs of the write point's gate and up; d_gate_up: of their gradients; down: of the write point's down and its gradient.
    """
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
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    m_t = o_t < stop - start
    mask = token_mask(m_t, o_d, D)
    i_b, i_h, t = tl.cast(i_b, tl.int64), tl.cast(i_r % H, tl.int64), tl.cast(begin + start, tl.int64)
    b_dk = tl.zeros([BT, BD], dtype=tl.float32)
    b_dv = tl.zeros([BT, BD], dtype=tl.float32)
    r_gate = tl.zeros([BT], dtype=tl.float32)
    r_up = tl.zeros([BT], dtype=tl.float32)
    r_down = tl.zeros([BT], dtype=tl.float32)
    b_mu = 0.0
    if i_c < written_chunks(length, held, chunk_size, KEEP):
        dtype = gate_up.dtype.element_ty
        p_k = k + i_b * sk_b + i_h * sk_h + t * sk_t
        p_v = v + i_b * sv_b + i_h * sv_h + t * sv_t
        p_e = eta + i_b * se_b + i_h * se_h + t * se_t + o_t * se_t
        b_k = tl.cast(tl.load(p_k + (o_t[:, None] * sk_t + o_d[None, :] * sk_d), mask=mask, other=0.0), dtype)
        b_v = tl.cast(tl.load(p_v + (o_t[:, None] * sv_t + o_d[None, :] * sv_d), mask=mask, other=0.0), dtype)
        e_gate = tl.load(p_e, mask=m_t, other=0.0)[:, None]
        e_up = tl.load(p_e + se_e, mask=m_t, other=0.0)[:, None]
        e_down = tl.load(p_e + 2 * se_e, mask=m_t, other=0.0)[:, None]
        for i_k in tl.range(0, HID, BH):
            b_gu = load_operand(gate_up, i_r, i_k, o_d, D, HID, BH, 2)
            b_dgu = load_operand(d_gate_up, i_r, i_k, o_d, D, HID, BH, 2)
            b_wd = load_operand(down, i_r, i_k, o_d, D, HID, BH, 2)
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
            b_dk = tl.dot(tl.cast(pair(y_gate * e_gate, y_up * e_up), dtype), tl.trans(b_dgu), b_dk, input_precision=PREC)
            b_rg, b_ru, b_rd = b_rg * e_gate, b_ru * e_up, b_rd * e_down
            dp = b_rg * b_bs + b_ru * b_silu
            b_dv = tl.dot(tl.cast(pair(dp, z * e_down), dtype), tl.trans(b_wd), b_dv, input_precision=PREC)
            da = b_p * (b_rg * b_b * b_curve + b_ru * b_slope) + b_rd * b_bs
            db = b_p * b_rg * b_slope + b_rd * b_silu
            b_dk = tl.dot(tl.cast(pair(da, db), dtype), tl.trans(b_gu), b_dk, input_precision=PREC)
        o_p = tl.arange(0, BP)
        b_mu = tl.sum(tl.load(mu_parts + tl.cast(i_r, tl.int64) * PARTS + o_p, mask=o_p < PARTS, other=0.0), 0) / chunk_size
    at = i_b * sg_b + i_h * sg_h + t * sg_t
    f_g = o_t[:, None] * sg_t + o_d[None, :]
    tl.store(dk + at + f_g, tl.cast(b_dk, dk.dtype.element_ty), mask=mask)
    tl.store(dv + at + f_g, tl.cast(b_dv, dv.dtype.element_ty), mask=mask)
    # deta [.., H, 3] and dmu [.., H] are contiguous: their rows are those of dk, d channels long
    row = at // D + o_t * (sg_t // D)
    tl.store(deta + 3 * row, r_gate, mask=m_t)
    tl.store(deta + 3 * row + 1, r_up, mask=m_t)
    tl.store(deta + 3 * row + 2, r_down, mask=m_t)
    tl.store(dmu + row, tl.zeros([BT], dtype=tl.float32) + b_mu, mask=m_t)
