"""Launch of the decode kernels: two for one token, two for more, one to fold a tail."""

from collections.abc import Sequence

import torch
from torch import Tensor

from allmem_ops._validation import fail, short
from allmem_ops.ops.kernels.configs import Config, Table, candidates
from allmem_ops.ops.kernels.device import gpu_class, sm_count
from allmem_ops.ops.kernels.launcher import launch_plain
from allmem_ops.ops.ttt_mlp.kernels.common import NONE, POST_WRITE, PRE_WRITE
from allmem_ops.ops.ttt_mlp.kernels.step import (
    ttt_mlp_step_count_kernel,
    ttt_mlp_step_fold_kernel,
    ttt_mlp_step_segments_kernel,
    ttt_mlp_step_tail_kernel,
    ttt_mlp_step_token_kernel,
)
from allmem_ops.ops.ttt_mlp.reference import Options

_NORM = {"none": NONE.value, "pre_write": PRE_WRITE.value, "post_write": POST_WRITE.value}
_NAMES = [f"{kind}_{matrix}" for kind in "wmg" for matrix in ("gate", "up", "down")]
_NAMES += ["mu_sum", "count", "position", "tail_k", "tail_v", "tail_eta", "tail"]

# (padded d, dtype of q): HS hidden units and BT tokens at a time when the tail is folded. These kernels spill easily: every
# entry compiles for sm_90 with at most 96 bytes of it, and the products of fp32 operands (also float16's with a rate) need the
# small tiles for that.
_FOLD: Table = {
    ("sm80", (padded, dtype)): [Config({"HS": 16, "BT": 16}, 8, 1)] for padded in (16, 32, 64, 128) for dtype in ("float16", "float32")
}
_SEGMENTS: Table = dict(_FOLD)
for _padded_d in (16, 32, 64):
    _FOLD["sm80", (_padded_d, "bfloat16")] = [Config({"HS": 16, "BT": 64}, 8, 1)]
    _SEGMENTS["sm80", (_padded_d, "bfloat16")] = [Config({"HS": 16, "BT": 32}, 4, 1)]
_FOLD["sm80", (128, "bfloat16")] = _SEGMENTS["sm80", (128, "bfloat16")] = [Config({"HS": 32, "BT": 16}, 8, 1)]


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def ttt_mlp_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    state: Sequence[Tensor],
    norms: Sequence[Tensor],
    active: Tensor | None,
    options: Options,
) -> Tensor:
    """o; `state` (see the operator) is changed in place."""
    for name, x in zip((*_NAMES, "n_gate", "n_up", "n_down"), (*state[:16], *norms), strict=True):
        if not x.is_contiguous():
            fail(f"state.{name}", "must be contiguous", f"strides {list(x.stride())}")
    N, T, H, d = q.shape
    h = norms[0].shape[-1]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if N * H == 0:
        return o
    *matrices, mu_sum, count, position, tail_k, tail_v, tail_eta, tail = state[:16]
    rounded = state[16:] or matrices[:3]
    tails = tail_k, tail_v, tail_eta
    seen = torch.empty(N, 2, dtype=torch.int32, device=q.device)
    chunk_size, norm, residual, grad_clip, eps = options
    stride_a = 0 if active is None else active.stride(0)
    BD, device = _padded(d), q.device
    sizes = [d, h, BD]
    if T == 1:
        pdl = gpu_class(device) != "sm80"
        launch = {"launch_pdl": True} if pdl else {}
        strides = [s for x in (q, k, v, eta, mu) for s in (x.stride(0), *x.stride()[2:])]
        args = [q, k, v, eta, mu, *rounded, mu_sum, *tails, count, tail, active, seen, o, H, *strides, stride_a]
        args += [*sizes, min(_padded(h), 8192 // BD), residual, pdl]
        launch_plain(ttt_mlp_step_token_kernel, device, N * H, args, {"num_warps": 8, **launch})
        fold_due(state, norms, seen, short(q.dtype), options)
    else:
        config = candidates(_SEGMENTS, gpu_class(device), (BD, short(q.dtype)))[0]
        fold = [*sizes, config.constants["HS"], config.constants["BT"], _NORM[norm]]
        strides = [s for x in (q, k, v, eta, mu) for s in x.stride()]
        args = [q, k, v, eta, mu, *matrices[:3], *rounded, *matrices[3:], *norms, mu_sum, *tails, count, tail, active, seen, o, H, T]
        args += [chunk_size, grad_clip, eps, *strides, stride_a, *fold, residual, "ieee"]
        launch_plain(ttt_mlp_step_segments_kernel, device, N * H, args, config.launch_options())
        launch_plain(ttt_mlp_step_count_kernel, device, -(-N // 128), [count, position, tail, seen, N, T, chunk_size], {"num_warps": 4})
    return o


def fold_due(state: Sequence[Tensor], norms: Sequence[Tensor], seen: Tensor, dtype: str, options: Options, *, late: bool = False) -> None:
    """After one more token: fold full tails, commit full chunks, move the counters on.

    seen: the counters as they were before that token.
    late: between the kernel that read the token and this one there is another, beside which this one may run.
    """
    *matrices, mu_sum, count, position, tail_k, tail_v, tail_eta, tail = state[:16]
    rounded = state[16:] or matrices[:3]
    N, H, h = norms[0].shape
    d, device = norms[2].shape[-1], seen.device
    chunk_size, norm, _, grad_clip, eps = options
    config, pdl = candidates(_FOLD, gpu_class(device), (_padded(d), dtype))[0], gpu_class(device) != "sm80"
    args = [*matrices[:3], *rounded, *matrices[3:], *norms, mu_sum, tail_k, tail_v, tail_eta, count, position, tail, seen]
    args += [N, H, chunk_size, grad_clip, eps, d, h, _padded(d), config.constants["HS"], config.constants["BT"], _NORM[norm], "ieee", pdl]
    args.append(late)
    early = {"launch_pdl": True} if pdl else {}
    launch_plain(ttt_mlp_step_fold_kernel, device, min(N * H, sm_count(device)), args, config.launch_options() | early)


def ttt_mlp_folded(
    w: Sequence[Tensor], n: Sequence[Tensor], g: Sequence[Tensor], tail: Sequence[Tensor], norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient sums `g` with the tail (`tail.Tail`) added; a row's are the same whoever its neighbours are."""
    k = tail[0]
    sums = tuple(x.clone(memory_format=torch.contiguous_format) for x in g)
    N, H, _, d = k.shape
    if N * H == 0:
        return sums
    BD = _padded(d)
    config = candidates(_FOLD, gpu_class(k.device), (BD, short(k.dtype)))[0]
    w, n, tail = ([x.contiguous() for x in tensors] for tensors in (w, n, tail))
    args = [*w, *sums, *n, *tail, H, eps, d, n[0].shape[-1], BD, config.constants["HS"], config.constants["BT"], _NORM[norm], "ieee"]
    launch_plain(ttt_mlp_step_tail_kernel, k.device, N * H, args, config.launch_options())
    return sums
