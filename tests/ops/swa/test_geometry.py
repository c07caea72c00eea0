import torch
from hypothesis import example, given
from hypothesis import strategies as st

from allmem_ops.ops.swa.geometry import query_blocks, visible_pairs


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
