"""The write chain of `ttt_mlp` where every program owns HS hidden units of a (sequence, head) and takes all of a chunk's tokens.

Its gradient is whole, so W and M stay in registers: no slabs, and one exchange a chunk, the squares of Wdown's rows, which only the
products with Wdown need. All programs have to be resident, those of every (sequence, head) at once: `launch_cooperative_grid=True`. The
persistent form (persistent.py) splits tokens instead and takes what does not fit here.
"""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.chain import chunk_mus, clip, store_squares, with_held
from allmem_ops.ops.ttt_mlp.kernels.common import (
    NONE,
    POST_WRITE,
    chunk_span,
    column_size,
    load_public,
    row_scale,
    row_sizes,
    sequence_slots,
    sequence_span,
    sigmoid,
    store_public,
    store_three,
)
from allmem_ops.ops.ttt_mlp.kernels.pairs import operand, pair, part


@triton.jit
def arrive(counter, PARTS: tl.constexpr):
    """Count this program: what it has stored is visible to whoever waits for the count.

    In PTX, as a barrier of Triton's keeps its pipeliner from the loop that it stands in. A tensor of 32: every thread does it once.
    """
    if PARTS > 1:
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.s32 first, thread, 0;
            bar.sync 0;
            @first red.release.gpu.global.add.s32 [$1], 1;
            mov.b32 $0, 0;
            }""",
            "=r,l", [counter + tl.zeros([32], dtype=tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.debug_barrier()


@triton.jit
def wait(counter, target, PARTS: tl.constexpr):
    """Until `target` arrivals have been counted. The counter only grows."""
    if PARTS > 1:
        tl.inline_asm_elementwise(
            """{
            .reg .pred less;
            .reg .b32 found;
            again:
            ld.acquire.gpu.global.s32 found, [$1];
            setp.lt.s32 less, found, $2;
            @less bra again;
            mov.b32 $0, found;
            }""",
            "=r,l,r", [counter + tl.zeros([32], dtype=tl.int32), target + tl.zeros([32], dtype=tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def point_scale(n, size, i_c, eps, NORM: tl.constexpr, FAST: tl.constexpr):
    """Factors of rows of X that make them the write point of chunk `i_c`."""
    scale = row_scale(n, size, eps, FAST)
    if NORM == POST_WRITE:
        # the first weights are taken as they are
        scale = tl.where(i_c > 0, scale, 1.0)
    return scale


@triton.jit
def store_slot(
    x, x_read, m_slots, size, i_r, o_d, o_h, mask, b_gate, b_up, b_down, p_gate, p_up, z_gate, z_up, z_down, size_gate, size_up,
    D: tl.constexpr, HID: tl.constexpr, NORM: tl.constexpr, SAVE_M: tl.constexpr,
):  # fmt: skip
    """X of slot and head `i_r` in fp32 and as the read's operand (`p_*`: at the write point), M, and the norms of gate and up."""
    store_three(x, i_r, o_d, o_h, mask, b_gate, b_up, b_down, D, HID)
    if NORM == POST_WRITE:
        store_three(x_read, i_r, o_d, o_h, mask, p_gate, p_up, b_down, D, HID)
    else:
        store_three(x_read, i_r, o_d, o_h, mask, b_gate, b_up, b_down, D, HID)
    if SAVE_M:
        store_three(m_slots, i_r, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)
    if NORM != NONE:
        p_size = size + tl.cast(i_r, tl.int64) * (2 * HID + D) + o_h
        tl.store(p_size, size_gate, mask=o_h < HID)
        tl.store(p_size + HID, size_up, mask=o_h < HID)


@triton.jit(do_not_specialize=["X", "T", "chunk_size", "H", "steps", "se_b", "sm_b"])
def ttt_mlp_fwd_owned_kernel(
    k, v, eta, mu, cu_seqlens, count, first,
    w_gate, w_up, w_down, s_gate, s_up, s_down, m_gate, m_up, m_down, g_gate, g_up, g_down, mu_held,
    x, x_read, m_slots, size, n, mu_mean, g_size, e_gate, e_up, e_down, f_gate, f_up, f_down, h_gate, h_up, h_down, e_mu,
    counters, scratch,
    X, T, chunk_size, H, steps, eps, grad_clip,
    sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e, sm_b, sm_t, sm_h,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, SAVE_M: tl.constexpr,
    PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Everything of the chain. Grid (X * PARTS,)."""
    PARTS: tl.constexpr = (HID + HS - 1) // HS
    dtype = k.dtype.element_ty
    i_x, i_p = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    # one buffer: sums of squares of rows (two by turns, then those of N) and of G (two by turns)
    j_x = tl.cast(X, tl.int64)
    rows = scratch
    n_rows = rows + j_x * (2 * PARTS * D)
    squares = n_rows + j_x * (PARTS * D)
    # a line of the cache for each counter
    counter = counters + i_x * 32
    target = PARTS
    o_d, o_h, o_t = tl.arange(0, BD), i_p * HS + tl.arange(0, HS), tl.arange(0, BT)
    m_d = o_d < D
    mask = m_d[:, None] & (o_h < HID)[None, :]
    i_n, i_h = i_x // H, i_x % H
    i_b, begin, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    slot, written = sequence_slots(first, i_n, steps, length, held, chunk_size, PACKED, KEEP)
    i_b, begin, j_h = tl.cast(i_b, tl.int64), tl.cast(begin, tl.int64), tl.cast(i_h, tl.int64)
    p_k = k + i_b * sk_b + begin * sk_t + j_h * sk_h
    p_v = v + i_b * sv_b + begin * sv_t + j_h * sv_h
    p_eta = eta + i_b * se_b + begin * se_t + j_h * se_h
    p_mu = mu + i_b * sm_b + begin * sm_t + j_h * sm_h
    p_rows = rows + (tl.cast(i_x, tl.int64) * PARTS + i_p) * D + o_d

    # N, X and M before chunk 0, the means of mu
    x_gate, x_up, x_down = load_public(w_gate, w_up, w_down, i_h, o_d, o_h, mask, D, HID)
    n_gate, n_up = column_size(x_gate), column_size(x_up)
    tl.store(n_rows + (tl.cast(i_x, tl.int64) * PARTS + i_p) * D + o_d, tl.sum(x_down * x_down, 1), mask=m_d)
    if i_n == 0:
        tl.store(n + i_h * (2 * HID + D) + o_h, n_gate, mask=o_h < HID)
        tl.store(n + i_h * (2 * HID + D) + HID + o_h, n_up, mask=o_h < HID)
    z_gate = tl.zeros([BD, HS], dtype=tl.float32)
    z_up = z_gate
    z_down = z_gate
    if STATE:
        x_gate, x_up, x_down = load_public(s_gate, s_up, s_down, i_x, o_d, o_h, mask, D, HID)
        z_gate, z_up, z_down = load_public(m_gate, m_up, m_down, i_x, o_d, o_h, mask, D, HID)
    i_r = slot * H + i_h
    chunk_mus(p_mu, sm_t, mu_held, mu_mean, e_mu, i_x, i_r, i_p, written, length, held, chunk_size, H, PARTS, BM, STATE, KEEP)
    tl.store(p_rows, tl.sum(x_down * x_down, 1), mask=m_d)
    arrive(counter, PARTS)
    wait(counter, target, PARTS)
    n_down = row_sizes(n_rows, i_x, o_d, D, PARTS)
    if (i_n == 0) & (i_p == 0):
        tl.store(n + i_h * (2 * HID + D) + 2 * HID + o_d, n_down, mask=m_d)
    # X's norms and the write point, of gate and up before a chunk begins, of down once the others have arrived
    size_gate, size_up = column_size(x_gate, FAST), column_size(x_up, FAST)
    p_gate, p_up = x_gate, x_up
    if NORM != NONE:
        p_gate *= point_scale(n_gate, size_gate, 0, eps, NORM, FAST)[None, :]
        p_up *= point_scale(n_up, size_up, 0, eps, NORM, FAST)[None, :]
    nothing = tl.zeros([BD, HS], dtype=tl.float32)
    # not X's down: Triton takes what is equal before a loop and is assigned to one another in it for unchanged
    p_down = nothing
    nothing_t = tl.zeros([BT, HS], dtype=tl.float32)
    b_gate_up = operand(pair(p_gate, p_up), dtype, PREC)
    # down's products as pairs with nothing: alone they are too narrow for wgmma
    b_down = operand(pair(nothing, nothing), dtype, PREC)
    d_gate_up = tl.zeros([BD, 2 * HS], dtype=tl.float32)
    d_down_wide = tl.zeros([BD, 2 * HS], dtype=tl.float32)

    # One loop over the tiles of all chunks: its pipeline does not run dry where a chunk ends.
    tiles = tl.cdiv(chunk_size, BT)
    for i in tl.range(0, (written + KEEP) * tiles):
        i_c = i // tiles
        i_t = i % tiles
        start, stop = chunk_span(i_c, length, held, chunk_size)
        t = start + i_t * BT
        m_t = o_t < stop - t
        m_k = m_t[:, None] & m_d[None, :]
        t = tl.cast(t, tl.int64)
        b_k = tl.load(p_k + t * sk_t + (o_t[:, None] * sk_t + o_d[None, :] * sk_d), mask=m_k, other=0.0)
        b_v = tl.load(p_v + t * sv_t + (o_t[:, None] * sv_t + o_d[None, :] * sv_d), mask=m_k, other=0.0)
        p_e = p_eta + t * se_t + o_t * se_t
        r_gate = tl.load(p_e, mask=m_t, other=0.0)[:, None]
        r_up = tl.load(p_e + se_e, mask=m_t, other=0.0)[:, None]
        r_down = tl.load(p_e + 2 * se_e, mask=m_t, other=0.0)[:, None]
        i_r = (slot + i_c) * H + i_h
        b_mu = tl.load(mu_mean + i_r, mask=i_c < written, other=0.0, cache_modifier=".cg")
        # [BT, BD] @ [BD, 2HS] -> [BT, 2HS]
        b_a, b_b = part(tl.dot(b_k, b_gate_up, input_precision=PREC))
        b_s = sigmoid(b_a, FAST)
        b_silu = b_a * b_s
        b_slope = (b_s + b_silu * (1.0 - b_s)) * b_b * r_gate
        y_down = b_silu * b_b * r_down
        b_silu *= r_up
        if i_t == 0:
            # stored while the others arrive
            store_slot(
                x, x_read, m_slots, size, i_r, o_d, o_h, mask, x_gate, x_up, x_down, p_gate, p_up, z_gate, z_up, z_down, size_gate, size_up,
                D, HID, NORM, SAVE_M,
            )  # fmt: skip
            p_down = x_down
            if NORM != NONE:
                wait(counter, target, PARTS)
                # what a slower program still reads is not what is written next: two buffers by turns
                size_down = row_sizes(rows + (i_c % 2) * X * (PARTS * D), i_x, o_d, D, PARTS, FAST)
                if i_p == 0:
                    tl.store(size + tl.cast(i_r, tl.int64) * (2 * HID + D) + 2 * HID + o_d, size_down, mask=m_d)
                p_down *= point_scale(n_down, size_down, i_c, eps, NORM, FAST)[:, None]
            b_down = operand(pair(p_down, nothing), dtype, PREC)
        b_p, _unused = part(tl.dot(b_v, b_down, input_precision=PREC))
        # [BD, BT] @ [BT, 2HS] -> [BD, 2HS]
        d_down_wide = tl.dot(tl.trans(b_v), operand(pair(y_down, nothing_t), dtype, PREC), d_down_wide, input_precision=PREC)
        d_gate_up = tl.dot(tl.trans(b_k), operand(pair(b_p * b_slope, b_p * b_silu), dtype, PREC), d_gate_up, input_precision=PREC)
        if i_t == tiles - 1:
            d_gate, d_up = part(d_gate_up)
            d_down, _nothing = part(d_down_wide)
            d_gate, d_up, d_down = with_held(d_gate, d_up, d_down, g_gate, g_up, g_down, i_x, o_d, o_h, mask, i_c, D, HID, STATE)
            if KEEP:
                if i_c == written:
                    store_public(h_gate, h_up, h_down, i_x, o_d, o_h, mask, 0.0 - d_gate, 0.0 - d_up, 0.0 - d_down, D, HID)
            if i_c < written:
                if CLIP:
                    p_squares = squares + (i_c % 2) * X * (PARTS * 3)
                    store_squares(p_squares, i_x, i_p, d_gate, d_up, d_down, PARTS)
                    target += PARTS
                    arrive(counter, PARTS)
                    wait(counter, target, PARTS)
                    d_gate, d_up, d_down = clip(d_gate, d_up, d_down, p_squares, g_size, i_x, i_r, i_p, grad_clip, PARTS)
                z_down = b_mu * z_down + d_down
                x_down = p_down + z_down
                if NORM != NONE:
                    tl.store(p_rows + (1 - i_c % 2) * X * (PARTS * D), tl.sum(x_down * x_down, 1), mask=m_d)
                    target += PARTS
                    arrive(counter, PARTS)
                z_gate, z_up = b_mu * z_gate + d_gate, b_mu * z_up + d_up
                x_gate, x_up = p_gate + z_gate, p_up + z_up
                p_gate, p_up = x_gate, x_up
                if NORM != NONE:
                    size_gate, size_up = column_size(x_gate, FAST), column_size(x_up, FAST)
                    p_gate *= point_scale(n_gate, size_gate, i_c + 1, eps, NORM, FAST)[None, :]
                    p_up *= point_scale(n_up, size_up, i_c + 1, eps, NORM, FAST)[None, :]
                b_gate_up = operand(pair(p_gate, p_up), dtype, PREC)
                d_gate_up = tl.zeros([BD, 2 * HS], dtype=tl.float32)
                d_down_wide = tl.zeros([BD, 2 * HS], dtype=tl.float32)

    if KEEP:
        # the loop has been through the open chunk: X is stored, p_* is its write point
        if NORM == POST_WRITE:
            x_gate, x_up, x_down = p_gate, p_up, p_down
        store_public(e_gate, e_up, e_down, i_x, o_d, o_h, mask, x_gate, x_up, x_down, D, HID)
        store_public(f_gate, f_up, f_down, i_x, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)
    else:
        i_r = (slot + written) * H + i_h
        store_slot(
            x, x_read, m_slots, size, i_r, o_d, o_h, mask, x_gate, x_up, x_down, p_gate, p_up, z_gate, z_up, z_down, size_gate, size_up,
            D, HID, NORM, SAVE_M,
        )  # fmt: skip
        if NORM != NONE:
            wait(counter, target, PARTS)
            size_down = row_sizes(rows + (written % 2) * X * (PARTS * D), i_x, o_d, D, PARTS, FAST)
            if i_p == 0:
                tl.store(size + tl.cast(i_r, tl.int64) * (2 * HID + D) + 2 * HID + o_d, size_down, mask=m_d)
