"""Launch of the decode kernels: scratch, the number of ranges a cache is split into, pinned configs."""

import math

import torch
from torch import Tensor

from allmem_ops._validation import fail
from allmem_ops.ops.kernels.configs import Config, candidates
from allmem_ops.ops.kernels.device import gpu_class, sm_count
from allmem_ops.ops.swa.kernels.step import swa_step_merge_kernel, swa_step_split_kernel

# (GPU class, (padded head dim, bytes an element)): slots a block, so that a block's keys have 16 KB where the element has 2 bytes.
_SPLIT = {
    ("sm80", (padded, size)): [Config({"BN": max(16, min(128, 16384 // (padded * size)))}, 4, 3)]
    for padded in (16, 32, 64, 128, 256)
    for size in (2, 4)
}
MAX_SPLITS = 128


def split_count(pairs: int, slots: int, block: int, sms: int) -> int:
    """Into how many ranges each (sequence, key/value head) is split: a rule of sizes that the host knows, never of positions."""
    return max(1, min(-(-slots // block), MAX_SPLITS, sms // pairs))


def swa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sinks: Tensor | None,
    active: Tensor | None,
    sink_k: Tensor,
    sink_v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """Two kernels; the cache's buffers and `positions` are changed in place."""
    B, _, HQ, D = q.shape
    window, HK, sinks = ring_k.shape[1], ring_k.shape[2], sink_k.shape[1]
    for name, x in (("sink_k", sink_k), ("sink_v", sink_v), ("ring_k", ring_k), ("ring_v", ring_v), ("positions", positions)):
        if not x.is_contiguous():
            fail(f"cache.{name}", "must be contiguous", f"strides {list(x.stride())}")
    G, BD = HQ // HK, max(16, 1 << (D - 1).bit_length())
    gpu = gpu_class(q.device)
    config = candidates(_SPLIT, gpu, (BD, q.element_size()))[0]
    splits = split_count(B * HK, window + sinks, config.constants["BN"], sm_count(q.device))
    part_o = torch.empty(B, HQ, splits, D, dtype=torch.float32, device=q.device)
    part_ml = torch.empty(B, HQ, splits, 2, dtype=torch.float32, device=q.device)
    seen, o = torch.empty_like(positions), torch.empty(B, 1, HQ, D, dtype=q.dtype, device=q.device)
    stride_q, stride_k, stride_v = (x.stride()[:1] + x.stride()[2:] for x in (q, k, v))
    stride_f = (0, 0, 0) if q_sinks is None else q_sinks.stride()[:1] + q_sinks.stride()[2:]
    stride_a = 0 if active is None else active.stride(0)
    pdl = gpu != "sm80"
    launch = {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}
    buffers = sink_k, sink_v, ring_k, ring_v, positions, active, part_o, part_ml, seen
    sizes = stride_a, window, sinks, splits, scale * math.log2(math.e)
    swa_step_split_kernel[HK, splits, B](
        q, q_sinks, *buffers, *stride_q, *stride_f, *sizes,
        G=G, D=D, BG=max(16, 1 << (G - 1).bit_length()), BD=BD, **launch, **config.options(),
    )  # fmt: skip
    BC = min(BD, 64)
    swa_step_merge_kernel[-(-D // BC), HQ, B](
        q, k, v, *buffers, o, *stride_q, *stride_k, *stride_v, *sizes, G=G, D=D, BD=BD, BS=32, BC=BC, num_warps=4, **launch
    )
    return o
