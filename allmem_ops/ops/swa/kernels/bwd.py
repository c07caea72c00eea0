"""The backward of `swa`: dq by query tiles, dk and dv by key tiles, both from recomputed probabilities.

Scores are in base 2 (see `probabilities`); ds = p * (<do, v> - delta), delta = <do, o> - dlse. What belongs to a query alone, its scaled
lse and delta, is kept in `rows` fp32 [2, B, HQ, P], padded to whole tiles with (+inf, 0): a
padded query has p = 0 and ds = 0, so tiles at the end of a sequence need no mask for it. Of float32 operands, <do, o> and dlse are kept
apart, [3, B, HQ, P], see `row_terms`.

Packed sequences: `cu_seqlens` cuts the one row into N sequences. Tile slots of `size` tokens are given out by position: sequence n owns
the slots from cu_seqlens[n] // size + n on. That is enough for all its tiles (floor(a + b) >= floor(a) + ceil(b) - 1) and needs neither
a prefix sum nor a host read.
"""

import triton
import triton.language as tl

from allmem_ops.ops.swa.kernels.tiles import key_tiles, query_tiles

LOG2E = tl.constexpr(1.4426950408889634)
FAR_AWAY = tl.constexpr(2**31 - 1)
ROW_TILE = tl.constexpr(128)  # rows of one sequence are padded to a multiple of it: the largest tile of queries


@triton.jit
def first_slot(cu_seqlens, i_n, T, size):
    """(start, first tile slot) of sequence `i_n`; offsets out of range never lead outside [0, T]."""
    bos = tl.minimum(tl.maximum(tl.cast(tl.load(cu_seqlens + i_n), tl.int32), 0), T)
    return bos, bos // size + i_n


@triton.jit
def sequence_of_slot(cu_seqlens, N, T, i_slot, size):
    """(sequence, its start, its length, its tile) of a slot; the tile may lie behind the sequence's end."""
    low, high = 0, N
    while high - low > 1:
        mid = (low + high) // 2
        _, slot = first_slot(cu_seqlens, mid, T, size)
        below = slot <= i_slot
        low = tl.where(below, mid, low)
        high = tl.where(below, high, mid)
    bos, slot = first_slot(cu_seqlens, low, T, size)
    eos, _ = first_slot(cu_seqlens, low + 1, T, size)
    return low, bos, tl.maximum(eos - bos, 0), i_slot - slot


@triton.jit
def load_tile(x, i_b, i_t, i_h, s_b, s_t, s_h, s_d, bos, T, BT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """Tokens [i_t, i_t + BT) of one head as [BT, BD], zero outside [0, T) and beyond D. `x`: a descriptor of [B, H, T, D], or a pointer."""
    if TMA:
        b_x = tl.reshape(x.load([i_b, i_h, i_t, 0]), (BT, BD))
    else:
        o_t = i_t + tl.arange(0, BT)
        o_d = tl.arange(0, BD)
        p_x = x + tl.cast(i_b, tl.int64) * s_b + tl.cast(i_h, tl.int64) * s_h
        p_x += (tl.cast(bos, tl.int64) + o_t)[:, None] * s_t + o_d[None, :] * s_d
        m_x = (o_t < T)[:, None]
        if D < BD:
            m_x &= (o_d < D)[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0)
    return b_x


@triton.jit
def store_tile(x, b_x, i_b, i_t, i_h, s_b, s_t, s_h, bos, T, BT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Put [BT, BD] to tokens [i_t, i_t + BT) of one head, those before T; the last dimension is contiguous."""
    o_t = i_t + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    p_x = x + tl.cast(i_b, tl.int64) * s_b + tl.cast(i_h, tl.int64) * s_h
    p_x += (tl.cast(bos, tl.int64) + o_t)[:, None] * s_t + o_d[None, :]
    m_x = (o_t < T)[:, None]
    if D < BD:
        m_x &= (o_d < D)[None, :]
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_x)


@triton.jit
def scaled_lse(b_lse, HALF: tl.constexpr):
    return b_lse * LOG2E if HALF else b_lse


@triton.jit
def probabilities(b_s, b_lse, scale, HALF: tl.constexpr):
    """exp(scale * b_s - lse), `b_lse` from `scaled_lse`.

    One multiply-add and exp2 an element. For float32 operands the difference comes first: the rounding of lse * log2(e), of the size
    of lse, would double the error of p.
    """
    return tl.exp2(b_s * (scale * LOG2E) - b_lse) if HALF else tl.exp(b_s * scale - b_lse)


@triton.jit
def row_terms(
    b_do,
    o,
    lse,
    dlse,
    i_b,
    i0,
    i_hq,
    s_ob,
    s_ot,
    s_oh,
    s_od,
    s_lb,
    s_lt,
    s_lh,
    s_eb,
    s_et,
    s_eh,
    bos,
    Tq,
    HALF: tl.constexpr,
    BM: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TMA: tl.constexpr,
):
    """(scaled lse, delta, dlse) of queries [i0, i0 + BM), (+inf, 0, 0) beyond the sequence.

    In float32 delta is <do, o> alone. Where <do, v> and <do, o> nearly cancel, what is left is their rounding: both are summed in the
    same order, so that o = v leaves exactly 0, and dlse is added to the difference.
    """
    o_m = i0 + tl.arange(0, BM)
    m_m = o_m < Tq
    o_row = bos + tl.cast(o_m, tl.int64)
    p_lse = lse + tl.cast(i_b, tl.int64) * s_lb + tl.cast(i_hq, tl.int64) * s_lh + o_row * s_lt
    p_dlse = dlse + tl.cast(i_b, tl.int64) * s_eb + tl.cast(i_hq, tl.int64) * s_eh + o_row * s_et
    b_o = load_tile(o, i_b, i0, i_hq, s_ob, s_ot, s_oh, s_od, bos, Tq, BM, D, BD, TMA)
    b_dlse = tl.load(p_dlse, mask=m_m, other=0.0)
    if HALF:
        b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1) - b_dlse
    else:
        # [BM, BD] @ [BD, BM] -> [BM, BM], of which the diagonal counts
        b_delta = tl.dot(b_do, tl.trans(b_o), input_precision="ieee")
        b_delta = tl.sum(tl.where(tl.arange(0, BM)[:, None] == tl.arange(0, BM)[None, :], b_delta, 0.0), 1)
    return scaled_lse(tl.load(p_lse, mask=m_m, other=float("inf")), HALF), b_delta, b_dlse


@triton.jit
def hidden_to_zero(b_p, o_i, o_j, far, window, sinks):
    """Zero the probabilities of pairs that a window tile or, if `far`, a far sink tile does not hold. `o_i`, `o_j` broadcast to b_p."""
    apart = o_i - o_j
    nearest = tl.where(far, window, 0)
    farthest = tl.where(far, FAR_AWAY, window)
    last = tl.where(far, sinks, FAR_AWAY)
    return tl.where((apart >= nearest) & (apart < farthest) & (o_j < last), b_p, 0.0)


@triton.jit(
    do_not_specialize=["N", "Tq", "Tk", "P", "window", "sinks", "B", "HQ", "G"],
    do_not_specialize_on_alignment=["N", "Tq", "Tk", "P", "window", "sinks", "B", "HQ", "G"],
)
def swa_bwd_dq_kernel(
    q,
    k,
    v,
    o,
    do,
    lse,
    dlse,
    rows,
    acc,
    dq,
    cu_seqlens,
    s_qb,
    s_qt,
    s_qh,
    s_qd,
    s_kb,
    s_kt,
    s_kh,
    s_kd,
    s_vb,
    s_vt,
    s_vh,
    s_vd,
    s_ob,
    s_ot,
    s_oh,
    s_od,
    s_gb,
    s_gt,
    s_gh,
    s_gd,
    s_lb,
    s_lt,
    s_lh,
    s_eb,
    s_et,
    s_eh,
    s_dqb,
    s_dqt,
    s_dqh,
    N,
    Tq,
    Tk,
    P,
    window,
    sinks,
    scale,
    B,
    HQ,
    G,
    D: tl.constexpr,
    BD: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    ACC: tl.constexpr,
    HALF: tl.constexpr,
    STARTS: tl.constexpr,
    PACKED: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dq of one query tile and head: a loop over the far sink tiles (FAR) and the window tiles (NEAR). NEAR also writes `rows`.
    STARTS: `rows` is that of the Hopper kernel.

    ACC: on top of what `acc` fp32 [B, HQ, Tq, BD] holds, the unscaled dq of the window pairs.
    """
    # Heads run fastest: programs side by side read the same tokens, whole rows of memory, and share a group's keys and values.
    i_b = tl.program_id(0) % B
    i_hq = tl.program_id(0) // B % HQ
    i_m = tl.program_id(0) // B // HQ
    i_h = i_hq // G
    if ACC:
        acc += (tl.cast(i_b, tl.int64) * HQ + i_hq) * Tq * BD
    if PACKED:
        i_n, bos, Tk, i_m = sequence_of_slot(cu_seqlens, N, Tq, i_m, BM)
        Tq = Tk
        r0 = (bos // ROW_TILE + i_n) * ROW_TILE
    else:
        bos = 0
        r0 = 0
    i0 = i_m * BM
    if i0 >= Tq:
        return
    start = Tk - Tq
    o_m = i0 + tl.arange(0, BM)
    if ACC:
        b_dq = load_tile(acc, 0, i0, 0, 0, BD, 0, 1, bos, Tq, BM, D, BD, False) + 0.0  # see swa_bwd_out_kernel
    else:
        b_dq = tl.zeros([BM, BD], tl.float32)
    if NEAR or FAR:
        b_do = load_tile(do, i_b, i0, i_hq, s_gb, s_gt, s_gh, s_gd, bos, Tq, BM, D, BD, TMA)
        p_rows = rows + (tl.cast(i_b, tl.int64) * HQ + i_hq) * P + r0 + o_m
        s_rows = tl.cast(B, tl.int64) * HQ * P
        if NEAR:
            b_lse, b_delta, b_dlse = row_terms(
                b_do, o, lse, dlse, i_b, i0, i_hq, s_ob, s_ot, s_oh, s_od, s_lb, s_lt, s_lh, s_eb, s_et, s_eh, bos, Tq, HALF, BM, D, BD, TMA
            )
            tl.store(p_rows, b_lse)
            tl.store(p_rows + s_rows, b_delta)
            if not HALF:
                tl.store(p_rows + 2 * s_rows, b_dlse)
        else:
            b_lse = tl.load(p_rows)
            b_delta = tl.load(p_rows + s_rows)
            if not HALF:
                b_dlse = tl.load(p_rows + 2 * s_rows)
            if STARTS:
                b_lse *= -(scale * LOG2E)
                b_delta = -b_delta
        b_q = load_tile(q, i_b, i0, i_hq, s_qb, s_qt, s_qh, s_qd, bos, Tq, BM, D, BD, TMA)
        i1 = start + tl.minimum(i0 + BM, Tq)
        sink_full, sink_end, left, full, diag, end = query_tiles(start + i0, i1, window, sinks, BN)
        far_tiles = sink_end if FAR else 0
        tiles = far_tiles + (end - left if NEAR else 0)
        o_i = (start + o_m)[:, None]
        for t in range(tiles):
            far = t < far_tiles
            i_n = tl.where(far, t, left + t - far_tiles)
            j0 = i_n * BN
            b_k = load_tile(k, i_b, j0, i_h, s_kb, s_kt, s_kh, s_kd, bos, Tk, BN, D, BD, TMA)
            b_v = load_tile(v, i_b, j0, i_h, s_vb, s_vt, s_vh, s_vd, bos, Tk, BN, D, BD, TMA)
            # [BM, BD] @ [BD, BN] -> [BM, BN]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_p = probabilities(b_s, b_lse[:, None], scale, HALF)
            if tl.where(far, t >= sink_full, (i_n < full) | (i_n >= diag)):
                b_p = hidden_to_zero(b_p, o_i, (j0 + tl.arange(0, BN))[None, :], far, window, sinks)
            # [BM, BD] @ [BD, BN] -> [BM, BN]
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_ds = b_dp - b_delta[:, None]
            if not HALF:
                b_ds += b_dlse[:, None]
            b_ds *= b_p
            # [BM, BN] @ [BN, BD] -> [BM, BD]
            b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
    store_tile(dq, b_dq * scale, i_b, i0, i_hq, s_dqb, s_dqt, s_dqh, bos, Tq, BM, D, BD)


UNSPECIALIZED = ["N", "T", "P", "B", "HQ", "s_lb", "s_lt", "s_lh", "s_eb", "s_et", "s_eh"]


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNSPECIALIZED)
def swa_bwd_rows_kernel(
    o,
    do,
    lse,
    dlse,
    rows,
    turn,
    acc,
    cu_seqlens,
    s_ob: tl.int64,
    s_ot: tl.int64,
    s_oh: tl.int64,
    s_od,
    s_gb: tl.int64,
    s_gt: tl.int64,
    s_gh: tl.int64,
    s_gd,
    s_lb: tl.int64,
    s_lt: tl.int64,
    s_lh: tl.int64,
    s_eb: tl.int64,
    s_et: tl.int64,
    s_eh: tl.int64,
    N,
    T,
    P,
    scale,
    B,
    HQ,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    BM: tl.constexpr,
):
    """What the Hopper kernel starts from: `rows` as its products begin with them, -lse / scale and -delta, padded with (-inf, 0); zeros in
    what it counts with, `turn` int32 [1 + B * HQ * P / BM]; and zeros where it does not store first, in the last tile of a packed
    sequence in `acc` fp32 [B, HQ, T, D].
    """
    pid = tl.program_id(0)
    i_b = pid % B
    i_hq = pid // B % HQ
    slot = pid // B // HQ
    i_row = tl.cast(i_b * HQ + i_hq, tl.int64)
    acc += i_row * T * D
    if PACKED:
        _, bos, T, i_m = sequence_of_slot(cu_seqlens, N, T, slot // (ROW_TILE // BM), ROW_TILE)
        i0 = i_m * ROW_TILE + slot % (ROW_TILE // BM) * BM
    else:
        bos = 0
        i0 = slot * BM
    b_do = load_tile(do, i_b, i0, i_hq, s_gb, s_gt, s_gh, s_gd, bos, T, BM, D, D, False)
    b_lse, b_delta, _ = row_terms(
        b_do, o, lse, dlse, i_b, i0, i_hq, s_ob, s_ot, s_oh, s_od, s_lb, s_lt, s_lh, s_eb, s_et, s_eh, bos, T, True, BM, D, D, False
    )
    p_rows = rows + i_row * P + slot * BM + tl.arange(0, BM)
    tl.store(p_rows, b_lse * (-1.0 / (LOG2E * scale)))
    tl.store(p_rows + tl.cast(B, tl.int64) * HQ * P, -b_delta)
    tl.store(turn + 1 + i_row * (P // BM) + slot, 0)
    if pid == 0:
        tl.store(turn, 0)
    if PACKED:
        if i0 + BM > T:
            store_tile(acc, tl.zeros([BM, D], tl.float32), 0, i0, 0, 0, D, 0, bos, T, BM, D, D)


@triton.jit(do_not_specialize=["T", "B", "HQ"], do_not_specialize_on_alignment=["T", "B", "HQ"])
def swa_bwd_out_kernel(acc, dq, T, scale, B, HQ, D: tl.constexpr, BM: tl.constexpr):
    """dq, contiguous [B, T, HQ, D], from the unscaled `acc` fp32 [B, HQ, T, D]."""
    i_b = tl.cast(tl.program_id(0) % B, tl.int64)
    i_hq = tl.program_id(0) // B % HQ
    o_t = tl.program_id(0) // B // HQ * BM + tl.arange(0, BM)
    o_d = tl.arange(0, D)[None, :]
    m_t = (o_t < T)[:, None]
    b_dq = tl.load(acc + ((i_b * HQ + i_hq) * T + o_t)[:, None] * D + o_d, mask=m_t)
    b_dq = b_dq * scale + 0.0  # no -0: the zeros that a neighbour adds may have come before the sum or after it
    tl.store(dq + ((i_b * T + o_t) * HQ + i_hq)[:, None] * D + o_d, b_dq.to(dq.dtype.element_ty), mask=m_t)


@triton.jit
def far_sequence(cu_seqlens, N, T, i_f, window, slots):
    """(sequence, start, length) of the workspace slot `i_f` of far sinks; length 0 for a slot without a sequence.

    Only a sequence longer than the window has far pairs, and two such start at least window + 1 apart: with fewer than N slots the slot is
    start // (window + 1), and the sequence is the last one that starts in its span.
    """
    if slots == N:
        i_n = i_f
    else:
        low, high = 0, N
        while high - low > 1:
            mid = (low + high) // 2
            bos, _ = first_slot(cu_seqlens, mid, T, 1)
            below = bos // (window + 1) <= i_f
            low = tl.where(below, mid, low)
            high = tl.where(below, high, mid)
        i_n = low
    bos, _ = first_slot(cu_seqlens, i_n, T, 1)
    eos, _ = first_slot(cu_seqlens, i_n + 1, T, 1)
    own = (slots == N) | (bos // (window + 1) == i_f)
    return i_n, bos, tl.where(own, tl.maximum(eos - bos, 0), 0)


@triton.jit(
    do_not_specialize=["N", "Tq", "Tk", "window", "sinks", "splits", "far_slots", "B", "HK", "G"],
    do_not_specialize_on_alignment=["N", "Tq", "Tk", "window", "sinks", "splits", "far_slots", "B", "HK", "G"],
)
def swa_bwd_dkdv_kernel(
    q,
    k,
    v,
    do,
    rows,
    dk,
    dv,
    part,
    cu_seqlens,
    s_qb,
    s_qt,
    s_qh,
    s_qd,
    s_kb,
    s_kt,
    s_kh,
    s_kd,
    s_vb,
    s_vt,
    s_vh,
    s_vd,
    s_gb,
    s_gt,
    s_gh,
    s_gd,
    s_dkb,
    s_dkt,
    s_dkh,
    N,
    Tq,
    Tk,
    window,
    sinks,
    splits,
    far_slots,
    scale,
    B,
    HK,
    G,
    D: tl.constexpr,
    BD: tl.constexpr,
    FAR: tl.constexpr,
    HALF: tl.constexpr,
    STARTS: tl.constexpr,
    PACKED: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dk and dv of one key tile and head: a loop over the query tiles that see it, for each query head of the group.

    FAR: the far sink pairs of one of `splits` ranges of queries, left in `part` fp32 [B or far_slots, sink tile, HK, splits, 2, BN, BD].
    Otherwise the window pairs, on top of the sum of what FAR has left.
    """
    i_b = tl.program_id(0) % B
    i_h = tl.program_id(0) // B % HK
    i_x = tl.program_id(0) // B // HK
    sink_tiles = (sinks + BN - 1) // BN
    i_s = 0
    if FAR:
        i_s = i_x % splits
        i_j = i_x // splits % sink_tiles
        i_f = i_x // splits // sink_tiles
        if PACKED:
            i_n, bos, Tk = far_sequence(cu_seqlens, N, Tq, i_f, window, far_slots)
    else:
        i_j = i_x
        i_f = 0
        if PACKED:
            i_n, bos, Tk, i_j = sequence_of_slot(cu_seqlens, N, Tk, i_x, BN)
            i_f = i_n if far_slots == N else bos // (window + 1)
    if PACKED:
        Tq = Tk
        r0 = (bos // ROW_TILE + i_n) * ROW_TILE
    else:
        i_f = i_b
        bos = 0
        r0 = 0
    start = Tk - Tq
    j0 = i_j * BN
    if j0 >= Tk:
        return
    # The tile's keys beyond Tk count as keys: causality hides them, and the loop's bounds stay the same.
    diag, full, right, end, far, far_full, far_end = key_tiles(j0, j0 + BN, start, Tk, window, sinks, BM)
    p_part = part + (((tl.cast(i_f, tl.int64) * sink_tiles + i_j) * HK + i_h) * splits + i_s) * (2 * BN * BD)
    p_part += tl.arange(0, BN)[:, None] * BD + tl.arange(0, BD)[None, :]
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    if FAR:
        if far_end == 0:
            return
        each = (far_end - far + splits - 1) // splits
        first = far + i_s * each
        last = tl.minimum(first + each, far_end)
        masked_before, masked_from = far_full, far_end
    else:
        first, last = diag, end
        masked_before, masked_from = full, right
    b_k = load_tile(k, i_b, j0, i_h, s_kb, s_kt, s_kh, s_kd, bos, Tk, BN, D, BD, TMA)
    b_v = load_tile(v, i_b, j0, i_h, s_vb, s_vt, s_vh, s_vd, bos, Tk, BN, D, BD, TMA)
    o_j = (j0 + tl.arange(0, BN))[:, None]
    tiles = tl.maximum(last - first, 0)
    # One loop over heads and tiles: its pipeline stays full where one head ends and the next begins.
    for t in range(G * tiles):
        i_g = t // tiles
        i_m = first + t - i_g * tiles
        i_hq = i_h * G + i_g
        i0 = i_m * BM
        b_q = load_tile(q, i_b, i0, i_hq, s_qb, s_qt, s_qh, s_qd, bos, Tq, BM, D, BD, TMA)
        b_do = load_tile(do, i_b, i0, i_hq, s_gb, s_gt, s_gh, s_gd, bos, Tq, BM, D, BD, TMA)
        b_lse = tl.reshape(rows.load([0, i_b, i_hq, r0 + i0]), (BM,))
        b_delta = tl.reshape(rows.load([1, i_b, i_hq, r0 + i0]), (BM,))
        if not HALF:  # here, with the others: after the products it cost 1.9 KB of spills at D = 256 (compiled for sm_90, Triton 3.7)
            b_dlse = tl.reshape(rows.load([2, i_b, i_hq, r0 + i0]), (BM,))
        if STARTS:
            b_lse *= -(scale * LOG2E)
            b_delta = -b_delta
        # [BN, BD] @ [BD, BM] -> [BN, BM]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = probabilities(b_s, b_lse[None, :], scale, HALF)
        if (i_m < masked_before) | (i_m >= masked_from):
            b_p = hidden_to_zero(b_p, (start + i0 + tl.arange(0, BM))[None, :], o_j, FAR, window, sinks)
        # [BN, BM] @ [BM, BD] -> [BN, BD]
        b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision="ieee")
        # [BN, BD] @ [BD, BM] -> [BN, BM]
        if HALF:  # -delta as the sum's first term saves a subtraction an element and its registers
            b_dp = tl.dot(b_v, tl.trans(b_do), tl.broadcast_to(-b_delta[None, :], (BN, BM)), input_precision="ieee")
        else:  # see `row_terms`
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_delta[None, :] + b_dlse[None, :]
        # [BN, BM] @ [BM, BD] -> [BN, BD]
        b_dk += tl.dot((b_p * b_dp).to(b_q.dtype), b_q, input_precision="ieee")
    if FAR:
        tl.store(p_part, b_dk)
        tl.store(p_part + BN * BD, b_dv)
    else:
        if far_end > 0:
            for _ in tl.range(0, splits, num_stages=1):
                b_dk += tl.load(p_part)
                b_dv += tl.load(p_part + BN * BD)
                p_part += 2 * BN * BD
        store_tile(dk, b_dk * scale, i_b, j0, i_h, s_dkb, s_dkt, s_dkh, bos, Tk, BN, D, BD)
        store_tile(dv, b_dv, i_b, j0, i_h, s_dkb, s_dkt, s_dkh, bos, Tk, BN, D, BD)
