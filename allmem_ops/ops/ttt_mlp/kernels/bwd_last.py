"""The last launch of the backward: all that follows from the reverse chain, each part in programs of its own."""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.bwd_ends import ends_tile
from allmem_ops.ops.ttt_mlp.kernels.bwd_mu import mu_slot
from allmem_ops.ops.ttt_mlp.kernels.bwd_regions import exchange_regions, gradient_regions, operand_regions
from allmem_ops.ops.ttt_mlp.kernels.bwd_tokens import tokens_tile


@triton.jit(do_not_specialize=["R", "N", "T", "chunk_size", "H", "steps", "tiles", "se_b"])
def ttt_mlp_bwd_last_kernel(
    k, v, eta, dk, dv, deta, dmu, cu_seqlens, count, slots, x, m, size, n, m_gate, m_up, m_down, w_gate, w_up, w_down,
    g_gate, g_up, g_down, s_gate, s_up, s_down, z_gate, z_up, z_down, operands, scratch,
    R, N, T, chunk_size, H, steps, tiles, eps,
    sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    BS: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, SAVE_M: tl.constexpr, PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """R programs for dmu, H * tiles of a matrix for the weights, R * tiles of a chunk for the tokens. Grid (their sum,).

    BS: hidden units of a program of the chain, which has PARTS programs for a (sequence, head).
    """
    CHANNELS: tl.constexpr = (D + BR - 1) // BR
    COLUMNS: tl.constexpr = (HID + BC - 1) // BC
    pid = tl.program_id(0)
    ends = H * (CHANNELS * COLUMNS)
    gate_up, d_gate_up, down = operand_regions(operands, R, D, HID)
    if pid < R:
        _, _, _, _, _, mu_parts = exchange_regions(scratch, R, N * H, D, HID, BS, PARTS)
        mu_slot(
            dmu, cu_seqlens, count, slots, x, m, size, n, m_gate, m_up, m_down, d_gate_up, down, mu_parts, pid,
            T, chunk_size, H, steps, eps, D, HID, BD, BC, BT, PARTS, NORM, CLIP, STATE, PACKED, KEEP, SAVE_M, FAST,
        )  # fmt: skip
    elif pid < R + ends:
        _, dx, dm, dn = gradient_regions(scratch, R, N * H, D, HID)
        i_e = pid - R
        ends_tile(
            w_gate, w_up, w_down, n, dx, dm, dn, g_gate, g_up, g_down, s_gate, s_up, s_down, z_gate, z_up, z_down,
            i_e // (CHANNELS * COLUMNS), i_e // COLUMNS % CHANNELS, i_e % COLUMNS, N, H, D, HID, BR, BC, NORM, STATE,
        )  # fmt: skip
    else:
        i_e = pid - R - ends
        tokens_tile(
            k, v, eta, dk, dv, deta, cu_seqlens, count, slots, gate_up, d_gate_up, down, i_e // tiles, i_e % tiles,
            T, chunk_size, H, steps, sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e,
            D, HID, BD, BT, BH, STATE, PACKED, KEEP, PREC, FAST,
        )  # fmt: skip
