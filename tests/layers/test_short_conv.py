"""The short convolution equals `conv1d` with zeros in front, however a sequence is cut or packed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from allmem_ops.layers.short_conv import ConvTail, short_conv


def dense(x, weight):
    """torch's own grouped convolution, in float64."""
    taps = weight.shape[1]
    if x.shape[1] == 0:
        return x
    return F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight[:, None], groups=x.shape[2]).transpose(1, 2)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))
def test_equals_conv1d(taps, length, batch):
    x, weight = torch.randn(batch, length, 5, dtype=torch.float64), torch.randn(5, taps, dtype=torch.float64)
    y, tail = short_conv(x, weight)
    torch.testing.assert_close(y, dense(x, weight))
    padded = F.pad(x, (0, 0, taps - 1, 0))
    assert torch.equal(tail, padded[:, length:])


@given(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_split_equals_whole(taps, lengths):
    x, weight = torch.randn(2, sum(lengths), 3, dtype=torch.float64), torch.randn(3, taps, dtype=torch.float64)
    tail, parts = None, []
    for part in x.split(lengths, 1):
        y, tail = short_conv(part, weight, tail)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), dense(x, weight))


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4))
def test_packed_with_tails_equals_separate(taps, lengths):
    """Two calls, each packing the next piece of every sequence."""
    weight = torch.randn(3, taps, dtype=torch.float64)
    sequences = [torch.randn(1, a + b, 3, dtype=torch.float64) for a, b in lengths]
    tail, got = None, [[] for _ in sequences]
    for call in range(2):
        pieces = [s[:, :a] if call == 0 else s[:, a:] for s, (a, _) in zip(sequences, lengths, strict=True)]
        sizes = [p.shape[1] for p in pieces]
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        y, tail = short_conv(torch.cat(pieces, 1), weight, tail, offsets)
        for mine, part in zip(got, y.split(sizes, 1), strict=True):
            mine.append(part)
    for mine, sequence in zip(got, sequences, strict=True):
        torch.testing.assert_close(torch.cat(mine, 1), dense(sequence, weight))
    for n, sequence in enumerate(sequences):
        assert torch.equal(tail[n], F.pad(sequence, (0, 0, taps - 1, 0))[0, sequence.shape[1] :])


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed):
    x = torch.randn(1, 7, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    tail = torch.randn(2 if packed else 1, 3, 2, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 3, 7]) if packed else None
    assert torch.autograd.gradcheck(lambda *a: short_conv(*a, offsets), (x, weight, tail))


def test_half_precision_sums_in_the_weights_dtype():
    x, weight = torch.randn(1, 9, 4, dtype=torch.bfloat16), torch.randn(4, 4)
    y, tail = short_conv(x, weight)
    assert (y.dtype, tail.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(y.double(), dense(x.double(), weight.double()), atol=1e-6, rtol=1e-6)


def test_errors_name_the_argument():
    x, weight = torch.randn(1, 5, 3), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"`weight` must have shape \[C, K\] with C=3; got \[4, 4\]"):
        short_conv(x, torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"`tail` must have shape \[N, K-1, C\] with N=1; got \[2, 3, 3\]"):
        short_conv(x, weight, torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="`tail` must have dtype float32"):
        short_conv(x, weight, torch.zeros(1, 3, 3, dtype=torch.float64))


def test_tail_state_resets_rows():
    tail = ConvTail.zeros(3, 2, 4, dtype=torch.float32)
    tail.inputs.fill_(1)
    tail.reset([1])
    assert tail.inputs.sum((1, 2)).tolist() == [6, 0, 6]
    tail.reset()
    assert tail.inputs.abs().sum() == 0
    assert tail.nbytes == 3 * 3 * 2 * 4
