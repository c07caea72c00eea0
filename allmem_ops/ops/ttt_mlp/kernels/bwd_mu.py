"""The gradient of mu: dmu_t = <dM_j, M_{j-1}> / c, the same for every token of a chunk."""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.bwd_chain import inner, momentum
from allmem_ops.ops.ttt_mlp.kernels.common import chunk_span, sequence_span, slot_owner, written_chunks
from allmem_ops.ops.ttt_mlp.kernels.pairs import load_operand, part


@triton.jit
def mu_slot(
    dmu, cu_seqlens, count, slots, x, m, size, n, m_gate, m_up, m_down, d_gate_up, down, mu_parts, i_r, T, chunk_size, H, steps, eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, SAVE_M: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """dmu (contiguous) of slot and head `i_r`: without a clip dM is dD, which the chain has stored; with one it has left the sums."""
    i_n, i_c = slot_owner(slots, i_r // H, steps, PACKED)
    i_b, begin, length, held = sequence_span(cu_seqlens, count, tl.maximum(i_n, 0), T, chunk_size, PACKED, STATE)
    start, stop = chunk_span(i_c, length, held, chunk_size)
    if (i_n >= 0) & (start < stop):
        i_h = i_r % H
        b_mu = 0.0
        if i_c < written_chunks(length, held, chunk_size, KEEP):
            if CLIP:
                for i_p in tl.range(0, PARTS):
                    b_mu += tl.load(mu_parts + tl.cast(i_r, tl.int64) * PARTS + i_p)
            else:
                o_d = tl.arange(0, BD)
                for i_k in tl.range(0, HID, BH):
                    o_h = i_k + tl.arange(0, BH)
                    mask = (o_d < D)[:, None] & (o_h < HID)[None, :]
                    g_gate, g_up = part(tl.cast(load_operand(d_gate_up, i_r, i_k, o_d, D, HID, BH, 2), tl.float32))
                    _, g_down = part(tl.cast(load_operand(down, i_r, i_k, o_d, D, HID, BH, 2), tl.float32))
                    b_gate, b_up, b_down = momentum(
                        x, m, size, n, m_gate, m_up, m_down, i_n * H + i_h, i_r, i_h, i_c, H, o_d, o_h, mask, eps,
                        D, HID, NORM, STATE, SAVE_M, FAST,
                    )  # fmt: skip
                    b_mu += inner(g_gate, b_gate) + inner(g_up, b_up) + inner(g_down, b_down)
        b_mu = b_mu / chunk_size
        p_mu = dmu + (tl.cast(i_b, tl.int64) * T + begin + start) * H + i_h
        o_t = tl.arange(0, BT)
        for i_t in tl.range(0, stop - start, BT):
            tl.store(p_mu + (i_t + o_t) * H, tl.zeros([BT], dtype=tl.float32) + b_mu, mask=i_t + o_t < stop - start)
