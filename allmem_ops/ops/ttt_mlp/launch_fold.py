"""Launch of the kernel that folds the tails of a state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from allmem_ops.ops.kernels.launcher import launch_plain
from allmem_ops.ops.ttt_mlp.kernels.fold import ttt_mlp_fold_kernel
from allmem_ops.ops.ttt_mlp.launch import NORM, power_of_two
from allmem_ops.ops.ttt_mlp.tail import TAIL_TOKENS, Tail


def ttt_mlp_fold(w: Sequence[Tensor], n: Sequence[Tensor], g: Sequence[Tensor], tail: Tail, norm: str, eps: float) -> tuple[Tensor, ...]:
    """G of gate, up and down [N, H, ...] with the tails' gradients; w, n, g: weights, norms and G of the state."""
    N, H, h, d = w[0].shape
    out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in g)
    if N * H == 0:
        return out
    HS, BT = (32, 64) if tail.k.dtype == torch.bfloat16 else (16, 16)
    tensors = [x.contiguous() for x in (*w, *n, *g, *tail)]
    args = [*tensors, *out, H, eps, d, h, max(power_of_two(d), 16), HS, BT, TAIL_TOKENS, NORM[norm], "ieee"]
    launch_plain(ttt_mlp_fold_kernel, w[0].device, N * H * -(-h // HS), args, {"num_warps": 4, "num_stages": 1})
    return out
