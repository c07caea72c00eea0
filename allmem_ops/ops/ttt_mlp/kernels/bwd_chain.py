"""The reverse chain of `ttt_mlp`: dX, dM and dN from the last slot of every sequence to its first, and each chunk's dD.

Serial over a sequence's slots; a (sequence, head) is worked on by PARTS = ceil(h / BH) * SP programs. For slot j, with X, the write
point, D = -G and M as launch.py names them:

    tokens   program (i_s, i_k) sums the gradient of the write point from the tokens of chunk j in tiles i_k, i_k + SP, ... for BH
             hidden units into a slab, and its share of <X, gradient> for each row, which is linear in the gradient
    carry    program (i_s, i_k) owns BH hidden units of D / SP channels: it adds the SP slabs in order, goes back through the rows'
             norms to dX_j, and on to chunk j - 1: dM <- mu_j dM + dX_j, the gradient of M_j and, unless clipped, of D_{j-1}
    clip     with a clip: dD_{j-1} from dM and C_{j-1} once <dM, C> is known over all of a head

The last slot has no chunk to write: its tokens part sums what is carried in alone.
"""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.bwd_read import row_scales
from allmem_ops.ops.ttt_mlp.kernels.bwd_regions import exchange_regions, gradient_regions, operand_regions
from allmem_ops.ops.ttt_mlp.kernels.common import (
    NONE,
    POST_WRITE,
    PRE_WRITE,
    chunk_span,
    first_slot,
    load_public,
    load_three,
    sequence_span,
    store_three,
    written_chunks,
)
from allmem_ops.ops.ttt_mlp.kernels.pairs import load_operand, operand, pair, part, prefetch, silu, store_operand, token_mask


@triton.jit
def second_order(
    p_k, p_v, p_eta, sk_t, sk_d, sv_t, sv_d, se_t, se_e, b_gu, b_dgu, b_wd, tokens, i_k,
    D: tl.constexpr, BT: tl.constexpr, SP: tl.constexpr, AHEAD: tl.constexpr, PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients [BD, 2BH] (gate and up, a pair) and [BD, BH] (down) of D's point, from tiles i_k, i_k + SP, ... of `tokens` tokens.

    The operands are pairs [BD, 2BH]: gate and up, their gradients, down and its gradient; the pointers point at token 0.
    AHEAD: bring the next tile into the L2 cache, where shared memory is too small for a pipeline that loads it in time (num_stages=3).
    """
    BD: tl.constexpr = b_gu.shape[0]
    BH: tl.constexpr = b_gu.shape[1] // 2
    dtype = b_gu.dtype
    b_gu, b_dgu, b_wd = operand(b_gu, dtype, PREC), operand(b_dgu, dtype, PREC), operand(b_wd, dtype, PREC)
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    f_k = o_t[:, None] * sk_t + o_d[None, :] * sk_d
    f_v = o_t[:, None] * sv_t + o_d[None, :] * sv_d
    f_e = o_t * se_t
    g_gate_up = tl.zeros([BD, 2 * BH], dtype=tl.float32)
    g_down = tl.zeros([BD, BH], dtype=tl.float32)
    for i_t in tl.range(i_k * BT, tokens, SP * BT):
        m_t = o_t < tokens - i_t
        mask = token_mask(m_t, o_d, D)
        t = tl.cast(i_t, tl.int64)
        if AHEAD:
            prefetch(p_k + t * sk_t, sk_t, SP * BT, tokens - i_t, D, BT, FAST)
            prefetch(p_v + t * sv_t, sv_t, SP * BT, tokens - i_t, D, BT, FAST)
        b_k = tl.cast(tl.load(p_k + t * sk_t + f_k, mask=mask, other=0.0), dtype)
        b_v = tl.cast(tl.load(p_v + t * sv_t + f_v, mask=mask, other=0.0), dtype)
        p_e = p_eta + t * se_t + f_e
        e_gate = tl.load(p_e, mask=m_t, other=0.0)[:, None]
        e_up = tl.load(p_e + se_e, mask=m_t, other=0.0)[:, None]
        e_down = tl.load(p_e + 2 * se_e, mask=m_t, other=0.0)[:, None]
        # [BT, BD] @ [BD, 2BH] -> [BT, 2BH]
        b_a, b_b = part(tl.dot(b_k, b_gu, input_precision=PREC))
        b_silu, b_slope, b_curve = silu(b_a, FAST)
        b_bs = b_b * b_slope
        b_rg, b_ru = part(tl.dot(b_k, b_dgu, input_precision=PREC))
        b_rg, b_ru = b_rg * e_gate, b_ru * e_up
        dp = b_rg * b_bs + b_ru * b_silu
        da = b_rg * b_b * b_curve + b_ru * b_slope
        db = b_rg * b_slope
        # [BD, BT] @ [BT, BH] -> [BD, BH]
        g_down = tl.dot(tl.trans(b_v), operand(dp, dtype, PREC), g_down, input_precision=PREC)
        b_p, b_rd = part(tl.dot(b_v, b_wd, input_precision=PREC))
        b_rd = b_rd * e_down
        da = b_p * da + b_rd * b_bs
        db = b_p * db + b_rd * b_silu
        # [BD, BT] @ [BT, 2BH] -> [BD, 2BH]
        g_gate_up = tl.dot(tl.trans(b_k), operand(pair(da, db), dtype, PREC), g_gate_up, input_precision=PREC)
    return g_gate_up, g_down


@triton.jit
def momentum(
    x, m, size, n, m_gate, m_up, m_down, i_x, i_r, i_h, i_c, H, o_d, o_h, mask, eps,
    D: tl.constexpr, HID: tl.constexpr, NORM: tl.constexpr, STATE: tl.constexpr, SAVE_M: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """M before chunk `i_c`: as stored, or X less the write point before; before chunk 0 the state's, or 0."""
    if SAVE_M:
        return load_three(m, i_r, o_d, o_h, mask, D, HID)
    else:
        later = mask & (o_d < tl.where(i_c > 0, D, 0))[:, None]
        b_gate, b_up, b_down = load_three(x, i_r, o_d, o_h, later, D, HID)
        i_q = tl.where(i_c > 0, i_r - H, i_r)
        c_gate, c_up, c_down = load_three(x, i_q, o_d, o_h, later, D, HID)
        s_gate, s_up, s_down = row_scales(size, n, i_q, i_h, i_c - 1, o_d, o_h, eps, D, HID, NORM, FAST)
        b_gate -= c_gate * s_gate[None, :]
        b_up -= c_up * s_up[None, :]
        b_down -= c_down * s_down[:, None]
        if STATE:
            z_gate, z_up, z_down = load_public(m_gate, m_up, m_down, i_x, o_d, o_h, mask & (o_d < tl.where(i_c > 0, 0, D))[:, None], D, HID)
            return b_gate + z_gate, b_up + z_up, b_down + z_down
        else:
            return b_gate, b_up, b_down


@triton.jit
def inner(b_x, b_y):
    return tl.sum(tl.sum(b_x * b_y, 1), 0)


@triton.jit
def tokens_step(
    k, v, eta, dx, dread, x, gate_up, d_gate_up, down, slabs_gate_up, slabs_down, rows_hidden, rows_down,
    i_x, i_s, i_k, i_r, i_h, i_b, first_token, tokens, carried,
    sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, SP: tl.constexpr, BT: tl.constexpr,
    NORM: tl.constexpr, AHEAD: tl.constexpr, PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Slab and row sums of program (i_s, i_k) for a slot with `tokens` tokens to write, 0 in the last one.

    carried: whether dX holds anything.
    """
    PARTS: tl.constexpr = (HID + BH - 1) // BH * SP
    RD: tl.constexpr = BD // SP
    o_d = tl.arange(0, BD)
    i_p = i_s * SP + i_k
    i_y = tl.cast(i_x, tl.int64) * PARTS + i_p
    i_b, i_h, t = tl.cast(i_b, tl.int64), tl.cast(i_h, tl.int64), tl.cast(first_token, tl.int64)
    g_gate_up, g_down = second_order(
        k + i_b * sk_b + i_h * sk_h + t * sk_t, v + i_b * sv_b + i_h * sv_h + t * sv_t, eta + i_b * se_b + i_h * se_h + t * se_t,
        sk_t, sk_d, sv_t, sv_d, se_t, se_e,
        load_operand(gate_up, i_r, i_s * BH, o_d, D, HID, BH, 2), load_operand(d_gate_up, i_r, i_s * BH, o_d, D, HID, BH, 2),
        load_operand(down, i_r, i_s * BH, o_d, D, HID, BH, 2), tokens, i_k, D, BT, SP, AHEAD, PREC, FAST,
    )  # fmt: skip
    m_d = o_d < D
    store_operand(slabs_gate_up, i_y, 0, o_d, m_d, g_gate_up, D, BH, BH, 2)
    store_operand(slabs_down, i_y, 0, o_d, m_d, g_down, D, BH, BH, 1)
    if NORM != NONE:
        o_h = i_s * BH + tl.arange(0, BH)
        m_h = o_h < HID
        b_gate, b_up, b_down = load_three(x, i_r, o_d, o_h, m_d[:, None] & m_h[None, :], D, HID)
        b_rows = tl.sum(pair(b_gate, b_up) * g_gate_up, 0)
        r_down = tl.sum(b_down * g_down, 1)
        # what this program owns of the carried gradient
        o_r = i_k * RD + tl.arange(0, RD)
        mask = (o_r < D)[:, None] & m_h[None, :]
        b_gate, b_up, b_down = load_three(x, i_r, o_r, o_h, mask, D, HID)
        g_gate, g_up, g_own = load_three(dx, i_x, o_r, o_h, mask & (o_r < tl.where(carried, D, 0))[:, None], D, HID)
        if NORM == POST_WRITE:
            q_gate, q_up, q_down = load_three(dread, i_r, o_r, o_h, mask, D, HID)
            g_gate, g_up, g_own = g_gate + q_gate, g_up + q_up, g_own + q_down
        b_rows += tl.sum(pair(b_gate * g_gate, b_up * g_up), 0)
        tl.store(rows_hidden + i_y * (2 * BH) + tl.arange(0, 2 * BH), b_rows)
        tl.store(rows_down + i_y * (2 * D) + o_d, r_down, mask=m_d)
        tl.store(rows_down + i_y * (2 * D) + D + o_r, tl.sum(b_down * g_own, 1), mask=o_r < D)


@triton.jit
def quotient(a, b, FAST: tl.constexpr):
    """FAST: two units in the last place, without a subroutine for what is out of range."""
    if FAST:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def through_norms(
    b_x, b_g, b_inner, b_n, b_size, eps, along_rows: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradient of X from that of N X / (|X| + eps) and <X, gradient> / (|X| + eps), the gradient of N, by row."""
    below = b_size + eps
    some = below > 0
    below = tl.where(some, below, 1.0)
    factor = tl.where(some, quotient(b_n, below, FAST), 0.0)
    b_dn = tl.where(some, quotient(b_inner, below, FAST), 0.0)
    # a zero row has no direction
    along = tl.where(b_size > 0, quotient(factor * b_dn, tl.where(b_size > 0, b_size, 1.0), FAST), 0.0)
    if along_rows:
        return factor[:, None] * b_g - along[:, None] * b_x, b_dn
    else:
        return factor[None, :] * b_g - along[None, :] * b_x, b_dn


@triton.jit
def point_down(
    x, size, n, i_r, i_h, i_c, o_d, o_h, mask, eps, D: tl.constexpr, HID: tl.constexpr, NORM: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Wdown at the write point of chunk `i_c`, slot and head `i_r`."""
    at = tl.cast(i_r, tl.int64) * (3 * D * HID) + 2 * D * HID
    b_w = tl.load(x + at + (o_d[:, None] * HID + o_h[None, :]), mask=mask, other=0.0)
    _, _, s_down = row_scales(size, n, i_r, i_h, i_c, o_d, o_h, eps, D, HID, NORM, FAST)
    return b_w * s_down[:, None]


@triton.jit
def store_gradient(
    down, d_gate_up, i_r, i_s, o_d, b_point, b_gate, b_up, b_down, D: tl.constexpr, HID: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """dD of slot and head `i_r` as operands: a pair of gate and up, and a pair of the write point's down and down's gradient."""
    m_d = o_d < D
    store_operand(down, i_r, i_s * BH, o_d, m_d, pair(b_point, b_down), D, HID, BH, 2)
    store_operand(d_gate_up, i_r, i_s * BH, o_d, m_d, pair(b_gate, b_up), D, HID, BH, 2)


@triton.jit
def carry_step(
    dx, dm, dn, dread, x, m, size, n, m_gate, m_up, m_down, mu_mean, down, d_gate_up, mu_parts, clip_parts,
    slabs_gate_up, slabs_down, rows_hidden, rows_down,
    i_x, i_s, i_k, i_r, i_h, i_c, written, H, eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, SP: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, STATE: tl.constexpr, END: tl.constexpr, SAVE_M: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dX_j, j = `i_c`, of the rows that program (i_s, i_k) owns, and on to chunk j - 1.

    END: dX and dM hold the final state's gradients at first, else nothing.
    """
    SLICES: tl.constexpr = (HID + BH - 1) // BH
    PARTS: tl.constexpr = SLICES * SP
    RD: tl.constexpr = BD // SP
    o_d, o_h = i_k * RD + tl.arange(0, RD), i_s * BH + tl.arange(0, BH)
    m_d, m_h = o_d < D, o_h < HID
    mask = m_d[:, None] & m_h[None, :]
    # a scalar condition as a bound: the interpreter takes no scalar in a mask
    carried = mask & (o_d < tl.where((i_c < written) | END, D, 0))[:, None]
    g_gate, g_up, g_down = load_three(dx, i_x, o_d, o_h, carried, D, HID)
    z_gate, z_up, z_down = load_three(dm, i_x, o_d, o_h, carried, D, HID)
    q_gate, q_up, q_down = load_three(dread, i_r, o_d, o_h, mask, D, HID)
    b_mu = tl.where(i_c < written, tl.load(mu_mean + i_r), 1.0)
    # the first slot has no chunk before it
    before = i_c > 0
    i_q = tl.where(before, i_r - H, i_r)
    # Everything is loaded before it is needed and before the first store: a load that follows a store waits for it.
    b_point = point_down(x, size, n, i_q, i_h, i_c - 1, o_d, o_h, mask, eps, D, HID, NORM, FAST)
    if NORM != NONE:
        b_gate, b_up, b_down = load_three(x, i_r, o_d, o_h, mask, D, HID)
        p_size = size + tl.cast(i_r, tl.int64) * (2 * HID + D)
        p_n = n + i_h * (2 * HID + D)
        size_gate, n_gate = tl.load(p_size + o_h, mask=m_h, other=0.0), tl.load(p_n + o_h, mask=m_h, other=0.0)
        size_up, n_up = tl.load(p_size + HID + o_h, mask=m_h, other=0.0), tl.load(p_n + HID + o_h, mask=m_h, other=0.0)
        size_down, n_down = tl.load(p_size + 2 * HID + o_d, mask=m_d, other=0.0), tl.load(p_n + 2 * HID + o_d, mask=m_d, other=0.0)
        # dN of a hidden unit is added up by the program of its first channels, that of a channel by the program of the first units
        p_n = dn + tl.cast(i_x, tl.int64) * (2 * HID + D)
        p_h, p_d = p_n + o_h, p_n + 2 * HID + o_d
        own_h, own_d = o_h < tl.where(i_k == 0, HID, 0), o_d < tl.where(i_s == 0, D, 0)
        old_h, old_d = own_h & (o_h < tl.where(i_c < written, HID, 0)), own_d & (o_d < tl.where(i_c < written, D, 0))
        dn_gate, dn_up = tl.load(p_h, mask=old_h, other=0.0), tl.load(p_h + HID, mask=old_h, other=0.0)
        dn_down = tl.load(p_d, mask=old_d, other=0.0)
    i_y = tl.cast(i_x, tl.int64) * PARTS + i_s * SP
    for i_p in tl.static_range(SP):
        c_gate, c_up = part(load_operand(slabs_gate_up, i_y + i_p, 0, o_d, D, BH, BH, 2))
        g_gate += c_gate
        g_up += c_up
        g_down += load_operand(slabs_down, i_y + i_p, 0, o_d, D, BH, BH, 1)
    if NORM == POST_WRITE:
        g_gate, g_up, g_down = g_gate + q_gate, g_up + q_up, g_down + q_down
    if NORM != NONE:
        b_rows = tl.zeros([2 * BH], dtype=tl.float32)
        p_rows = rows_hidden + i_y * (2 * BH) + tl.arange(0, 2 * BH)
        for i_p in tl.static_range(SP):
            b_rows += tl.load(p_rows + i_p * 2 * BH, cache_modifier=".cg")
        r_gate, r_up = tl.split(tl.reshape(b_rows, (BH, 2)))
        r_down = tl.zeros([RD], dtype=tl.float32)
        p_rows = rows_down + tl.cast(i_x, tl.int64) * (PARTS * 2 * D) + o_d
        for i_p in tl.static_range(PARTS):
            r_down += tl.load(p_rows + i_p * 2 * D, mask=m_d, other=0.0, cache_modifier=".cg")
        for i_p in tl.static_range(SLICES):
            r_down += tl.load(p_rows + ((i_p * SP + i_k) * 2 + 1) * D, mask=m_d, other=0.0, cache_modifier=".cg")
        c_gate, r_gate = through_norms(b_gate, g_gate, r_gate, n_gate, size_gate, eps, False, FAST)
        c_up, r_up = through_norms(b_up, g_up, r_up, n_up, size_up, eps, False, FAST)
        c_down, r_down = through_norms(b_down, g_down, r_down, n_down, size_down, eps, True, FAST)
        # pre_write: the last slot's weights are read, not written from; post_write: the first weights are taken as they are
        here = i_c < written if NORM == PRE_WRITE else i_c > 0
        g_gate, g_up, g_down = tl.where(here, c_gate, g_gate), tl.where(here, c_up, g_up), tl.where(here, c_down, g_down)
        tl.store(p_h, dn_gate + tl.where(here, r_gate, 0.0), mask=own_h)
        tl.store(p_h + HID, dn_up + tl.where(here, r_up, 0.0), mask=own_h)
        tl.store(p_d, dn_down + tl.where(here, r_down, 0.0), mask=own_d)
    if NORM != POST_WRITE:
        g_gate, g_up, g_down = g_gate + q_gate, g_up + q_up, g_down + q_down
    store_three(dx, i_x, o_d, o_h, mask, g_gate, g_up, g_down, D, HID)
    # what is left before the first slot is dM_0
    z_gate = b_mu * z_gate + tl.where(before, g_gate, 0.0)
    z_up = b_mu * z_up + tl.where(before, g_up, 0.0)
    z_down = b_mu * z_down + tl.where(before, g_down, 0.0)
    store_three(dm, i_x, o_d, o_h, mask, z_gate, z_up, z_down, D, HID)
    if before:
        if CLIP:
            i_part = i_s * SP + i_k
            m_all = momentum(
                x, m, size, n, m_gate, m_up, m_down, i_x, i_q, i_h, i_c - 1, H, o_d, o_h, mask, eps, D, HID, NORM, STATE, SAVE_M, FAST
            )
            c_all = momentum(
                x, m, size, n, m_gate, m_up, m_down, i_x, i_r, i_h, i_c, H, o_d, o_h, mask, eps, D, HID, NORM, STATE, SAVE_M, FAST
            )
            b_dmu = inner(z_gate, m_all[0]) + inner(z_up, m_all[1]) + inner(z_down, m_all[2])
            tl.store(mu_parts + tl.cast(i_q, tl.int64) * PARTS + i_part, b_dmu)
            b_mu = tl.load(mu_mean + i_q)
            p_c = clip_parts + (tl.cast(i_x, tl.int64) * PARTS + i_part) * 3
            tl.store(p_c, inner(z_gate, c_all[0] - b_mu * m_all[0]))
            tl.store(p_c + 1, inner(z_up, c_all[1] - b_mu * m_all[1]))
            tl.store(p_c + 2, inner(z_down, c_all[2] - b_mu * m_all[2]))
        else:
            store_gradient(down, d_gate_up, i_q, i_s, o_d, b_point, z_gate, z_up, z_down, D, HID, BH)


@triton.jit
def unclipped(b_dm, b_c, b_along, b_size, grad_clip):
    """The gradient of D from that of clip(D) = C, <gradient, C> and |D|: nothing along D where the clip holds."""
    held = b_size > grad_clip
    by = grad_clip / tl.where(held, b_size, grad_clip)
    return tl.where(held, by * (b_dm - (b_along / (grad_clip * grad_clip)) * b_c), b_dm)


@triton.jit
def clip_step(
    dm, x, m, size, n, m_gate, m_up, m_down, mu_mean, g_size, down, d_gate_up, clip_parts,
    i_x, i_s, i_k, i_r, i_h, i_c, H, eps, grad_clip,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, SP: tl.constexpr,
    NORM: tl.constexpr, STATE: tl.constexpr, SAVE_M: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dD of chunk i_c - 1, of the rows that program (i_s, i_k) owns."""
    PARTS: tl.constexpr = (HID + BH - 1) // BH * SP
    RD: tl.constexpr = BD // SP
    o_d, o_h = i_k * RD + tl.arange(0, RD), i_s * BH + tl.arange(0, BH)
    mask = (o_d < D)[:, None] & (o_h < HID)[None, :]
    i_q = i_r - H
    a_gate = 0.0
    a_up = 0.0
    a_down = 0.0
    p_c = clip_parts + tl.cast(i_x, tl.int64) * (PARTS * 3)
    for i_p in tl.static_range(PARTS):
        a_gate += tl.load(p_c + i_p * 3, cache_modifier=".cg")
        a_up += tl.load(p_c + i_p * 3 + 1, cache_modifier=".cg")
        a_down += tl.load(p_c + i_p * 3 + 2, cache_modifier=".cg")
    z_gate, z_up, z_down = load_three(dm, i_x, o_d, o_h, mask, D, HID)
    m_all = momentum(x, m, size, n, m_gate, m_up, m_down, i_x, i_q, i_h, i_c - 1, H, o_d, o_h, mask, eps, D, HID, NORM, STATE, SAVE_M, FAST)
    c_all = momentum(x, m, size, n, m_gate, m_up, m_down, i_x, i_r, i_h, i_c, H, o_d, o_h, mask, eps, D, HID, NORM, STATE, SAVE_M, FAST)
    b_mu = tl.load(mu_mean + i_q)
    p_g = g_size + tl.cast(i_q, tl.int64) * 3
    z_gate = unclipped(z_gate, c_all[0] - b_mu * m_all[0], a_gate, tl.load(p_g), grad_clip)
    z_up = unclipped(z_up, c_all[1] - b_mu * m_all[1], a_up, tl.load(p_g + 1), grad_clip)
    z_down = unclipped(z_down, c_all[2] - b_mu * m_all[2], a_down, tl.load(p_g + 2), grad_clip)
    b_point = point_down(x, size, n, i_q, i_h, i_c - 1, o_d, o_h, mask, eps, D, HID, NORM, FAST)
    store_gradient(down, d_gate_up, i_q, i_s, o_d, b_point, z_gate, z_up, z_down, D, HID, BH)


# ---- a kernel for each part of a step


@triton.jit(do_not_specialize=["R", "X", "T", "chunk_size", "i_step", "H", "steps", "se_b"])
def ttt_mlp_bwd_slab_kernel(
    k, v, eta, cu_seqlens, count, first, x, operands, scratch, R, X, T, chunk_size, i_step, H, steps,
    sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, SP: tl.constexpr, BT: tl.constexpr, NORM: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, END: tl.constexpr, AHEAD: tl.constexpr,
    PREC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The tokens part of every sequence's slot `i_step` from its last one back. Grid (X, slices, SP)."""
    PARTS: tl.constexpr = (HID + BH - 1) // BH * SP
    i_x, i_s, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_n, i_h = i_x // H, i_x % H
    i_b, begin, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    i_c = written_chunks(length, held, chunk_size, KEEP) - i_step
    if i_c < 0:
        return
    i_r = (first_slot(first, i_n, steps, PACKED) + i_c) * H + i_h
    start, stop = chunk_span(i_c, length, held, chunk_size)
    gate_up, d_gate_up, down = operand_regions(operands, R, D, HID)
    dread, dx, _, _ = gradient_regions(scratch, R, X, D, HID)
    slabs_gate_up, slabs_down, rows_hidden, rows_down, _, _ = exchange_regions(scratch, R, X, D, HID, BH, PARTS)
    tokens_step(
        k, v, eta, dx, dread, x, gate_up, d_gate_up, down, slabs_gate_up, slabs_down, rows_hidden, rows_down,
        i_x, i_s, i_k, i_r, i_h, i_b, begin + start, tl.where(i_step > 0, stop - start, 0), (i_step > 0) | END,
        sk_b, sk_t, sk_h, sk_d, sv_b, sv_t, sv_h, sv_d, se_b, se_t, se_h, se_e,
        D, HID, BD, BH, SP, BT, NORM, AHEAD, PREC, FAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R", "X", "T", "chunk_size", "i_step", "H", "steps"])
def ttt_mlp_bwd_carry_kernel(
    cu_seqlens, count, first, x, m, size, n, m_gate, m_up, m_down, mu_mean, operands, scratch,
    R, X, T, chunk_size, i_step, H, steps, eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, SP: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, END: tl.constexpr, SAVE_M: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The carry part. Grid (X, slices, SP)."""
    PARTS: tl.constexpr = (HID + BH - 1) // BH * SP
    i_x, i_s, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_n, i_h = i_x // H, i_x % H
    _, _, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    written = written_chunks(length, held, chunk_size, KEEP)
    i_c = written - i_step
    if i_c < 0:
        return
    i_r = (first_slot(first, i_n, steps, PACKED) + i_c) * H + i_h
    _, d_gate_up, down = operand_regions(operands, R, D, HID)
    dread, dx, dm, dn = gradient_regions(scratch, R, X, D, HID)
    slabs_gate_up, slabs_down, rows_hidden, rows_down, clip_parts, mu_parts = exchange_regions(scratch, R, X, D, HID, BH, PARTS)
    carry_step(
        dx, dm, dn, dread, x, m, size, n, m_gate, m_up, m_down, mu_mean, down, d_gate_up, mu_parts, clip_parts,
        slabs_gate_up, slabs_down, rows_hidden, rows_down, i_x, i_s, i_k, i_r, i_h, i_c, written, H, eps,
        D, HID, BD, BH, SP, NORM, CLIP, STATE, END, SAVE_M, FAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R", "X", "T", "chunk_size", "i_step", "H", "steps"])
def ttt_mlp_bwd_clip_kernel(
    cu_seqlens, count, first, x, m, size, n, m_gate, m_up, m_down, mu_mean, g_size, operands, scratch,
    R, X, T, chunk_size, i_step, H, steps, eps, grad_clip,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, SP: tl.constexpr, NORM: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, SAVE_M: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The clip part. Grid (X, slices, SP)."""
    PARTS: tl.constexpr = (HID + BH - 1) // BH * SP
    i_x, i_s, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_n, i_h = i_x // H, i_x % H
    _, _, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED, STATE)
    i_c = written_chunks(length, held, chunk_size, KEEP) - i_step
    if i_c <= 0:
        return
    i_r = (first_slot(first, i_n, steps, PACKED) + i_c) * H + i_h
    _, d_gate_up, down = operand_regions(operands, R, D, HID)
    _, _, dm, _ = gradient_regions(scratch, R, X, D, HID)
    _, _, _, _, clip_parts, _ = exchange_regions(scratch, R, X, D, HID, BH, PARTS)
    clip_step(
        dm, x, m, size, n, m_gate, m_up, m_down, mu_mean, g_size, down, d_gate_up, clip_parts,
        i_x, i_s, i_k, i_r, i_h, i_c, H, eps, grad_clip, D, HID, BD, BH, SP, NORM, STATE, SAVE_M, FAST,
    )  # fmt: skip
