"""The reverse chain of `ttt_mlp` in one launch: programs that stay and meet at barriers, PARTS of them for a (sequence, head).

The device functions are those of bwd_chain.py, and so are the results. All programs have to be resident: `launch_cooperative_grid=True`.
"""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.bwd_chain import carry_step, clip_step, tokens_step
from allmem_ops.ops.ttt_mlp.kernels.bwd_regions import exchange_regions, gradient_regions, operand_regions
from allmem_ops.ops.ttt_mlp.kernels.common import chunk_span, first_slot, sequence_span, written_chunks
from allmem_ops.ops.ttt_mlp.kernels.pairs import prefetch, prefetch_lines
from allmem_ops.ops.ttt_mlp.kernels.persistent import barrier


@triton.jit
def prefetch_slot(
    x, dread, gate_up, i_r, i_s, i_k, D: tl.constexpr, HID: tl.constexpr, BH: tl.constexpr, RD: tl.constexpr, FAST: tl.constexpr
):
    """What program (i_s, i_k) owns of slot and head `i_r`'s X, read gradients and gate and up at the write point."""
    o_d = tl.minimum(i_k * RD + tl.arange(0, RD), D - 1)
    j_r = tl.cast(i_r, tl.int64)
    o_x = j_r * (3 * D * HID) + o_d * HID + i_s * BH
    for i in tl.static_range(3):
        prefetch_lines(x + o_x + i * (D * HID), FAST)
        prefetch_lines(dread + o_x + i * (D * HID), FAST)
    prefetch_lines(gate_up + j_r * (2 * D * HID) + o_d * (2 * HID) + i_s * 2 * BH, FAST)


@triton.jit(do_not_specialize=["R", "X", "T", "chunk_size", "H", "steps", "se_b"])
def ttt_mlp_bwd_chain_kernel(
    k, v, eta, cu_seqlens, count, first, x, m, size, n, m_gate, m_up, m_down, mu_mean, g_size, operands, scratch,
    R, X, T, chunk_size, H, steps, eps, grad_clip,
    sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, SP: tl.constexpr, BT: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, END: tl.constexpr,
    SAVE_M: tl.constexpr, AHEAD: tl.constexpr, PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Everything of the chain. Grid (groups * PARTS,): group i_g works on (sequence, head) i_g, i_g + groups, ... of X."""
    PARTS: tl.constexpr = (HID + BH - 1) // BH * SP
    i_g, i_p = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    i_s, i_k = i_p // SP, i_p % SP
    gate_up, d_gate_up, down = operand_regions(operands, R, D, HID)
    dread, dx, dm, dn = gradient_regions(scratch, R, X, D, HID)
    slabs_gate_up, slabs_down, rows_hidden, rows_down, clip_parts, mu_parts = exchange_regions(scratch, R, X, D, HID, BH, PARTS)
    counter = tl.cast(scratch, tl.pointer_type(tl.int32)) + i_g * 32
    target = 0
    for i_x in tl.range(i_g, X, tl.num_programs(0) // PARTS):
        i_n, i_h = i_x // H, i_x % H
        i_b, begin, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
        written = written_chunks(length, held, chunk_size, KEEP)
        slot = first_slot(first, i_n, steps, PACKED)
        for i_step in tl.range(0, written + 1):
            i_c = written - i_step
            i_r = (slot + i_c) * H + i_h
            start, stop = chunk_span(i_c, length, held, chunk_size)
            if i_c > 0:
                # What comes next is brought from memory meanwhile; asked for after the loop, the barrier would wait for it.
                prefetch_slot(x, dread, gate_up, i_r - H, i_s, i_k, D, HID, BH, BD // SP, FAST)
                n_start, n_stop = chunk_span(i_c - 1, length, held, chunk_size)
                j_b, j_h, t = tl.cast(i_b, tl.int64), tl.cast(i_h, tl.int64), tl.cast(begin + n_start, tl.int64)
                prefetch(k + j_b * sk_b + j_h * sk_h + t * sk_t, sk_t, i_k * BT, n_stop - n_start, D, BT, FAST)
                prefetch(v + j_b * sv_b + j_h * sv_h + t * sv_t, sv_t, i_k * BT, n_stop - n_start, D, BT, FAST)
            tokens_step(
                k, v, eta, dx, dread, x, gate_up, d_gate_up, down, slabs_gate_up, slabs_down, rows_hidden, rows_down,
                i_x, i_s, i_k, i_r, i_h, i_b, begin + start, tl.where(i_step > 0, stop - start, 0), (i_step > 0) | END,
                sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e,
                D, HID, BD, BH, SP, BT, NORM, AHEAD, PREC, FAST,
            )  # fmt: skip
            target += PARTS
            barrier(counter, target)
            carry_step(
                dx, dm, dn, dread, x, m, size, n, m_gate, m_up, m_down, mu_mean, down, d_gate_up, mu_parts, clip_parts,
                slabs_gate_up, slabs_down, rows_hidden, rows_down, i_x, i_s, i_k, i_r, i_h, i_c, written, H, eps,
                D, HID, BD, BH, SP, NORM, CLIP, STATE, END, SAVE_M, FAST,
            )  # fmt: skip
            if i_c > 0:
                if CLIP:
                    target += PARTS
                    barrier(counter, target)
                    clip_step(
                        dm, x, m, size, n, m_gate, m_up, m_down, mu_mean, g_size, down, d_gate_up, clip_parts,
                        i_x, i_s, i_k, i_r, i_h, i_c, H, eps, grad_clip, D, HID, BD, BH, SP, NORM, STATE, SAVE_M, FAST,
                    )  # fmt: skip
                target += PARTS
                barrier(counter, target)
