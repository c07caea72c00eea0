import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allmem_ops.ops.swa.geometry import key_tiles, query_blocks, query_tiles, visible_pairs


def dense(Tq, Tk, window, sinks):
    i, j = torch.arange(Tk - Tq, Tk)[:, None], torch.arange(Tk)
    return (j <= i) & ((i - j < window) | (j < sinks))


lengths = st.integers(0, 40).flatmap(lambda Tk: st.tuples(st.integers(0, Tk), st.just(Tk)))


@given(lengths, st.integers(1, 50), st.integers(0, 50))
@example((1, 1), 1, 0)
@example((7, 40), 1, 40)
@example((0, 9), 3, 2)
def test_closed_form_counts_the_dense_mask(T, window, sinks):
    assert visible_pairs(*T, window, sinks) == int(dense(*T, window, sinks).sum())


@given(lengths, st.integers(1, 50), st.integers(0, 50), st.integers(1, 17))
def test_blocks_hold_every_visible_pair_once(T, window, sinks, size):
    Tq, Tk = T
    count = torch.zeros(Tq, Tk, dtype=torch.int64)
    for i0, i1, b0, s1 in query_blocks(Tq, Tk, window, sinks, size):
        i = torch.arange(i0, i1)[:, None]
        near, far = torch.arange(b0, i1), torch.arange(s1)
        rows = slice(i0 - (Tk - Tq), i1 - (Tk - Tq))
        count[rows, b0:i1] += (near <= i) & (i - near < window)
        count[rows, :s1] += i - far >= window
    assert torch.equal(count, dense(Tq, Tk, window, sinks).long())


def test_a_block_reads_no_more_than_band_and_sinks():
    for i0, i1, b0, s1 in query_blocks(1000, 1000, 100, 7, 64):
        assert i1 - b0 <= 64 + 99
        assert s1 <= 7
        assert i1 - i0 <= 64


def pairs(Tq, Tk, window, sinks):
    """The dense masks of window pairs and of far sink pairs, and their positions."""
    i, j = torch.arange(Tk - Tq, Tk)[:, None], torch.arange(Tk)
    return (j <= i) & (i - j < window), (j < sinks) & (i - j >= window), i, j


some_queries = st.integers(1, 60).flatmap(lambda Tk: st.tuples(st.integers(1, Tk), st.just(Tk)))
tile_sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=100)
@given(some_queries, st.integers(1, 70), st.integers(0, 70), tile_sizes)
@example((60, 60), 16, 16, (8, 8))
@example((7, 60), 1, 60, (4, 3))
@example((60, 60), 17, 0, (4, 16))
def test_query_tiles_hold_every_visible_pair_once(T, window, sinks, sizes):
    (Tq, Tk), (BM, BN) = T, sizes
    start = Tk - Tq
    near, far, i, j = pairs(Tq, Tk, window, sinks)
    near_count, far_count = torch.zeros_like(near, dtype=torch.int64), torch.zeros_like(far, dtype=torch.int64)
    for r0 in range(0, Tq, BM):
        i0, i1 = start + r0, min(start + r0 + BM, Tk)
        rows = slice(r0, i1 - start)
        sink_full, sink_end, left, full, diag, end = query_tiles(i0, i1, window, sinks, BN)
        assert 0 <= sink_full <= sink_end and 0 <= left <= full <= diag <= end
        for n in range(sink_end):
            keys = slice(n * BN, (n + 1) * BN)
            assert far[rows, keys].any()
            if n < sink_full:
                assert far[rows, keys].all() and (n + 1) * BN <= Tk
            far_count[rows, keys] += far[rows, keys]
        for n in range(left, end):
            keys = slice(n * BN, (n + 1) * BN)
            assert near[rows, keys].any()
            if full <= n < diag:
                assert near[rows, keys].all() and (n + 1) * BN <= Tk
            elif full < diag:
                assert ((j <= i) if n < full else (i - j < window))[rows, keys].all()
            near_count[rows, keys] += near[rows, keys]
    assert torch.equal(near_count, near.long())
    assert torch.equal(far_count, far.long())


@settings(max_examples=100)
@given(some_queries, st.integers(1, 70), st.integers(0, 70), tile_sizes)
@example((60, 60), 16, 16, (8, 8))
@example((7, 60), 1, 60, (4, 3))
@example((1, 60), 60, 5, (4, 16))
def test_key_tiles_hold_every_visible_pair_once(T, window, sinks, sizes):
    (Tq, Tk), (BM, BN) = T, sizes
    start = Tk - Tq
    near, far, i, j = pairs(Tq, Tk, window, sinks)
    near_count, far_count = torch.zeros_like(near, dtype=torch.int64), torch.zeros_like(far, dtype=torch.int64)
    for j0 in range(0, Tk, BN):
        j1 = min(j0 + BN, Tk)
        keys = slice(j0, j1)
        diag, full, right, end, first, far_full, far_end = key_tiles(j0, j1, start, Tk, window, sinks, BM)
        assert 0 <= diag <= full <= right <= end and 0 <= first <= far_full <= far_end
        assert far_end == (-(-Tq // BM) if far[:, keys].any() else 0)
        for m in range(diag, end):
            rows = slice(m * BM, (m + 1) * BM)
            assert near[rows, keys].any()
            if full <= m < right:
                assert near[rows, keys].all()
            elif full < right:
                assert ((i - j < window) if m < full else (j <= i))[rows, keys].all()
            near_count[rows, keys] += near[rows, keys]
        for m in range(first, far_end):
            rows = slice(m * BM, (m + 1) * BM)
            assert far[rows, keys].any()
            assert m < far_full or far[rows, keys].all()
            far_count[rows, keys] += far[rows, keys]
    assert torch.equal(near_count, near.long())
    assert torch.equal(far_count, far.long())


def test_a_window_of_whole_tiles_costs_no_more_than_its_pairs_and_the_diagonal():
    """Aligned blocks: BM / BN masked tiles at each end of the window, the rest without a mask."""
    assert query_tiles(4096, 4224, 512, 128, 64) == (2, 2, 56, 58, 64, 66)
    assert key_tiles(4096, 4160, 0, 32768, 512, 128, 128) == (32, 33, 36, 37, 0, 0, 0)
    assert key_tiles(0, 128, 0, 32768, 512, 128, 128) == (0, 1, 4, 5, 4, 5, 256)
