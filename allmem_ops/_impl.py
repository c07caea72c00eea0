"""The choice of an implementation: `reference`, `chunk`, `triton` or `auto`, never a silent fallback."""

import torch

from allmem_ops._config import settings
from allmem_ops._validation import check_choice, fail, short

IMPLS = ("reference", "chunk", "triton", "auto")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The operators that have Triton kernels.
KERNELS = frozenset({"gated_fusion", "memory_input", "rotary", "swa", "swa_step", "ttt_mlp", "ttt_mlp_step"})


def resolve_impl(op: str, impl: str, x: torch.Tensor) -> str:
    """The implementation that `impl` names for operator `op` on the device and dtype of `x`: `"reference"`, `"chunk"` or `"triton"`.

    `"auto"` is `"triton"` for CUDA tensors of a dtype that the kernels take, where the operator has kernels; else `"chunk"`.

    Raises:
        ValueError: an unknown name, or `"triton"` where no kernel can run.
    """
    check_choice("impl", impl, IMPLS)
    if impl == "auto":
        return "triton" if op in KERNELS and x.is_cuda and x.dtype in KERNEL_DTYPES else "chunk"
    if impl == "triton":
        if op not in KERNELS:
            raise ValueError(f"`impl`='triton': no Triton kernel exists yet for `{op}`; use 'auto', 'chunk' or 'reference'")
        if x.dtype not in KERNEL_DTYPES:
            fail("impl", f"'triton' needs one of {', '.join(map(short, KERNEL_DTYPES))}", short(x.dtype), "Use 'chunk' or 'reference'")
        if not x.is_cuda and not settings().interpret:
            fail("impl", "'triton' needs CUDA tensors (or TRITON_INTERPRET=1 for Triton's interpreter)", f"a tensor on {x.device}")
    return impl
