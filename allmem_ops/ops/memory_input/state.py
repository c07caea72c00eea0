"""What the convolution carries from call to call."""

from dataclasses import dataclass

import torch
from torch import Tensor

from allmem_ops._validation import check_shape
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
