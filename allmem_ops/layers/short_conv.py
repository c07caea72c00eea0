"""Depth-wise causal convolution over a few tokens, with the tail that lets a sequence go on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from allmem_ops._validation import check_dtype, check_shape
from allmem_ops.ops.state import RowState


@dataclass(eq=False)
class ConvTail(RowState):
    """The last K-1 inputs of each sequence.

    Args:
        inputs: [N, K-1, C] in the activations' dtype; zeros before the first token.
    """

    inputs: Tensor

    @classmethod
    def zeros(
        cls, batch: int, channels: int, conv_size: int, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> "ConvTail":
        """The tail of sequences that have not begun."""
        return cls(torch.zeros(batch, conv_size - 1, channels, dtype=dtype, device=device))

    def check(self) -> None:
        check_shape("inputs", self.inputs, "N K-1 C", {})

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Forget the given sequences, or all of them."""
        if rows is None:
            self.inputs.zero_()
        else:
            self.inputs.index_fill_(0, self.row_index("rows", rows), 0)


def short_conv(x: Tensor, weight: Tensor, tail: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Depth-wise causal convolution: y_t = sum_i weight[:, i] * x_{t-K+1+i} within each sequence.

    Args:
        x: [B, T, C]; B = 1 with `cu_seqlens`.
        weight: [C, K]; `weight[:, K-1]` multiplies the current token.
        tail: [N, K-1, C], the inputs that came before (N = B, or the number of packed sequences); None: zeros.
        cu_seqlens: [N+1] offsets of packed sequences, or None.

    Returns:
        y [B, T, C] in the wider dtype of `x` and `weight`, and the tail [N, K-1, C] after the last token in `x`'s dtype.

    Raises:
        ValueError: `weight` or `tail` of another shape or dtype than described.

    Example:
        >>> x, weight = torch.randn(1, 6, 2), torch.randn(2, 4)
        >>> whole, _ = short_conv(x, weight)
        >>> first, tail = short_conv(x[:, :2], weight)
        >>> second, _ = short_conv(x[:, 2:], weight, tail)
        >>> torch.allclose(torch.cat([first, second], 1), whole)
        True
    """
    known: dict[str, int] = {}
    check_shape("x", x, "B T C", known)
    check_shape("weight", weight, "C K", known)
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    back = weight.shape[1] - 1
    if tail is None:
        tail = x.new_zeros(batch, back, x.shape[2])
    else:
        check_shape("tail", tail, "N K-1 C", {"N": batch, "K-1": back, "C": x.shape[2]})
        check_dtype("tail", tail, x.dtype, "the dtype of `x`")
    if back == 0:
        return x * weight[:, 0], tail
    if cu_seqlens is None:
        padded = torch.cat([tail, x], 1)
        return _taps(padded, weight), padded[:, x.shape[1] :]
    # every sequence gets room for its tail in front, so that one dense convolution serves all of them
    offsets = cu_seqlens.long()
    token = torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(offsets[1:], token, right=True)
    row = token + (sequence + 1) * back
    slot = torch.arange(batch, device=x.device)[:, None] * back + torch.arange(back, device=x.device)
    source = torch.empty(x.shape[1] + batch * back, dtype=torch.long, device=x.device)
    source[row] = token + batch * back
    source[slot + offsets[:-1, None]] = slot
    padded = torch.cat([tail.flatten(0, 1), x[0]])[source][None]
    return _taps(padded, weight)[:, row - back], padded[0, slot + offsets[1:, None]]


def _taps(padded: Tensor, weight: Tensor) -> Tensor:
    """[B, T+K-1, C] -> [B, T, C]."""
    length = padded.shape[1] - weight.shape[1] + 1
    y = padded[:, :length] * weight[:, 0]
    for i in range(1, weight.shape[1]):
        y = y + padded[:, i : i + length] * weight[:, i]
    return y
