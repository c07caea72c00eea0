"""Launches of the `memory_input` kernels: tiles, spans of tokens, grids, strides, allocation."""

from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import gpu_class, interpreted, sm_count
from allmem_ops.ops.kernels.launcher import launch_plain
from allmem_ops.ops.memory_input.chunk import token_places
from allmem_ops.ops.memory_input.kernels.bwd import memory_input_bwd_kernel
from allmem_ops.ops.memory_input.kernels.fwd import memory_input_fwd_kernel
from allmem_ops.ops.memory_input.kernels.heads import memory_input_heads_bwd_kernel, memory_input_heads_fwd_kernel
from allmem_ops.ops.memory_input.kernels.sums import memory_input_bwd_sums_kernel
from allmem_ops.ops.precision import accumulator_dtype

# TILE: channels of a tile. PER_SM: programs a streaming multiprocessor, about. SPAN: tokens of a program, at least. AHEAD: whether a
# step's loads are made a step before. The first config of each is the fastest of those that were timed; AHEAD = 1 was only compiled.
_FWD: Table = {
    ("sm80", "rows"): [
        Config({"TILE": 256, "PER_SM": 32, "SPAN": 16, "AHEAD": 0}, 2, 1),
        Config({"TILE": 512, "PER_SM": 7, "SPAN": 16, "AHEAD": 1}, 4, 1),
    ]
}
_BWD: Table = {
    ("sm80", "rows"): [
        Config({"TILE": 256, "PER_SM": 8, "SPAN": 16, "AHEAD": 0}, 2, 1),
        Config({"TILE": 512, "PER_SM": 3, "SPAN": 16, "AHEAD": 1}, 4, 1),
    ]
}
_HEADS_TOKENS, _HEADS_COLUMNS = 16, 64  # tile of the kernels for the columns after q, k and v
_SUM_ROWS, _SUM_COLUMNS = 64, 32  # tile of the kernel that adds the programs' parts


class _Plan(NamedTuple):
    """Tiles and programs of one launch of the convolution's kernels.

    Args:
        H, W: heads and their channels; BR, BW: those of a tile, powers of two. blocks: tiles across the heads.
        span: tokens of a program; spans: of one batch row.
    """

    H: int
    W: int
    BR: int
    BW: int
    blocks: int
    span: int
    spans: int
    programs: int
    warps: int


def _plan(B: int, T: int, H: int, W: int, extra: int, config: Config, device: torch.device) -> _Plan:
    """`extra`: tokens past its span that a program walks through."""
    constants = config.constants
    BW, BR = 1 << (W - 1).bit_length(), 1
    # Heads side by side make longer runs of memory, as long as no more than a quarter of the lanes lies idle.
    while (wider := 2 * BR) * BW <= constants["TILE"] and 3 * -(-H // wider) * wider <= 4 * H:
        BR = wider
    blocks = -(-H // BR)
    spans = max(1, constants["PER_SM"] * sm_count(device) // (3 * blocks * B))
    span = max(constants["SPAN"], -(-T // spans))
    span += -(span + extra) % 4  # whole steps
    spans = -(-T // span)
    warps = max(1, min(16, config.num_warps * BR * BW // constants["TILE"]))
    return _Plan(H, W, BR, BW, blocks, span, spans, 3 * blocks * spans * B, warps)


def _places(cu_seqlens: Tensor | None, T: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if cu_seqlens is None else token_places(cu_seqlens, T)


def _in_units(*strides: int) -> tuple[int, list[int]]:
    """(UNIT, the strides in UNITs): 8 elements, 16 bytes of a half, where all are multiples of it, else 1."""
    unit = 1 if any(s % 8 for s in strides) else 8
    return unit, [s // unit for s in strides]


def _empty_outputs(projected: Tensor, heads: int, W: int, gates: int) -> tuple[Tensor, ...]:
    B, T = projected.shape[:2]
    device, dtype = projected.device, projected.dtype
    wide = accumulator_dtype(dtype)
    q, k, v = (torch.empty(B, T, heads, W, dtype=dtype, device=device) for _ in range(3))
    eta = torch.empty(B, T, heads, 3, dtype=wide, device=device)
    mu = torch.empty(B, T, heads, dtype=wide, device=device)
    return q, k, v, eta, mu, torch.empty(B, T, gates, dtype=dtype, device=device)


def _forward(
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    active: Tensor | None,
    update: bool,
    heads: int,
    silu: bool,
    l2: bool,
    norm_eps: float,
    l2_eps: float,
) -> tuple[Tensor, ...]:
    B, T = projected.shape[:2]
    device = projected.device
    channels, taps = conv_weight.shape
    W, gates = channels // (3 * heads), head_bias.shape[0] - 4 * heads
    outputs = q, k, v, eta, mu, gate = _empty_outputs(projected, heads, W, gates)
    if B * T == 0:
        return outputs
    sequence, position = _places(cu_seqlens, T)
    unit, (s_b, s_t) = _in_units(*projected.stride()[:2])
    s_c = projected.stride(2)
    if tail is not None:
        tail = tail if update else tail.contiguous()

    def run(config: Config) -> None:
        plan = _plan(B, T, heads, W, 0, config, device)
        if update:
            plan = plan._replace(span=T, spans=1, programs=3 * plan.blocks * B)
        args = [
            projected,
            conv_weight,
            q_norm,
            k_norm,
            q,
            k,
            v,
            tail,
            active,
            sequence,
            position,
            T,
            plan.span,
            plan.spans,
            norm_eps,
            l2_eps,
        ]
        args += [s_b, s_t, s_c, unit, heads, W, taps, update, silu, l2, plan.BR, plan.BW, not interpreted(device)]
        args += [config.constants["AHEAD"]]
        launch_plain(memory_input_fwd_kernel, device, plan.programs, args, config.launch_options() | {"num_warps": plan.warps})

    run(choose("memory_input_fwd", _FWD, gpu_class(device), "rows", None if update else run))
    logits = projected[..., channels:]
    args = [logits, head_bias, eta, mu, gate, T, s_b, s_t, s_c, unit, heads, gates, _HEADS_TOKENS, _HEADS_COLUMNS]
    programs = -(-T // _HEADS_TOKENS) * B * -(-head_bias.shape[0] // _HEADS_COLUMNS)
    launch_plain(memory_input_heads_fwd_kernel, device, programs, args, {"num_warps": 4})
    return outputs


def launch_forward(
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    silu: bool,
    l2: bool,
    norm_eps: float,
    l2_eps: float,
) -> tuple[Tensor, ...]:
    """q, k, v [B, T, H, d], eta [B, T, H, 3], mu [B, T, H], gate logits [B, T, G]."""
    inputs = projected, conv_weight.contiguous(), head_bias.contiguous(), q_norm, k_norm, tail, cu_seqlens
    return _forward(*inputs, None, False, heads, silu, l2, norm_eps, l2_eps)


def launch_step(
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: Tensor,
    active: Tensor | None,
    heads: int,
    silu: bool,
    l2: bool,
    norm_eps: float,
    l2_eps: float,
) -> tuple[Tensor, ...]:
    """As `launch_forward`, one program for all tokens, which then overwrites its part of the tail (contiguous)."""
    inputs = projected, conv_weight.contiguous(), head_bias.contiguous(), q_norm, k_norm, tail, None
    return _forward(*inputs, active, True, heads, silu, l2, norm_eps, l2_eps)


def launch_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    deta: Tensor,
    dmu: Tensor,
    dgate: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    silu: bool,
    l2: bool,
    norm_eps: float,
    l2_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of projected, conv_weight, head_bias, q_norm and k_norm (None where the argument is)."""
    B, T = projected.shape[:2]
    device = projected.device
    channels, taps = conv_weight.shape
    W, columns = channels // (3 * heads), head_bias.shape[0]
    conv_weight, head_bias = conv_weight.contiguous(), head_bias.contiguous()
    grads = dprojected, dtaps, dbias, dq_norm, dk_norm = tuple(
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=device)
        for x in (projected, conv_weight, head_bias, q_norm, k_norm)
    )
    if B * T == 0:
        return tuple(None if g is None else g.zero_() for g in grads)
    sequence, position = _places(cu_seqlens, T)
    logits, dlogits = projected[..., channels:], dprojected[..., channels:]
    s_c = projected.stride(2)
    unit, (s_b, s_t, s_dx_b, s_dx_t) = _in_units(*projected.stride()[:2], *dprojected.stride()[:2])
    blocks = -(-T // _HEADS_TOKENS) * B
    bias_rows = min(blocks, 2 * sm_count(device))
    bias_sums = torch.empty(bias_rows, columns, dtype=torch.float32, device=device)
    args = [deta, dmu, dgate, logits, head_bias, dlogits, bias_sums, T, blocks]
    args += [s_b, s_t, s_c, *deta.stride(), *dmu.stride(), *dgate.stride(), s_dx_b, s_dx_t]
    args += [unit, heads, columns - 4 * heads, _HEADS_TOKENS, _HEADS_COLUMNS]
    launch_plain(memory_input_heads_bwd_kernel, device, bias_rows * -(-columns // _HEADS_COLUMNS), args, {"num_warps": 4})
    tail = None if tail is None else tail.contiguous()

    def run(config: Config) -> None:
        plan = _plan(B, T, heads, W, taps - 1, config, device)
        parts = B * plan.spans
        tap_sums = torch.empty(parts, taps, channels, dtype=torch.float32, device=device)
        norm_sums = None if q_norm is None else torch.empty(parts * plan.blocks, 2, plan.BW, dtype=torch.float32, device=device)
        args = [dq, dk, dv, projected, conv_weight, q_norm, k_norm, dprojected, tail, sequence, position, tap_sums, norm_sums]
        args += [T, plan.span, plan.spans, norm_eps, l2_eps, s_b, s_t, s_c]
        args += [*dq.stride(), *dk.stride(), *dv.stride(), s_dx_b, s_dx_t, unit, heads, W, taps, silu, l2, plan.BR, plan.BW]
        args += [not interpreted(device), config.constants["AHEAD"]]
        launch_plain(memory_input_bwd_kernel, device, plan.programs, args, config.launch_options() | {"num_warps": plan.warps})
        widths = taps * channels, columns, 0 if norm_sums is None else 2 * plan.BW
        args = [tap_sums, norm_sums, bias_sums, dtaps, dq_norm, dk_norm, dbias, parts, parts * plan.blocks, bias_rows]
        args += [channels, W, columns, taps, plan.BW, _SUM_ROWS, _SUM_COLUMNS]
        programs = sum(-(-n // _SUM_COLUMNS) for n in widths)
        launch_plain(memory_input_bwd_sums_kernel, device, programs, args, {"num_warps": 4})

    run(choose("memory_input_bwd", _BWD, gpu_class(device), "rows", run))
    return grads
