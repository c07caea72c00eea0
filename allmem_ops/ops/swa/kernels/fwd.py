"""`swa` forward: one program a block of queries and one or more query heads that share a key/value head.

Online softmax in base 2: with c = scale * log2(e), p = exp2(s * c - m), m the running maximum of s * c, so that the scale costs
no operation of its own. For float32 operands m is that of s * scale, and the difference comes before log2(e): rounded to base 2 and
back, a maximum of 20 would be wrong by two units in the last place, in the log-sum-exp and in every probability made from it.

One loop runs over all key tiles of the block, sinks first and then the band (`geometry.query_tiles`); only the tiles at the edges
apply a mask. One loop instead of one a kind, because each loop fills and drains its own pipeline of loads: at window 512 a block has
ten tiles.
"""

import triton
import triton.language as tl

from allmem_ops.ops.swa.kernels.tiles import query_tiles

# The running maximum before the first visible key: below every score, but finite, so that no difference is inf - inf.
_LOWEST = tl.constexpr(-3e38)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _find_sequence(cu_seqlens, sequences, i_m, T, BT: tl.constexpr):
    """The sequence that block `i_m` of a packed batch belongs to: (its first row, its length, the block's index in it).

    Sequence n owns the block indices from cu_seqlens[n] // BT + n on, enough for its rows and increasing in n, so that T // BT + N
    blocks cover every batch of N sequences, and no table has to be made first.
    """
    n = 0
    o_n = tl.arange(0, 256)
    for first in range(0, sequences, 256):
        b_c = tl.load(cu_seqlens + first + o_n, mask=first + o_n < sequences, other=0)
        n += tl.sum(tl.cast((first + o_n < sequences) & (tl.cast(b_c, tl.int32) // BT + first + o_n <= i_m), tl.int32))
    n = tl.maximum(n - 1, 0)
    begin = tl.cast(tl.load(cu_seqlens + n), tl.int32)
    stop = tl.cast(tl.load(cu_seqlens + n + 1), tl.int32)
    block = i_m - (begin // BT + n)
    # Offsets that do not rise from 0 to T cannot be refused here without waiting for the device: they must not read or write outside.
    begin = tl.minimum(tl.maximum(begin, 0), T)
    stop = tl.minimum(tl.maximum(stop, begin), T)
    return begin, stop - begin, tl.maximum(block, 0)


@triton.jit
def _load_tile(x, i_b, i_h, row, first, end, stride_t, stride_d, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """[BN, BD]: rows `first` to `first + BN` of the sequence at `row`; zeros past its `end` (TMA: past the tensor's) and past D."""
    if TMA:
        b_x = x.load([i_b, i_h, row + first, 0]).reshape([BN, BD])
    else:
        o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
        p_x = x + tl.cast(row + first, tl.int64) * stride_t + o_n[:, None] * stride_t + o_d[None, :] * stride_d
        m_x = (first + o_n < end)[:, None]
        if D != BD:
            m_x = m_x & (o_d < D)[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0)
    return b_x


@triton.jit
def _power(x, HALF: tl.constexpr):
    """exp of what the maximum is kept in: base 2, or natural."""
    return tl.exp2(x) if HALF else tl.exp2(x * _LOG2E)


@triton.jit
def _attend(
    b_q,
    b_o,
    b_l,
    b_m,
    k,
    v,
    i_b,
    i_h,
    row,
    Tk,
    stride_kt,
    stride_kd,
    stride_vt,
    stride_vd,
    o_i,
    window,
    sinks,
    sink_full,
    sink_end,
    left,
    full,
    diag,
    end,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    HALF: tl.constexpr,
):
    """Add the sink tiles `[0, sink_end)` and the band tiles `[left, end)` to the running output, sum and maximum."""
    o_n = tl.arange(0, BN)
    for n in range(sink_end + end - left):
        is_sink = n < sink_end
        tile = tl.where(is_sink, n, n - sink_end + left)
        b_k = _load_tile(k, i_b, i_h, row, tile * BN, Tk, stride_kt, stride_kd, D, BN, BD, TMA)
        b_v = _load_tile(v, i_b, i_h, row, tile * BN, Tk, stride_vt, stride_vd, D, BN, BD, TMA)
        # [BM, BD] @ [BD, BN] -> [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        masked = (n >= sink_full) if is_sink else ((tile < full) | (tile >= diag))
        if not HALF:
            # Rounded before the maximum is taken away, as the maximum was: fused with that subtraction (a compiler does it unless
            # the branch stands between the two), the product of a single key would leave its rounding error behind.
            b_s *= scale
        if masked:
            low = tl.where(is_sink, 0, o_i - window + 1)
            high = tl.where(is_sink, tl.minimum(sinks - 1, o_i - window), o_i)
            o_j = tile * BN + o_n
            b_s = tl.where((o_j[None, :] >= low[:, None]) & (o_j[None, :] <= high[:, None]), b_s, float("-inf"))
        if HALF:
            b_top = tl.maximum(b_m, tl.max(b_s, 1) * scale)
            b_p = tl.exp2(b_s * scale - b_top[:, None])
        else:
            b_top = tl.maximum(b_m, tl.max(b_s, 1))
            b_p = _power(b_s - b_top[:, None], HALF)
        b_c = _power(b_m - b_top, HALF)
        b_l = b_l * b_c + tl.sum(b_p, 1)
        # [BM, BN] @ [BN, BD] -> [BM, BD]
        b_o = tl.dot(tl.cast(b_p, b_v.dtype), b_v, b_o * b_c[:, None], input_precision="ieee")
        b_m = b_top
    return b_o, b_l, b_m


@triton.jit(do_not_specialize=["Tq", "Tk", "HQ", "G", "blocks", "sequences", "window", "sinks"])
def swa_fwd_kernel(
    q,
    q_sinks,
    k,
    v,
    o,
    lse,
    cu_seqlens,
    stride_qb: tl.int64,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    stride_qd,
    stride_fb: tl.int64,
    stride_ft: tl.int64,
    stride_fh: tl.int64,
    stride_fd,
    stride_kb: tl.int64,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    stride_kd,
    stride_vb: tl.int64,
    stride_vt: tl.int64,
    stride_vh: tl.int64,
    stride_vd,
    Tq,
    Tk,
    HQ,
    G,
    blocks,
    sequences,
    window,
    sinks,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid: query heads of a group / BG, fastest, so that programs which read the same keys run together; then query blocks, the
    last one first (the first ones have fewer keys); then key/value heads and batch.

    `k` and `v` are tensor descriptors [B, HK, Tk, D] with `TMA`, else pointers. `BG` query heads share a program: BM rows are
    BG heads times BM // BG positions, which narrows the band that a program reads by as much. `o` and `lse` are contiguous.
    """
    BT: tl.constexpr = BM // BG
    HALF: tl.constexpr = q.dtype.element_ty != tl.float32
    if HALF:
        scale *= _LOG2E
    pid = tl.program_id(0)
    packs = G // BG
    i_g = pid % packs * BG
    pid = pid // packs
    i_m = blocks - 1 - pid % blocks
    pid = pid // blocks
    i_h = pid % (HQ // G)
    i_b = pid // (HQ // G)

    T = Tq
    row_q = 0
    row_k = 0
    if cu_seqlens is not None:
        row_q, Tq, i_m = _find_sequence(cu_seqlens, sequences, i_m, T, BT)
        row_k = row_q
        Tk = Tq
        if i_m * BT >= Tq:
            return

    o_r, o_d = tl.arange(0, BM), tl.arange(0, BD)
    o_t = i_m * BT + o_r % BT
    o_h = i_h * G + i_g + o_r // BT
    start = Tk - Tq
    o_i = start + o_t
    i0 = start + i_m * BT
    i1 = tl.minimum(i0 + BT, Tk)
    sink_full, sink_end, left, full, diag, end = query_tiles(i0, i1, window, sinks, BN)

    i_b64 = tl.cast(i_b, tl.int64)
    o_row = tl.cast(row_q + o_t, tl.int64)
    m_t = o_t < Tq
    m_q = m_t[:, None] & (o_d < D)[None, :]
    if not TMA:
        k += i_b64 * stride_kb + i_h * stride_kh
        v += i_b64 * stride_vb + i_h * stride_vh

    b_o = tl.zeros([BM, BD], tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], _LOWEST, tl.float32)
    if q_sinks is not None:
        p_f = q_sinks + i_b64 * stride_fb + o_row[:, None] * stride_ft + o_h[:, None] * stride_fh + o_d[None, :] * stride_fd
        if sink_end > 0:
            b_f = tl.load(p_f, mask=m_q, other=0.0)
            b_o, b_l, b_m = _attend(
                b_f, b_o, b_l, b_m, k, v, i_b, i_h, row_k, Tk, stride_kt, stride_kd, stride_vt, stride_vd, o_i, window, sinks,
                sink_full, sink_end, 0, 0, 0, 0, scale, D, BD, BN, TMA, HALF,
            )  # fmt: skip
        sink_full = 0
        sink_end = 0
    # Loaded after the far sinks are done: at head dim 256 shared memory does not hold both query tiles.
    p_q = q + i_b64 * stride_qb + o_row[:, None] * stride_qt + o_h[:, None] * stride_qh + o_d[None, :] * stride_qd
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    b_o, b_l, b_m = _attend(
        b_q, b_o, b_l, b_m, k, v, i_b, i_h, row_k, Tk, stride_kt, stride_kd, stride_vt, stride_vd, o_i, window, sinks,
        sink_full, sink_end, left, full, diag, end, scale, D, BD, BN, TMA, HALF,
    )  # fmt: skip

    b_l = tl.where(m_t, b_l, 1.0)  # rows past the last query have no keys
    b_o = b_o / b_l[:, None]
    o_out = (i_b64 * T + o_row) * HQ + o_h
    tl.store(o + o_out[:, None] * D + o_d[None, :], tl.cast(b_o, o.dtype.element_ty), mask=m_q)
    b_lse = (b_m + tl.log2(b_l)) * _LN2 if HALF else b_m + tl.log(b_l)
    tl.store(lse + o_out, b_lse, mask=m_t)
