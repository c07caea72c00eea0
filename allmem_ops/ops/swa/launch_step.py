"""Launch of the decode kernels: scratch, the number of ranges a cache is split into, pinned configs."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from allmem_ops._validation import fail
from allmem_ops.ops.kernels.configs import Config, Table, candidates
from allmem_ops.ops.kernels.device import gpu_class, sm_count
from allmem_ops.ops.kernels.launcher import launch_plain
from allmem_ops.ops.swa.kernels.step import swa_step_merge_kernel, swa_step_split_kernel

# (padded head dim, bytes an element): BN slots a block, 8 KB of keys. Small programs: at D = 128 bf16 two warps with three
# blocks in flight, four of them an SM. float32 at D = 256 would need 132 KB of shared memory for as many, which not every GPU has.
_SPLIT: Table = {
    ("sm80", (padded, size)): [Config({"BN": max(16, min(128, 8192 // (padded * size)))}, warps, 4 if padded * size < 1024 else 2)]
    for padded in (16, 32, 64, 128, 256)
    for size, warps in ((2, 2), (4, 4))
}
MAX_SPLITS = 128


def split_count(pairs: int, slots: int, block: int, sms: int) -> int:
    """Into how many ranges each (sequence, key/value head) is split: a rule of sizes that the host knows, never of positions.

    Two programs an SM; fewer where a range would have less than six blocks, as long as every SM has one. (H100, window 4096,
    128 sinks, 8 heads of 128: at batch 1 16, 22, 33 ranges take 12.5, 10.9, 11.2 us.)
    """
    blocks = -(-slots // block)
    return max(1, min(2 * sms // pairs, max(blocks // 6, min(sms // pairs, blocks)), MAX_SPLITS))


def fetches(key_bytes: int) -> bool:
    """Whether the cache is fetched into L2 before the kernel waits for q: a part of L2 has to hold it."""
    return key_bytes <= 12e6


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
    between: Callable[[], None] | None = None,
) -> Tensor:
    """Two kernels; the cache's buffers and `positions` are changed in place.

    between: launches one kernel that may run beside the first one; it ends after that one, which the second one relies on.
    """
    B, _, HQ, D = q.shape
    window, HK, sinks = ring_k.shape[1], ring_k.shape[2], sink_k.shape[1]
    for name, x in (("sink_k", sink_k), ("sink_v", sink_v), ("ring_k", ring_k), ("ring_v", ring_v), ("positions", positions)):
        if not x.is_contiguous():
            fail(f"cache.{name}", "must be contiguous", f"strides {list(x.stride())}")
    G, BD = HQ // HK, max(16, 1 << (D - 1).bit_length())
    if B == 0:
        return torch.empty_like(q)
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
    early = {"launch_pdl": True} if pdl else {}
    buffers = sink_k, sink_v, ring_k, ring_v, positions, active, part_o, part_ml, seen
    sizes = stride_a, window, sinks, splits, scale * math.log2(math.e)
    # Launched early, the first kernel finds the SMs unevenly free: with one range a head that costs 3 to 10 % (H100, batch 32: 191
    # against 196 to 212 us), with several it saves a launch (0.4 of 11 us).
    BG, BC = max(16, 1 << (G - 1).bit_length()), min(BD, 64)
    fetch = (
        D * q.element_size()
        if pdl and splits > 1 and D * q.element_size() % 16 == 0 and fetches(B * (window + sinks) * HK * D * q.element_size())
        else 0
    )
    args = (q, q_sinks, *buffers, *stride_q, *stride_f, *sizes, G, D, BG, BD, config.constants["BN"], pdl, fetch)
    options = config.launch_options()
    launch_plain(swa_step_split_kernel, q.device, (HK, splits, B), args, options | early if splits > 1 else options)
    if between is not None:
        between()
    args = (q, k, v, *buffers, o, *stride_q, *stride_k, *stride_v, *sizes, G, D, BD, 32, BC, pdl)
    launch_plain(swa_step_merge_kernel, q.device, (-(-D // BC), HQ, B), args, {"num_warps": 4} | early)
    return o
