"""The precision rule of every PyTorch path: operands keep their dtype, sums are fp32 (float64 for float64).

`float32` never means tf32, nor what autocast would make of it: operator bodies run inside `ieee_float32()`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for operands [..., M, K] and [..., K, N] of one dtype and equal leading dims, the sum in `accumulator_dtype`.

    On CUDA half-precision operands go to the tensor cores as they are and the fp32 accumulator is
    returned unrounded; on a CPU they are widened first (products of two halves are exact in fp32).
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    out = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32) if a.dim() > 2 else torch.mm(a, b, out_dtype=torch.float32)
    return out.unflatten(0, a.shape[:-2]) if a.dim() > 2 else out


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Inside, float32 matrix products are IEEE float32, whatever the process has set: no tf32 on CUDA, no autocast.

    (Autocast passes through an operator of torch.library and would act inside its body: measured, a float32 `swa` came out
    with bf16's error.) Traced by torch.compile it does nothing, because the settings cannot be traced: operator bodies are
    not traced, a reference is.
    """
    if torch.compiler.is_compiling():
        yield
        return
    flags = torch.backends.cuda.matmul
    before = flags.fp32_precision
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if before != "ieee":
            flags.fp32_precision = "ieee"
            stack.callback(setattr, flags, "fp32_precision", before)
        yield
