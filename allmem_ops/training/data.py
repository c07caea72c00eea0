"""What one step reads."""

from typing import NamedTuple

import torch

from allmem_ops._validation import check_device, check_dtype, check_shape


class Batch(NamedTuple):
    """Rows of one step: `ids` int64 [B, T]; `mask` bool [B, T], the positions whose prediction counts, None: all."""

    ids: torch.Tensor
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, value: "Batch | torch.Tensor") -> "Batch":
        """Plain ids, or ids and mask, checked."""
        batch = cls(value) if isinstance(value, torch.Tensor) else cls(*value)
        known: dict[str, int] = {}
        check_shape("batches", batch.ids, "B T", known)
        if batch.mask is not None:
            check_shape("mask", batch.mask, "B T", known)
            check_dtype("mask", batch.mask, torch.bool)
            check_device("mask", batch.mask, batch.ids.device, of="ids")
        return batch

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`. From pinned memory to a GPU: a copy from pageable memory waits for what the GPU is at."""
        pinned = torch.device(device).type == "cuda" and not self.ids.is_cuda
        return Batch(*(None if x is None else (x.pin_memory() if pinned else x).to(device, non_blocking=True) for x in self))


def response_mask(prompt_lengths: torch.Tensor, lengths: torch.Tensor, T: int) -> torch.Tensor:
    """The positions that predict a token of the response, bool [B, T]: the prompt's last token to the response's last but one.

    Args:
        prompt_lengths: int64 [B].
        lengths: int64 [B], prompt and response together.
        T: length of the rows.

    Example:
        >>> response_mask(torch.tensor([2]), torch.tensor([5]), 6).int().tolist()
        [[0, 1, 1, 1, 0, 0]]
    """
    position = torch.arange(T, device=lengths.device)
    return (position >= prompt_lengths[:, None] - 1) & (position < lengths[:, None] - 1)
