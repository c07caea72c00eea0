"""The write chain of `ttt_mlp` in one launch: programs that stay and meet at barriers, PARTS of them for a (sequence, head).

The device functions are those of chain.py, and so are the results; the interpreter runs programs one after another, where the barrier
would hang, and takes chain.py's kernels. All programs have to be resident: `launch_cooperative_grid=True`.
"""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.chain import chunk_mus, clip, descent, store_slab, store_squares, store_weights, sum_slabs, with_held
from allmem_ops.ops.ttt_mlp.kernels.common import (
    NONE,
    POST_WRITE,
    chunk_span,
    column_size,
    load_public,
    load_sizes,
    load_three,
    point,
    row_sizes,
    sequence_slots,
    sequence_span,
    store_public,
    store_three,
)
from allmem_ops.ops.ttt_mlp.kernels.pairs import prefetch


@triton.jit
def barrier(counter, target):
    """Wait until `target` arrivals have been counted; what was stored before an arrival is then visible. The counter only grows."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["X", "T", "chunk_size", "H", "steps", "se_b", "sm_b"])
def ttt_mlp_fwd_chain_kernel(
    k, v, eta, mu, cu_seqlens, count, first,
    w_gate, w_up, w_down, s_gate, s_up, s_down, m_gate, m_up, m_down, g_gate, g_up, g_down, mu_held,
    x, x_read, m_slots, size, n, mu_mean, g_size, e_gate, e_up, e_down, f_gate, f_up, f_down, h_gate, h_up, h_down, e_mu,
    counters, scratch,
    X, T, chunk_size, H, steps, eps, grad_clip,
    sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e, sm_b, sm_t, sm_h,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, SP: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, SAVE_M: tl.constexpr,
    PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Everything of the chain. Grid (groups * PARTS,): group i_g works on (sequence, head) i_g, i_g + groups, ... of X."""
    HP: tl.constexpr = HS // SP
    PARTS: tl.constexpr = (HID + HS - 1) // HS * SP
    dtype = k.dtype.element_ty
    i_g, i_p = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    i_s, i_k = i_p // SP, i_p % SP
    # one buffer: slabs, M, sums of squares of rows (two by turns, then those of N) and of G (two by turns)
    j_x = tl.cast(X, tl.int64)
    slabs = scratch
    m = slabs + j_x * ((SP if SP > 1 else 0) * 3 * D * HID)
    rows = m + j_x * (3 * D * HID)
    n_rows = rows + j_x * (2 * PARTS * D)
    squares = n_rows + j_x * (PARTS * D)
    # a line of the cache for each group's counter
    counter = counters + i_g * 32
    target = 0
    o_d, o_h, o_s = tl.arange(0, BD), i_p * HP + tl.arange(0, HP), i_s * HS + tl.arange(0, HS)
    mask = (o_d < D)[:, None] & (o_h < HID)[None, :]
    mask_s = (o_d < D)[:, None] & (o_s < HID)[None, :]
    for i_x in tl.range(i_g, X, tl.num_programs(0) // PARTS):
        i_n, i_h = i_x // H, i_x % H
        i_b, begin, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
        slot, written = sequence_slots(first, i_n, steps, length, held, chunk_size, PACKED, KEEP)
        i_b, begin, j_h = tl.cast(i_b, tl.int64), tl.cast(begin, tl.int64), tl.cast(i_h, tl.int64)
        p_k = k + i_b * sk_b + begin * sk_t + j_h * sk_h
        p_v = v + i_b * sv_b + begin * sv_t + j_h * sv_h
        p_eta = eta + i_b * se_b + begin * se_t + j_h * se_h
        p_mu = mu + i_b * sm_b + begin * sm_t + j_h * sm_h

        # slot 0, and N
        b_gate, b_up, b_down = load_public(w_gate, w_up, w_down, i_h, o_d, o_h, mask, D, HID)
        n_gate, n_up = column_size(b_gate), column_size(b_up)
        tl.store(n_rows + (tl.cast(i_x, tl.int64) * PARTS + i_p) * D + o_d, tl.sum(b_down * b_down, 1), mask=o_d < D)
        if i_n == 0:
            tl.store(n + i_h * (2 * HID + D) + o_h, n_gate, mask=o_h < HID)
            tl.store(n + i_h * (2 * HID + D) + HID + o_h, n_up, mask=o_h < HID)
        z_gate = tl.zeros([BD, HP], dtype=tl.float32)
        z_up = z_gate
        z_down = z_gate
        if STATE:
            b_gate, b_up, b_down = load_public(s_gate, s_up, s_down, i_x, o_d, o_h, mask, D, HID)
            z_gate, z_up, z_down = load_public(m_gate, m_up, m_down, i_x, o_d, o_h, mask, D, HID)
        i_r = slot * H + i_h
        chunk_mus(p_mu, sm_t, mu_held, mu_mean, e_mu, i_x, i_r, i_p, written, length, held, chunk_size, H, PARTS, BM, STATE, KEEP)
        store_weights(
            x, x_read, size, rows, i_x, i_r, i_p, 0, o_d, o_h, mask, b_gate, b_up, b_down, n_gate, n_up, eps, D, HID, PARTS, NORM, FAST
        )  # fmt: skip
        store_three(m, i_x, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)
        if SAVE_M:
            store_three(m_slots, i_r, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)
        target += PARTS
        barrier(counter, target)
        n_down = row_sizes(n_rows, i_x, o_d, D, PARTS)
        if (i_n == 0) & (i_p == 0):
            tl.store(n + i_h * (2 * HID + D) + 2 * HID + o_d, n_down, mask=o_d < D)
        if SP == 1:
            n_gate_s, n_up_s = n_gate, n_up
        else:
            w = load_public(w_gate, w_up, w_down, i_h, o_d, o_s, mask_s, D, HID)
            n_gate_s, n_up_s = column_size(w[0]), column_size(w[1])
        size_down = n_down

        for i_c in tl.range(0, written + KEEP):
            i_r = (slot + i_c) * H + i_h
            p_gate, p_up, p_down = load_three(x, i_r, o_d, o_s, mask_s, D, HID)
            if NORM != NONE:
                size_gate_s, size_up_s = load_sizes(size, i_r, o_s, D, HID)
                # what a slower program still reads is not what is written next: two buffers by turns
                size_down = row_sizes(rows + (i_c % 2) * X * (PARTS * D), i_x, o_d, D, PARTS, FAST)
                p_gate, p_up, p_down = point(
                    p_gate, p_up, p_down, n_gate_s, n_up_s, n_down, size_gate_s, size_up_s, size_down, i_c, eps, NORM, FAST
                )  # fmt: skip
            # The first tile of the next chunk comes from memory meanwhile; asked for after the loop, the barrier would wait for it.
            start, stop = chunk_span(i_c + 1, length, held, chunk_size)
            prefetch(p_k + tl.cast(start, tl.int64) * sk_t, sk_t, i_k * BT, stop - start, D, BT, FAST)
            prefetch(p_v + tl.cast(start, tl.int64) * sv_t, sv_t, i_k * BT, stop - start, D, BT, FAST)
            start, stop = chunk_span(i_c, length, held, chunk_size)
            d_gate, d_up, d_down = descent(
                p_k, p_v, p_eta, sk_t, sk_d, sv_t, sv_d, se_t, se_e,
                tl.cast(p_gate, dtype), tl.cast(p_up, dtype), tl.cast(p_down, dtype), start, stop, i_k, D, BT, SP, PREC, FAST,
            )  # fmt: skip
            if SP > 1:
                # W and M of the program's own hidden units arrive while it waits; more of them than that would be spilled in the token
                # loop, and are loaded below
                b_mu = tl.load(mu_mean + i_r, mask=i_c < written, other=0.0, cache_modifier=".cg")
                z_gate, z_up, z_down = load_three(m, i_x, o_d, o_h, mask, D, HID)
                b_gate, b_up, b_down = load_three(x, i_r, o_d, o_h, mask, D, HID)
                if NORM != NONE:
                    size_gate, size_up = load_sizes(size, i_r, o_h, D, HID)
                store_slab(slabs, i_x * SP + i_k, i_s * HS, o_d, d_gate, d_up, d_down, D, HID)
            if NORM != NONE:
                # after the loop: a branch before it would wait for the loads above
                if i_p == 0:
                    tl.store(size + tl.cast(i_r, tl.int64) * (2 * HID + D) + 2 * HID + o_d, size_down, mask=o_d < D)
            if SP > 1:
                target += PARTS
                barrier(counter, target)
                d_gate, d_up, d_down = sum_slabs(slabs, i_x, i_p * HP, o_d, D, HID, SP, HP)
            d_gate, d_up, d_down = with_held(d_gate, d_up, d_down, g_gate, g_up, g_down, i_x, o_d, o_h, mask, i_c, D, HID, STATE)
            if KEEP:
                if i_c == written:
                    store_public(h_gate, h_up, h_down, i_x, o_d, o_h, mask, 0.0 - d_gate, 0.0 - d_up, 0.0 - d_down, D, HID)
            if i_c < written:
                if CLIP:
                    p_squares = squares + (i_c % 2) * X * (PARTS * 3)
                    store_squares(p_squares, i_x, i_p, d_gate, d_up, d_down, PARTS)
                    target += PARTS
                    barrier(counter, target)
                    d_gate, d_up, d_down = clip(d_gate, d_up, d_down, p_squares, g_size, i_x, i_r, i_p, grad_clip, PARTS)
                if SP == 1:
                    b_mu = tl.load(mu_mean + i_r, cache_modifier=".cg")
                    z_gate, z_up, z_down = load_three(m, i_x, o_d, o_h, mask, D, HID)
                    b_gate, b_up, b_down = load_three(x, i_r, o_d, o_h, mask, D, HID)
                    if NORM != NONE:
                        size_gate, size_up = load_sizes(size, i_r, o_h, D, HID)
                z_gate, z_up, z_down = b_mu * z_gate + d_gate, b_mu * z_up + d_up, b_mu * z_down + d_down
                if NORM != NONE:
                    b_gate, b_up, b_down = point(
                        b_gate, b_up, b_down, n_gate, n_up, n_down, size_gate, size_up, size_down, i_c, eps, NORM, FAST
                    )  # fmt: skip
                b_gate, b_up, b_down = b_gate + z_gate, b_up + z_up, b_down + z_down
                store_weights(
                    x, x_read, size, rows + (1 - i_c % 2) * X * (PARTS * D), i_x, i_r + H, i_p, i_c + 1, o_d, o_h, mask,
                    b_gate, b_up, b_down, n_gate, n_up, eps, D, HID, PARTS, NORM, FAST,
                )  # fmt: skip
                store_three(m, i_x, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)
                if SAVE_M:
                    store_three(m_slots, i_r + H, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)
                if (SP > 1) | (NORM != NONE):
                    target += PARTS
                    barrier(counter, target)
                else:
                    tl.debug_barrier()

        i_r = (slot + written) * H + i_h
        if NORM != NONE:
            size_down = row_sizes(rows + (written % 2) * X * (PARTS * D), i_x, o_d, D, PARTS, FAST)
            if i_p == 0:
                tl.store(size + tl.cast(i_r, tl.int64) * (2 * HID + D) + 2 * HID + o_d, size_down, mask=o_d < D)
        if KEEP:
            b_gate, b_up, b_down = load_three(x, i_r, o_d, o_h, mask, D, HID)
            if NORM == POST_WRITE:
                size_gate, size_up = load_sizes(size, i_r, o_h, D, HID)
                b_gate, b_up, b_down = point(
                    b_gate, b_up, b_down, n_gate, n_up, n_down, size_gate, size_up, size_down, written, eps, NORM, FAST
                )  # fmt: skip
            store_public(e_gate, e_up, e_down, i_x, o_d, o_h, mask, b_gate, b_up, b_down, D, HID)
            z_gate, z_up, z_down = load_three(m, i_x, o_d, o_h, mask, D, HID)
            store_public(f_gate, f_up, f_down, i_x, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)
