"""The reverse chain of `ttt_mlp` where every program owns BH hidden units of a (sequence, head) and takes all of a chunk's tokens.

As in owned.py: dX and dM stay in registers, no slabs, and one exchange a slot, <X, gradient> for the rows of Wdown. Nothing but the
products with Wdown's gradient waits for it. Does what bwd_chain.py does without a clip; results as there, but for the order of sums.
"""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.bwd_chain import through_norms
from allmem_ops.ops.ttt_mlp.kernels.bwd_regions import exchange_regions, gradient_regions, operand_regions
from allmem_ops.ops.ttt_mlp.kernels.common import (
    NONE,
    POST_WRITE,
    PRE_WRITE,
    chunk_span,
    first_slot,
    load_three,
    sequence_span,
    store_three,
    sum_parts,
    written_chunks,
)
from allmem_ops.ops.ttt_mlp.kernels.owned import arrive, point_scale, wait
from allmem_ops.ops.ttt_mlp.kernels.pairs import load_operand, operand, pair, part, silu, store_operand


@triton.jit
def slot_gradient(b_x, b_g, b_read, b_n, b_size, here, eps, NORM: tl.constexpr, FAST: tl.constexpr):
    """dX of gate or up, and what is added to dN, from the gradient of the write point (with post_write: of the weights) `b_g`.

    b_read: the reads' gradient. here: whether the slot's weights go through a norm.
    """
    b_dn = tl.zeros([b_g.shape[1]], dtype=tl.float32)
    if NORM == POST_WRITE:
        b_g += b_read
    if NORM != NONE:
        b_dx, b_dn = through_norms(b_x, b_g, tl.sum(b_x * b_g, 0), b_n, b_size, eps, False, FAST)
        b_g, b_dn = tl.where(here, b_dx, b_g), tl.where(here, b_dn, 0.0)
    if NORM != POST_WRITE:
        b_g += b_read
    return b_g, b_dn


@triton.jit
def slot_gradient_down(
    counter, target, rows, b_x, b_g, b_read, b_n, b_size, here, eps, o_d, D: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """The same of down, once every program has stored its share of <X, gradient> in `rows`; with post_write `b_g` has the reads' part."""
    b_dn = tl.zeros([o_d.shape[0]], dtype=tl.float32)
    if NORM != NONE:
        wait(counter, target, PARTS)
        b_inner = sum_parts(rows + o_d, D, o_d < D, PARTS)
        b_dx, b_dn = through_norms(b_x, b_g, b_inner, b_n, b_size, eps, True, FAST)
        b_g, b_dn = tl.where(here, b_dx, b_g), tl.where(here, b_dn, 0.0)
    if NORM != POST_WRITE:
        b_g += b_read
    return b_g, b_dn


@triton.jit(do_not_specialize=["R", "X", "T", "chunk_size", "H", "steps", "se_b"])
def ttt_mlp_bwd_owned_kernel(
    k, v, eta, cu_seqlens, count, first, x, size, n, mu_mean, operands, scratch, R, X, T, chunk_size, H, steps, eps,
    sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr,
    NORM: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, END: tl.constexpr,
    PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Everything of the chain. Grid (X * PARTS,)."""
    PARTS: tl.constexpr = (HID + BH - 1) // BH
    dtype = operands.dtype.element_ty
    i_x, i_s = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    gate_up, d_gate_up, down = operand_regions(operands, R, D, HID)
    dread, dx, dm, dn = gradient_regions(scratch, R, X, D, HID)
    _, _, _, rows, _, _ = exchange_regions(scratch, R, X, D, HID, BH, PARTS)
    # two buffers by turns, in the place of the two kinds of sums: a slower program may still read the other one
    rows += tl.cast(i_x, tl.int64) * (PARTS * 2 * D)
    counter = tl.cast(scratch, tl.pointer_type(tl.int32)) + i_x * 32
    target = 0
    o_d, o_h, o_t = tl.arange(0, BD), i_s * BH + tl.arange(0, BH), tl.arange(0, BT)
    m_d, m_h = o_d < D, o_h < HID
    mask = m_d[:, None] & m_h[None, :]
    i_n, i_h = i_x // H, i_x % H
    i_b, begin, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    written = written_chunks(length, held, chunk_size, KEEP)
    slot = first_slot(first, i_n, steps, PACKED)
    i_b, begin, j_h = tl.cast(i_b, tl.int64), tl.cast(begin, tl.int64), tl.cast(i_h, tl.int64)
    p_k = k + i_b * sk_b + begin * sk_t + j_h * sk_h
    p_v = v + i_b * sv_b + begin * sv_t + j_h * sv_h
    p_eta = eta + i_b * se_b + begin * se_t + j_h * se_h
    p_n = n + i_h * (2 * HID + D)
    nothing = tl.zeros([BD, BH], dtype=tl.float32)
    nothing_t = tl.zeros([BT, BH], dtype=tl.float32)
    none_h, none_d = tl.zeros([BH], dtype=tl.float32), tl.zeros([BD], dtype=tl.float32)

    # The last slot has no chunk to write: what its reads want and what is carried in. g_*: dX so far; z_*: dM.
    i_r = (slot + written) * H + i_h
    x_gate, x_up, y_down = nothing, nothing, nothing
    n_gate, n_up, n_down = none_h, none_h, none_d
    size_gate, size_up, y_size = none_h, none_h, none_d
    if NORM != NONE:
        n_gate, n_up = tl.load(p_n + o_h, mask=m_h, other=0.0), tl.load(p_n + HID + o_h, mask=m_h, other=0.0)
        n_down = tl.load(p_n + 2 * HID + o_d, mask=m_d, other=0.0)
    if NORM == POST_WRITE:
        x_gate, x_up, y_down = load_three(x, i_r, o_d, o_h, mask, D, HID)
        p_size = size + tl.cast(i_r, tl.int64) * (2 * HID + D)
        size_gate, size_up = tl.load(p_size + o_h, mask=m_h, other=0.0), tl.load(p_size + HID + o_h, mask=m_h, other=0.0)
        y_size = tl.load(p_size + 2 * HID + o_d, mask=m_d, other=0.0)
    g_gate, g_up, g_down = nothing, nothing, nothing
    z_gate, z_up, z_down = nothing, nothing, nothing
    if END:
        g_gate, g_up, g_down = load_three(dx, i_x, o_d, o_h, mask, D, HID)
        z_gate, z_up, z_down = load_three(dm, i_x, o_d, o_h, mask, D, HID)
    q_gate, q_up, y_read = load_three(dread, i_r, o_d, o_h, mask, D, HID)
    here = written > (0 if NORM == POST_WRITE else written)
    g_gate, dn_gate = slot_gradient(x_gate, g_gate, q_gate, n_gate, size_gate, here, eps, NORM, FAST)
    g_up, dn_up = slot_gradient(x_up, g_up, q_up, n_up, size_up, here, eps, NORM, FAST)
    dn_down = none_d
    if NORM == POST_WRITE:
        g_down += y_read
        tl.store(rows + (written % 2) * (PARTS * D) + i_s * D + o_d, tl.sum(y_down * g_down, 1), mask=m_d)
        target += PARTS
        arrive(counter, PARTS)
    if written > 0:
        z_gate += g_gate
        z_up += g_up

    # What a slot needs is loaded a chunk before it is needed. y_*: of the slot whose down is still to be finished.
    i_r = tl.where(written > 0, i_r - H, i_r)
    o_x = o_d[:, None] * HID + o_h[None, :]
    next_down = tl.load(x + tl.cast(i_r, tl.int64) * (3 * D * HID) + 2 * D * HID + o_x, mask=mask, other=0.0)
    next_size = none_d
    if NORM != NONE:
        next_size = tl.load(size + tl.cast(i_r, tl.int64) * (2 * HID + D) + 2 * HID + o_d, mask=m_d, other=0.0)
    x_down, q_down, size_down = nothing, nothing, none_d
    b_mu = tl.where(written < 0, 0.0, 1.0)
    y_mu = b_mu
    b_gate_up = load_operand(gate_up, i_r, i_s * BH, o_d, D, HID, BH, 2)
    next_gate_up = b_gate_up
    b_d_gate_up = operand(pair(z_gate, z_up), dtype, PREC)
    b_down = operand(pair(nothing, nothing), dtype, PREC)
    c_gate_up = tl.zeros([BD, 2 * BH], dtype=tl.float32)
    c_down_wide = tl.zeros([BD, 2 * BH], dtype=tl.float32)

    # One loop over the tiles of all chunks: its pipeline does not run dry where a chunk ends.
    tiles = tl.cdiv(chunk_size, BT)
    for i in tl.range(0, written * tiles):
        i_c = written - 1 - i // tiles
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
        # [BT, BD] @ [BD, 2BH] -> [BT, 2BH]
        b_a, b_b = part(tl.dot(tl.cast(b_k, dtype), b_gate_up, input_precision=PREC))
        b_silu, b_slope, b_curve = silu(b_a, FAST)
        b_bs = b_b * b_slope
        b_rg, b_ru = part(tl.dot(tl.cast(b_k, dtype), b_d_gate_up, input_precision=PREC))
        b_rg, b_ru = b_rg * r_gate, b_ru * r_up
        dp = b_rg * b_bs + b_ru * b_silu
        da = b_rg * b_b * b_curve + b_ru * b_slope
        db = b_rg * b_slope
        # [BD, BT] @ [BT, 2BH] -> [BD, 2BH]; down's as a pair with nothing: alone it is too narrow for wgmma
        b_vt = tl.trans(tl.cast(b_v, dtype))
        c_down_wide = tl.dot(b_vt, operand(pair(dp, nothing_t), dtype, PREC), c_down_wide, input_precision=PREC)
        if i_t == 0:
            i_q = tl.where(i_c > 0, i_r - H, i_r)
            store_operand(d_gate_up, i_r, i_s * BH, o_d, m_d, pair(z_gate, z_up), D, HID, BH, 2)
            x_down, size_down = next_down, next_size
            p_x = x + tl.cast(i_r, tl.int64) * (3 * D * HID) + o_x
            x_gate, x_up = tl.load(p_x, mask=mask, other=0.0), tl.load(p_x + D * HID, mask=mask, other=0.0)
            q_gate, q_up, q_down = load_three(dread, i_r, o_d, o_h, mask, D, HID)
            next_down = tl.load(x + tl.cast(i_q, tl.int64) * (3 * D * HID) + 2 * D * HID + o_x, mask=mask, other=0.0)
            next_gate_up = load_operand(gate_up, i_q, i_s * BH, o_d, D, HID, BH, 2)
            b_mu = tl.load(mu_mean + i_r)
            if NORM != NONE:
                p_size = size + tl.cast(i_r, tl.int64) * (2 * HID + D)
                size_gate, size_up = tl.load(p_size + o_h, mask=m_h, other=0.0), tl.load(p_size + HID + o_h, mask=m_h, other=0.0)
                next_size = tl.load(size + tl.cast(i_q, tl.int64) * (2 * HID + D) + 2 * HID + o_d, mask=m_d, other=0.0)
            # the slot after this chunk
            here = i_c + 1 < written if NORM == PRE_WRITE else i_c >= 0
            g_down, b_dn = slot_gradient_down(
                counter, target, rows + ((i_c + 1) % 2) * (PARTS * D), y_down, g_down, y_read, n_down, y_size, here, eps, o_d,
                D, PARTS, NORM, FAST,
            )  # fmt: skip
            dn_down += b_dn
            z_down = y_mu * z_down + g_down
            p_down = x_down
            if NORM != NONE:
                p_down *= point_scale(n_down, size_down, i_c, eps, NORM, FAST)[:, None]
            b_down = operand(pair(p_down, z_down), dtype, PREC)
            store_operand(down, i_r, i_s * BH, o_d, m_d, pair(p_down, z_down), D, HID, BH, 2)
        b_p, b_rd = part(tl.dot(tl.cast(b_v, dtype), b_down, input_precision=PREC))
        b_rd *= r_down
        da = b_p * da + b_rd * b_bs
        db = b_p * db + b_rd * b_silu
        c_gate_up = tl.dot(tl.trans(tl.cast(b_k, dtype)), operand(pair(da, db), dtype, PREC), c_gate_up, input_precision=PREC)
        if i_t == tiles - 1:
            c_down, _nothing = part(c_down_wide)
            g_down += c_down
            y_down, y_read, y_size, y_mu = x_down, q_down, size_down, b_mu
            if NORM == POST_WRITE:
                g_down += y_read
            if NORM != NONE:
                tl.store(rows + (i_c % 2) * (PARTS * D) + i_s * D + o_d, tl.sum(y_down * g_down, 1), mask=m_d)
                target += PARTS
                arrive(counter, PARTS)
            c_gate, c_up = part(c_gate_up)
            here = i_c > 0 if NORM == POST_WRITE else i_c >= 0
            g_gate, b_dn_gate = slot_gradient(x_gate, g_gate + c_gate, q_gate, n_gate, size_gate, here, eps, NORM, FAST)
            g_up, b_dn_up = slot_gradient(x_up, g_up + c_up, q_up, n_up, size_up, here, eps, NORM, FAST)
            dn_gate += b_dn_gate
            dn_up += b_dn_up
            # what is left before the first slot is dM_0
            z_gate = b_mu * z_gate + tl.where(i_c > 0, g_gate, 0.0)
            z_up = b_mu * z_up + tl.where(i_c > 0, g_up, 0.0)
            b_gate_up = next_gate_up
            b_d_gate_up = operand(pair(z_gate, z_up), dtype, PREC)
            c_gate_up = tl.zeros([BD, 2 * BH], dtype=tl.float32)
            c_down_wide = tl.zeros([BD, 2 * BH], dtype=tl.float32)

    here = written > (0 if NORM == PRE_WRITE else written)
    g_down, b_dn = slot_gradient_down(
        counter, target, rows, y_down, g_down, y_read, n_down, y_size, here, eps, o_d, D, PARTS, NORM, FAST
    )  # fmt: skip
    dn_down += b_dn
    store_three(dx, i_x, o_d, o_h, mask, g_gate, g_up, g_down, D, HID)
    store_three(dm, i_x, o_d, o_h, mask, z_gate, z_up, y_mu * z_down, D, HID)
    p_n = dn + tl.cast(i_x, tl.int64) * (2 * HID + D)
    tl.store(p_n + o_h, dn_gate, mask=m_h)
    tl.store(p_n + HID + o_h, dn_up, mask=m_h)
    if i_s == 0:
        tl.store(p_n + 2 * HID + o_d, dn_down, mask=m_d)
