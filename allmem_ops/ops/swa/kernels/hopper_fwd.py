"""`swa` forward for sm_90 in Gluon: a producer warp and two warpgroups of 64 rows, tiles by TMA, asynchronous wgmma.

A program stays and takes work items; an item is 128 rows: 64 positions of two query heads that share a key/value head (HEADS = 2,
one band of 64 positions serves both), or 128 positions of one (HEADS = 1). The producer runs ahead, over the edge of an item too:
Q of the next item and rings of key and of value tiles, each slot with a barrier for "full" and one for "free". Items come in a fixed
stride. Of packed sequences the producer finds an item's sequence and hands both over.

A consumer issues the scores of tile n and the product P V of tile n - 1 together, and does the softmax of tile n while the tensor
cores work at P V. With PING the two warpgroups take turns at issuing, so that one's softmax falls into the other's products.
Measured on an H100 (D = 128, T = 32768, window 4096): 0.55 of the bf16 peak without this overlap, 0.61 with it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from allmem_ops.ops.kernels.gluon import exp2, tma_load, tma_store, view
from allmem_ops.ops.swa import geometry

stacked_tiles = gluon.jit(geometry.stacked_tiles)
stacked_start = gluon.jit(geometry.stacked_start)

# Rows of a warpgroup: what one wgmma computes.
ROWS = gl.constexpr(64)
# The running maximum before the first visible key: finite, so that no difference is inf - inf in a row without a visible key yet.
_LOWEST = gl.constexpr(-1e30)
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _find_sequence(cu_seqlens, sequences, i_m, T, SPAN: gl.constexpr):
    """The sequence that block `i_m` of a packed batch belongs to: (its first row, its length, the block's index in it).

    Sequence n owns the block indices from cu_seqlens[n] // SPAN + n on: enough for its rows, and increasing in n. Counted by a warp, four
    offsets a lane at a time: one latency of memory where a search has six.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    o_n = gl.arange(0, 128, LAYOUT)
    n, begin, stop = -1, 0, 0
    for first in range(0, sequences, 128):
        m_n = first + o_n < sequences
        b_begin = gl.load(cu_seqlens + first + o_n, mask=m_n, other=0).to(gl.int32)
        b_stop = gl.load(cu_seqlens + first + o_n + 1, mask=m_n, other=0).to(gl.int32)
        m_n = m_n & (b_begin // SPAN + first + o_n <= i_m)
        n += gl.sum(m_n.to(gl.int32), 0)
        begin = gl.maximum(begin, gl.max(gl.where(m_n, b_begin, 0), 0))
        stop = gl.maximum(stop, gl.max(gl.where(m_n, b_stop, 0), 0))
    block = i_m - (begin // SPAN + n)
    # Offsets that do not rise from 0 to T cannot be refused here without waiting for the device: they must not read or write outside.
    begin = gl.minimum(begin, T)
    stop = gl.minimum(gl.maximum(stop, begin), T)
    return begin, stop - begin, gl.maximum(block, 0)


@gluon.jit
def _item(i_w, work, HEADS: gl.constexpr, PACKED: gl.constexpr):
    """Work item `i_w`: (batch, pack of query heads, first row in the tensor, its row in the sequence, rows left, first position).

    None or fewer rows are left where a block index lies past its sequence's end. Heads are fastest, so that items which run together
    read the same keys; then blocks from the last one, which has the most keys. By the producer: a warp.
    """
    cu_seqlens, Tq, offset, _window, _sinks, _group, packs, blocks, sequences, _items = work
    SPAN: gl.constexpr = 2 * ROWS // HEADS
    i_h = i_w % packs
    i_m = blocks - 1 - i_w // packs % blocks
    i_b = i_w // packs // blocks
    begin = 0
    if PACKED:
        begin, Tq, i_m = _find_sequence(cu_seqlens, sequences, i_m, Tq, SPAN)
    row = i_m * SPAN
    return i_b, i_h, begin, row, Tq - row, offset + row


@gluon.jit
def _hand_over(s_item, i_h, begin, row, left):
    """What a consumer needs to know of a packed item, from the producer; each lane stores all of it."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    o_x = gl.arange(0, 4, LAYOUT)
    s_item.store(gl.where(o_x == 0, i_h, gl.where(o_x == 1, begin, gl.where(o_x == 2, row, left))).to(gl.int32))


@gluon.jit
def _take_over(s_item):
    """(pack of query heads, first row in the tensor, its row in the sequence, rows left); none are left when there is no further item."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    o_x = gl.arange(0, 4, LAYOUT)
    b_x = s_item.load(LAYOUT)
    i_h = gl.sum(gl.where(o_x == 0, b_x, 0), 0)
    begin = gl.sum(gl.where(o_x == 1, b_x, 0), 0)
    row = gl.sum(gl.where(o_x == 2, b_x, 0), 0)
    return i_h, begin, row, gl.sum(gl.where(o_x == 3, b_x, 0), 0)


@gluon.jit
def _fetch(x, i_b, row, i_h, full, slot, COUNT: gl.constexpr, D: gl.constexpr):
    tma_load(x, [i_b, row, i_h, 0], full, view(slot, x.dtype, [1, COUNT, 1, D], x.layout))


@gluon.jit
def _fetch_rows(x, i_b, row, i_h, ring, n, COUNT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Rows `row` to `row + COUNT` of x into slot n of a ring, as soon as it is free."""
    s_x, full, free = ring
    i_s = n % STAGES
    mbarrier.wait(free.index(i_s), ((n // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(i_s), COUNT * D * 2)
    _fetch(x, i_b, row, i_h, full.index(i_s), s_x.index(i_s), COUNT, D)


@gluon.jit
def _producer(
    tensors,
    queries,
    keys,
    values,
    work,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    HEADS: gl.constexpr,
    PACKED: gl.constexpr,
):
    q, k_diagonal, v_diagonal, k, v = tensors
    s_q, q_full, q_free, s_items = queries
    _cu, _Tq, _offset, window, sinks, group, _packs, _blocks, _sequences, items = work
    SPAN: gl.constexpr = 2 * ROWS // HEADS
    n = 0  # tiles so far
    c = 0  # items so far
    i_w = gl.program_id(0)
    while i_w < items:
        i_b, i_h, begin, row, left, i0 = _item(i_w, work, HEADS, PACKED)
        i_w += gl.num_programs(0)
        if left > 0:
            i_hk = i_h * HEADS // group
            band, sink_end, sink_full, _any_end, masked, full, count = stacked_tiles(i0, SPAN, window, sinks, BN)
            # Keys do not wait for the slot of the queries, which the output before last may still be leaving.
            j0 = begin + gl.maximum(stacked_start(0, i0, band, sink_end, sink_full, masked, full, BN), 0)
            _fetch_rows(k, i_b, j0, i_hk, keys, n, BN, D, STAGES)
            i_q = c % 2
            mbarrier.wait(q_free.index(i_q), ((c // 2) & 1) ^ 1)
            if PACKED:
                _hand_over(s_items.index(i_q), i_h, begin, row, left)
            mbarrier.expect(q_full.index(i_q), 2 * ROWS * D * 2)
            for w in gl.static_range(2):
                row_w = begin + row + w // HEADS * ROWS
                _fetch(q, i_b, row_w, i_h * HEADS + w % HEADS, q_full.index(i_q), s_q.index(i_q * 2 + w), ROWS, D)
            _fetch_rows(v, i_b, j0, i_hk, values, n, BN, D, V_STAGES)
            n += 1
            for t in range(1, count):
                j0 = begin + stacked_start(t, i0, band, sink_end, sink_full, masked, full, BN)
                _fetch_rows(k, i_b, j0, i_hk, keys, n, BN, D, STAGES)
                _fetch_rows(v, i_b, j0, i_hk, values, n, BN, D, V_STAGES)
                n += 1
            _fetch_rows(k_diagonal, i_b, begin + i0, i_hk, keys, n, SPAN, D, STAGES)
            _fetch_rows(v_diagonal, i_b, begin + i0, i_hk, values, n, SPAN, D, V_STAGES)
            n += 1
            c += 1
    if PACKED:  # no further item
        i_q = c % 2
        mbarrier.wait(q_free.index(i_q), ((c // 2) & 1) ^ 1)
        _hand_over(s_items.index(i_q), 0, 0, 0, 0)
        mbarrier.arrive(q_full.index(i_q), count=1)


@gluon.jit
def _scores(s_q, s_k, COUNT: gl.constexpr, layout: gl.constexpr):
    # [ROWS, D] @ [D, COUNT] -> [ROWS, COUNT]
    b_s = gl.zeros([ROWS, COUNT], gl.float32, layout)
    return warpgroup_mma(s_q, s_k.permute((1, 0)), b_s, use_acc=False, is_async=True)


@gluon.jit
def _softmax(b_s, b_m, b_l, scale_log2, POLY: gl.constexpr):
    """Unnormalised probabilities, the new maximum (of raw scores) and sum, and what earlier sums have to be scaled by."""
    b_top = gl.maximum(b_m, gl.max(b_s, 1))
    b_p = exp2(b_s * scale_log2 - (b_top * scale_log2)[:, None], POLY)
    b_c = gl.exp2((b_m - b_top) * scale_log2)
    return b_p, b_top, b_l * b_c + gl.sum(b_p, 1), b_c


@gluon.jit
def _mask_band(b_s, j0, i0, window, o_r, o_n):
    """Leave the keys of the window, in a tile without sinks: one comparison an element."""
    return gl.where(o_n[None, :] > (o_r + (i0 - window - j0))[:, None], b_s, float("-inf"))


@gluon.jit
def _mask_any(b_s, j0, end, i0, window, sinks, o_r, o_n):
    """Leave the keys of the window and the sinks, before `end`."""
    near = o_n[None, :] > (o_r + (i0 - window - j0))[:, None]
    o_j = o_n + j0
    return gl.where((near | (o_j < sinks)[None, :]) & (o_j < end)[None, :], b_s, float("-inf"))


@gluon.jit
def _take_turn(turns, n, W: gl.constexpr, PING: gl.constexpr):
    if PING:
        mbarrier.wait(turns.index(W), n & 1)


@gluon.jit
def _pass_turn(turns, W: gl.constexpr, PING: gl.constexpr):
    if PING:
        mbarrier.arrive(turns.index(1 - W), count=1)


@gluon.jit
def _issue(
    s_q,
    s_tile,
    keys,
    values,
    turns,
    n,
    b_p,
    b_c,
    b_o,
    COUNT: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
    STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    W: gl.constexpr,
    PING: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """Start the scores of tile n and, behind them, the product P V of tile n - 1; wait for the scores.

    Returns the scores, and what is to be waited for: the output and the packed probabilities that are being read.
    """
    s_k, k_full, k_free = keys
    s_v, v_full, _v_free = values
    i_s = n % STAGES
    i_p = (n + V_STAGES - 1) % V_STAGES
    # P comes unpacked: carried packed it costs a permutation a register, twice a tile.
    b_h = gl.convert_layout(b_p.to(s_k.dtype), P_LAYOUT, assert_trivial=True)
    if SPLIT:  # an opaque identity keeps the packing here, before the scores take as many registers again
        b_h = gl.inline_asm_elementwise("", "=r,0", [b_h], dtype=b_h.dtype, is_pure=False, pack=2)
    mbarrier.wait(k_full.index(i_s), (n // STAGES) & 1)
    _take_turn(turns, n, W, PING)
    b_s = _scores(s_q, s_tile, COUNT, S_LAYOUT)
    if SPLIT:
        # V has been here since the softmax of tile n - 1. The wait is a block boundary: without it ptxas scales the output before it
        # issues the scores (a window of 4096: 1.91 ms against 1.75). It costs registers.
        mbarrier.wait(v_full.index(i_p), ((n - 1) // V_STAGES) & 1)
    b_o = b_o * gl.convert_layout(b_c, gl.SliceLayout(1, P_LAYOUT.parent), assert_trivial=True)[:, None]
    # [ROWS, BN] @ [BN, D] -> [ROWS, D]
    b_o = warpgroup_mma(b_h, s_v.index(i_p), b_o, is_async=True)
    _pass_turn(turns, W, PING)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    mbarrier.arrive(k_free.index(i_s), count=1)
    return b_s, b_o, b_h


@gluon.jit
def _finish(b_o, b_h, b_p, values, n, V_STAGES: gl.constexpr):
    """Wait for the product P V of tile n - 1, not before the probabilities `b_p` of tile n."""
    _s_v, v_full, v_free = values
    # The wait is also a block boundary: without it ptxas hoists the one for P V above the exponentials.
    mbarrier.wait(v_full.index(n % V_STAGES), (n // V_STAGES) & 1)
    b_o, b_h, b_p = warpgroup_mma_wait(0, deps=(b_o, b_h, b_p))
    mbarrier.arrive(v_free.index((n + V_STAGES - 1) % V_STAGES), count=1)
    return b_o, b_p


@gluon.jit
def _step(
    s_q,
    keys,
    values,
    turns,
    n,
    b_p,
    b_c,
    b_o,
    b_m,
    b_l,
    scale_log2,
    j0,
    end,
    i0,
    window,
    sinks,
    o_r,
    o_n,
    MASK: gl.constexpr,
    BN: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
    STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    W: gl.constexpr,
    PING: gl.constexpr,
    SPLIT: gl.constexpr,
    POLY: gl.constexpr,
):
    """Tile n: its softmax, under the product P V of tile n - 1."""
    b_s, b_o, b_h = _issue(
        s_q, keys[0].index(n % STAGES), keys, values, turns, n, b_p, b_c, b_o, BN, S_LAYOUT, P_LAYOUT, STAGES, V_STAGES, W, PING, SPLIT
    )
    if MASK == "any":
        b_s = _mask_any(b_s, j0, end, i0, window, sinks, o_r, o_n)
    if MASK == "band":
        b_s = _mask_band(b_s, j0, i0, window, o_r, o_n)
    b_p, b_m, b_l, b_c = _softmax(b_s, b_m, b_l, scale_log2, POLY)
    b_o, b_p = _finish(b_o, b_h, b_p, values, n, V_STAGES)
    return b_p, b_c, b_o, b_m, b_l


@gluon.jit
def _clear_rows(values, n, first, stop, COUNT: gl.constexpr, D: gl.constexpr, V_STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """Zeros into rows `first` to `stop` of value tile n, which are another sequence's: their probabilities are 0, but 0 * NaN is not.

    Both warpgroups do it, each before its own product.
    """
    s_v, v_full, _v_free = values
    PART: gl.constexpr = 32
    mbarrier.wait(v_full.index(n % V_STAGES), (n // V_STAGES) & 1)
    s_tile = view(s_v.index(n % V_STAGES), s_v.dtype, [COUNT, D], s_v.layout)
    for r in gl.static_range(0, COUNT, PART):
        s_part = s_tile.slice(r, PART)
        if first < r + PART and stop > r:
            o_r = r + gl.arange(0, PART, gl.SliceLayout(1, LAYOUT))
            s_part.store(gl.where(((o_r >= first) & (o_r < stop))[:, None], 0.0, s_part.load(LAYOUT)).to(s_v.dtype))
    fence_async_shared()


@gluon.jit
def _attend(
    item,
    c,
    n,
    outputs,
    queries,
    keys,
    values,
    turns,
    work,
    scale_log2,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    HEADS: gl.constexpr,
    PACKED: gl.constexpr,
    PING: gl.constexpr,
    SPLIT: gl.constexpr,
    POLY: gl.constexpr,
    W: gl.constexpr,
):
    """Item c of this program: its tiles are n, n + 1, ... of the rings. Returns the number after its last."""
    o, p_o, p_lse = outputs
    s_q, q_full, q_free, s_items = queries
    s_k, k_full, k_free = keys
    s_v, _v_full, v_free = values
    _cu, Tq, _offset, window, sinks, _group, packs, _blocks, _sequences, _items = work
    i_b, i_h, begin, row, left, i0 = item
    dtype: gl.constexpr = s_q.dtype
    SPAN: gl.constexpr = 2 * ROWS // HEADS
    SHIFT: gl.constexpr = W // HEADS * ROWS  # of this warpgroup's rows in the item
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SPAN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    W_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_r = SHIFT + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    o_n = gl.arange(0, BN, gl.SliceLayout(0, S_LAYOUT))
    band, sink_end, sink_full, any_end, masked, full, count = stacked_tiles(i0, SPAN, window, sinks, BN)
    i_q = c % 2
    mbarrier.wait(q_full.index(i_q), (c // 2) & 1)
    b_q = s_q.index(i_q * 2 + W)

    # The first tile: no product to go with its scores.
    mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1)
    _take_turn(turns, n, W, PING)
    b_s = _scores(b_q, s_k.index(n % STAGES), BN, S_LAYOUT)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    _pass_turn(turns, W, PING)
    mbarrier.arrive(k_free.index(n % STAGES), count=1)
    j0 = stacked_start(0, i0, band, sink_end, sink_full, masked, full, BN)
    # A tile that would reach over the start begins there, and leaves the keys after its own to the next.
    end = gl.where(sink_end > sink_full * BN, sink_end, j0 + BN)
    over = j0 < 0
    j0 = gl.maximum(j0, 0)
    if (any_end > 0) | over:
        b_s = _mask_any(b_s, j0, end, i0, window, sinks, o_r, o_n)
    else:
        b_s = _mask_band(b_s, j0, i0, window, o_r, o_n)
    b_m = gl.full([ROWS], _LOWEST, gl.float32, gl.SliceLayout(1, S_LAYOUT))
    b_l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    b_o = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    b_p, b_m, b_l, b_c = _softmax(b_s, b_m, b_l, scale_log2, 0)
    if PACKED and row + left < j0 + BN:
        _clear_rows(values, n, row + left - j0, BN, BN, D, V_STAGES, W_LAYOUT)
    n += 1

    for t in range(1, any_end):
        j0 = stacked_start(t, i0, band, sink_end, sink_full, masked, full, BN)
        b_p, b_c, b_o, b_m, b_l = _step(
            b_q, keys, values, turns, n, b_p, b_c, b_o, b_m, b_l, scale_log2, j0, i0, i0, window, sinks, o_r, o_n,
            "any", BN, S_LAYOUT, P_LAYOUT, STAGES, V_STAGES, W, PING, SPLIT, 0,
        )  # fmt: skip
        n += 1
    for t in range(gl.maximum(any_end, 1), masked):
        j0 = stacked_start(t, i0, band, sink_end, sink_full, masked, full, BN)
        b_p, b_c, b_o, b_m, b_l = _step(
            b_q, keys, values, turns, n, b_p, b_c, b_o, b_m, b_l, scale_log2, j0, i0, i0, window, sinks, o_r, o_n,
            "band", BN, S_LAYOUT, P_LAYOUT, STAGES, V_STAGES, W, PING, SPLIT, 0,
        )  # fmt: skip
        n += 1
    # The output of the item before has left its Q slot by now: the slot is free.
    tma.store_wait(0)
    mbarrier.arrive(q_free.index((c + 1) % 2), count=1, pred=c > 0)
    for _ in range(gl.maximum(masked, 1), count):
        b_p, b_c, b_o, b_m, b_l = _step(
            b_q, keys, values, turns, n, b_p, b_c, b_o, b_m, b_l, scale_log2, 0, 0, i0, window, sinks, o_r, o_n,
            "none", BN, S_LAYOUT, P_LAYOUT, STAGES, V_STAGES, W, PING, SPLIT, POLY,
        )  # fmt: skip
        n += 1

    if PACKED:  # read again: there are no registers to keep it
        i_h, begin, row, left = _take_over(s_items.index(i_q))
    # The diagonal tile, SPAN wide, and its product.
    s_diagonal = view(s_k.index(n % STAGES), dtype, [SPAN, D], s_k.layout)
    b_s, b_o, b_h = _issue(
        b_q, s_diagonal, keys, values, turns, n, b_p, b_c, b_o, SPAN, D_LAYOUT, P_LAYOUT, STAGES, V_STAGES, W, PING, SPLIT
    )
    # The minimum is 0, which the compiler does not know: it must not compute this mask once and keep it in registers for ever.
    o_i = SHIFT + gl.minimum(c, 0) + gl.arange(0, ROWS, gl.SliceLayout(1, D_LAYOUT))
    o_j = gl.arange(0, SPAN, gl.SliceLayout(0, D_LAYOUT))
    near = (o_i - window)[:, None] < o_j[None, :]
    b_s = gl.where((o_i[:, None] >= o_j[None, :]) & (near | (o_j < sinks - i0)[None, :]), b_s, float("-inf"))
    b_m = gl.convert_layout(b_m, gl.SliceLayout(1, D_LAYOUT), assert_trivial=True)
    b_l = gl.convert_layout(b_l, gl.SliceLayout(1, D_LAYOUT), assert_trivial=True)
    b_d, b_m, b_l, b_c = _softmax(b_s, b_m, b_l, scale_log2, 0)
    b_o, b_d = _finish(b_o, b_h, b_d, values, n, V_STAGES)
    if PACKED and left < SPAN:
        _clear_rows(values, n, left, SPAN, SPAN, D, V_STAGES, W_LAYOUT)
    b_h = gl.convert_layout(b_d.to(dtype), P_LAYOUT, assert_trivial=True)
    b_o = b_o * gl.convert_layout(b_c, ROW_LAYOUT, assert_trivial=True)[:, None]
    # [ROWS, SPAN] @ [SPAN, D] -> [ROWS, D]
    b_o = warpgroup_mma(b_h, view(s_v.index(n % V_STAGES), dtype, [SPAN, D], s_v.layout), b_o, is_async=True)
    b_lse = b_m * (scale_log2 * _LN2) + gl.log(b_l)
    b_r = gl.convert_layout(1.0 / b_l, ROW_LAYOUT, assert_trivial=True)
    b_o, b_h = warpgroup_mma_wait(0, deps=(b_o, b_h))
    mbarrier.arrive(v_free.index(n % V_STAGES), count=1)
    n += 1

    b_h = (b_o * b_r[:, None]).to(dtype)
    i_hq = i_h * HEADS + W % HEADS
    heads = packs * HEADS
    o_out = (i_b.to(gl.int64) * Tq + begin + row + o_i) * heads + i_hq
    gl.store(p_lse + o_out, b_lse, mask=o_i < left)
    if PACKED and left < SPAN:
        # The end of a sequence, where a tile would overwrite the next one's rows.
        o_o = gl.convert_layout(o_out, ROW_LAYOUT, assert_trivial=True)
        m_o = gl.convert_layout(o_i < left, ROW_LAYOUT, assert_trivial=True)
        o_d = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
        gl.store(p_o + o_o[:, None] * D + o_d[None, :], b_h, mask=m_o[:, None])
    else:
        b_q.store(b_h)
        fence_async_shared()
        tma_store(o, [i_b, begin + row + SHIFT, i_hq, 0], view(b_q, dtype, [1, ROWS, 1, D], o.layout))
    return n


@gluon.jit
def _consumer(
    outputs,
    queries,
    keys,
    values,
    turns,
    work,
    scale_log2,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    HEADS: gl.constexpr,
    PACKED: gl.constexpr,
    PING: gl.constexpr,
    SPLIT: gl.constexpr,
    POLY: gl.constexpr,
    W: gl.constexpr,
):
    items = work[9]
    n = 0  # tiles so far
    c = 0  # items so far
    if PACKED:
        _s_q, q_full, _q_free, s_items = queries
        mbarrier.wait(q_full.index(0), 0)
        i_h, begin, row, left = _take_over(s_items.index(0))
        while left > 0:
            n = _attend(
                (i_h * 0, i_h, begin, row, left, row), c, n, outputs, queries, keys, values, turns, work, scale_log2,
                D, BN, STAGES, V_STAGES, HEADS, PACKED, PING, SPLIT, POLY, W,
            )  # fmt: skip
            c += 1
            mbarrier.wait(q_full.index(c % 2), (c // 2) & 1)
            i_h, begin, row, left = _take_over(s_items.index(c % 2))
    else:
        i_w = gl.program_id(0)
        while i_w < items:
            n = _attend(
                _item(i_w, work, HEADS, PACKED), c, n, outputs, queries, keys, values, turns, work, scale_log2,
                D, BN, STAGES, V_STAGES, HEADS, PACKED, PING, SPLIT, POLY, W,
            )  # fmt: skip
            c += 1
            i_w += gl.num_programs(0)
    tma.store_wait(0)


@gluon.jit
def _barriers(COUNT: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(COUNT):
        mbarrier.init(bars.index(s), count=arrivals)
    return bars


@gluon.jit(do_not_specialize=["Tq", "offset", "window", "sinks", "group", "packs", "blocks", "sequences", "items"])
def swa_fwd_hopper_kernel(
    q,
    k_diagonal,
    v_diagonal,
    k,
    v,
    o,
    p_o,
    p_lse,
    cu_seqlens,
    Tq,
    offset,
    window,
    sinks,
    group,
    packs,
    blocks,
    sequences,
    items,
    scale_log2,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    HEADS: gl.constexpr,
    PING: gl.constexpr,
    SPLIT: gl.constexpr,
    POLY: gl.constexpr,
):
    """q, k, v, o are descriptors of [B, T, H, D] in tiles of ROWS, SPAN = 128 / HEADS (the diagonal) and BN rows; `p_o` and `p_lse` are
    contiguous. `group` query heads share a key/value head, `packs` = HQ / HEADS, `offset` = Tk - Tq. SPLIT: see `_issue`. POLY:
    how many in eight exponentials of a tile without a mask are polynomials.
    """
    PACKED: gl.constexpr = cu_seqlens is not None
    dtype: gl.constexpr = q.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    s_q = gl.allocate_shared_memory(dtype, [4, ROWS, D], LAYOUT)  # two items of two warpgroups; outputs leave through it
    s_k = gl.allocate_shared_memory(dtype, [STAGES, BN, D], LAYOUT)
    s_v = gl.allocate_shared_memory(dtype, [V_STAGES, BN, D], LAYOUT)
    s_items = gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    queries = (s_q, _barriers(2, 1), _barriers(2, 2), s_items)
    keys = (s_k, _barriers(STAGES, 1), _barriers(STAGES, 2))
    values = (s_v, _barriers(V_STAGES, 1), _barriers(V_STAGES, 2))
    turns = _barriers(2, 1)
    fence_async_shared()
    if PING:  # the first turn is warpgroup 0's
        mbarrier.arrive(turns.index(0), count=1)
    tensors = (q, k_diagonal, v_diagonal, k, v)
    outputs = (o, p_o, p_lse)
    work = (cu_seqlens, Tq, offset, window, sinks, group, packs, blocks, sequences, items)
    gl.warp_specialize(
        [
            (
                _consumer,
                (outputs, queries, keys, values, turns, work, scale_log2, D, BN, STAGES, V_STAGES, HEADS, PACKED, PING, SPLIT, POLY, 0),
            ),
            (
                _consumer,
                (outputs, queries, keys, values, turns, work, scale_log2, D, BN, STAGES, V_STAGES, HEADS, PACKED, PING, SPLIT, POLY, 1),
            ),
            (_producer, (tensors, queries, keys, values, work, D, BN, STAGES, V_STAGES, HEADS, PACKED)),
        ],
        [4, 1],
        [240, 24],
    )
