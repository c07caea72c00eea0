"""Launches of the `rotary` kernels: tiles of tokens and heads, grids, strides, allocation."""

from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import gpu_class, sm_count
from allmem_ops.ops.kernels.replay import Recorder, replay, traits
from allmem_ops.ops.rotary.kernels.bwd import rotary_bwd_kernel, rotary_bwd_sums_kernel
from allmem_ops.ops.rotary.kernels.fwd import rotary_fwd_kernel
from allmem_ops.ops.rotary.kernels.table import rotary_table_kernel

# TILE: channels of a tile's half heads. HEADS: of a tile, at most. PER_SM: programs a streaming multiprocessor, at most; in the forward
# there are as many as tiles.
_FWD: Table = {("sm80", "rows"): [Config({"TILE": 1024, "HEADS": 8, "PER_SM": 1 << 20}, 4, 1)]}
_BWD: Table = {("sm80", "rows"): [Config({"TILE": 512, "HEADS": 8, "PER_SM": 8}, 4, 1)]}
_TABLE_TILE, _TABLE_WARPS = 1024, 4
_SUM_ROWS, _SUM_COLUMNS = 64, 32  # tile of the kernel that adds the programs' parts


class _Plan(NamedTuple):
    """Tiles of BT tokens, BH heads of one kind and BW channels (half a head, up to a power of two).

    blocks: of q's heads and of k's; slots: programs that share a sequence's tokens.
    """

    BT: int
    BH: int
    BW: int
    blocks: tuple[int, int]
    slots: int
    warps: int


def _plan(B: int, T: int, kinds: tuple[int, ...], W: int, config: Config, device: torch.device) -> _Plan:
    """`kinds`: numbers of heads of q, of k and, in backward, of v."""
    constants = config.constants
    BW, BH = 1 << (W - 1).bit_length(), 1
    # Heads side by side share a token's cos and sin, as long as no more than a quarter of the lanes lies idle.
    while (wider := 2 * BH) <= constants["HEADS"] and wider * BW <= constants["TILE"]:
        if 3 * sum(-(-n // wider) * wider for n in kinds) > 4 * sum(kinds):
            break
        BH = wider
    BT = max(1, constants["TILE"] // (BH * BW))
    blocks = [-(-n // BH) for n in kinds]
    slots = min(-(-T // BT), max(1, constants["PER_SM"] * sm_count(device) // (sum(blocks) * B)))
    warps = min(16, max(config.num_warps, BT * BH * BW // 512))
    return _Plan(BT, BH, BW, (blocks[0], blocks[1]), slots, warps)


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else x.stride()


def _options(plan: _Plan, cos: Tensor) -> dict[str, int | bool]:
    """With a table in half precision each product is rounded: LLVM would make it and the sum one operation with one rounding."""
    return {"num_warps": plan.warps, "enable_fp_fusion": cos.dtype == torch.float32}


def _table_strides(table: Tensor) -> tuple[int, ...]:
    """Strides of cos or sin [B or 1, T, D/2]; one table serves every sequence with stride 0."""
    s_b, s_t, s_d = table.stride()
    return (0 if table.shape[0] == 1 else s_b), s_t, s_d


def launch_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, heads: int, heads_kv: int, eps: float
) -> tuple[Tensor, Tensor]:
    """q [B, T, HQ, D] and k [B, T, HK, D]."""
    inputs = qkv, cos, sin, q_norm, k_norm
    key = traits(inputs, "rotary_fwd", heads, heads_kv, eps)
    if (done := replay(key, inputs)) is not None:
        return done[0], done[1]
    B, T, _, D = qkv.shape
    record = Recorder(inputs)
    q, k = (record.result((B, T, n, D), qkv.dtype, qkv.device) for n in (heads, heads_kv))
    if q.numel() + k.numel() == 0:
        return q, k

    def run(config: Config, record: Recorder) -> None:
        plan = _plan(B, T, (heads, heads_kv), D // 2, config, qkv.device)
        args = [qkv, cos, sin, q_norm, k_norm, q, k, T, plan.slots, eps]
        args += [*qkv.stride(), *_table_strides(cos), *_table_strides(sin), *_strides(q_norm, 1), *_strides(k_norm, 1)]
        args += [heads, heads_kv, D // 2, plan.BT, plan.BH, plan.BW]
        record.launch_plain(rotary_fwd_kernel, qkv.device, B * plan.slots * sum(plan.blocks), args, _options(plan, cos))

    tried = Recorder(inputs)
    run(choose("rotary_fwd", _FWD, gpu_class(qkv.device), "rows", lambda config: run(config, tried)), record)
    record.file(key)
    return q, k


def launch_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of qkv, q_norm and k_norm (None where the argument is)."""
    inputs = dq, dk, dv, qkv, cos, sin, q_norm, k_norm
    key = traits(inputs, "rotary_bwd", eps)
    if (done := replay(key, inputs)) is not None:
        found = iter(done)
        return next(found), *(None if x is None else next(found) for x in (q_norm, k_norm))
    B, T, heads, D = dq.shape
    heads_kv, device = dk.shape[2], dq.device
    record = Recorder(inputs)
    dqkv = record.result((B, T, heads + 2 * heads_kv, D), dq.dtype, device)
    norms = dq_norm, dk_norm = tuple(None if x is None else record.result(x.shape, x.dtype, device) for x in (q_norm, k_norm))
    if dqkv.numel() == 0:
        return dqkv, *(None if x is None else x.zero_() for x in norms)

    def run(config: Config, record: Recorder) -> None:
        plan = _plan(B, T, (heads, heads_kv, heads_kv), D // 2, config, device)
        groups, (q_blocks, k_blocks) = B * plan.slots, plan.blocks
        rows = groups * q_blocks, groups * k_blocks
        sums = None if q_norm is None else record.workspace(sum(rows), 2, plan.BW, dtype=torch.float32, device=device)
        args = [dq, dk, dv, qkv, cos, sin, q_norm, k_norm, dqkv, sums, T, plan.slots, groups, eps]
        args += [*dq.stride(), *dk.stride(), *dv.stride(), *_strides(qkv, 4), *_table_strides(cos), *_table_strides(sin)]
        args += [*_strides(q_norm, 1), *_strides(k_norm, 1)]
        args += [heads, heads_kv, D // 2, plan.BT, plan.BH, plan.BW]
        record.launch_plain(rotary_bwd_kernel, device, groups * (q_blocks + 2 * k_blocks), args, _options(plan, cos))
        if sums is not None:
            args = [sums, dq_norm, dk_norm, *rows, D // 2, plan.BW, _SUM_ROWS, _SUM_COLUMNS]
            programs = -(-2 * plan.BW // _SUM_COLUMNS) * (1 if dk_norm is None else 2)
            record.launch_plain(rotary_bwd_sums_kernel, device, programs, args, {"num_warps": 4})

    tried = Recorder(inputs)
    run(choose("rotary_bwd", _BWD, gpu_class(device), "rows", lambda config: run(config, tried)), record)
    record.file(key)
    return dqkv, *norms


def launch_table(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin fp32 [B, T, W] of positions [B, T] and inv_freq fp32 [W]."""
    inputs = positions, inv_freq
    key = traits(inputs, "rotary_table")
    if (done := replay(key, inputs)) is not None:
        return done[0], done[1]
    (B, T), W = positions.shape, inv_freq.shape[0]
    record = Recorder(inputs)
    cos, sin = (record.result((B, T, W), torch.float32, positions.device) for _ in range(2))
    if cos.numel():
        BW = 1 << (W - 1).bit_length()
        BR = max(1, _TABLE_TILE // BW)
        args = [positions, inv_freq, cos, sin, T, B * T, *positions.stride(), *inv_freq.stride(), W, BR, BW]
        record.launch_plain(rotary_table_kernel, positions.device, -(-B * T // BR), args, {"num_warps": _TABLE_WARPS})
        record.file(key)
    return cos, sin
