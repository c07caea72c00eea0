"""The host side of the KL kernel."""

import torch
from torch import Tensor

from allmem_ops.training.kernels.kl import kl_rows_kernel

# 64 registers a thread: four programs a multiprocessor, 64 kB of loads in flight.
BLOCK, WARPS = 2048, 8


def kl_rows(student: Tensor, teacher: Tensor, mask: Tensor, dtype: torch.dtype, grad: bool) -> tuple[Tensor, Tensor]:
    """KL [N] and p_student - p_teacher [N, V] in `dtype` of fp32 logits [N, V]; zeros where `mask` [N] is False.

    Without `grad` the second has no rows.
    """
    tokens, vocab = student.shape
    kl = student.new_empty(tokens)
    difference = student.new_empty(student.shape if grad else (0, 1), dtype=dtype)
    strides = student.stride(0), teacher.stride(0), difference.stride(0)
    block = min(BLOCK, max(16, 1 << (vocab - 1).bit_length()))
    kl_rows_kernel[(tokens,)](student, teacher, mask, kl, difference, vocab, *strides, BV=block, GRAD=grad, num_warps=WARPS)
    return kl, difference
