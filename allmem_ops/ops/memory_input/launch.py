"""Launches of the `memory_input` kernels: tiles, spans of tokens, grids, strides, allocation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import gpu_class, interpreted, sm_count
from allmem_ops.ops.kernels.replay import Recorder, replay, traits
from allmem_ops.ops.memory_input.chunk import token_places
from allmem_ops.ops.memory_input.kernels.bwd import memory_input_bwd_kernel
from allmem_ops.ops.memory_input.kernels.fwd import memory_input_fwd_kernel
from allmem_ops.ops.memory_input.kernels.sums import memory_input_bwd_sums_kernel
from allmem_ops.ops.memory_input.reference import Inputs, Options
from allmem_ops.ops.precision import accumulator_dtype

# TILE: channels of a tile. PER_SM: programs a streaming multiprocessor, about: backward all run at once (its partial sums grow with them),
# forward many are queued. SPAN: tokens of a program, at least.
_FWD: Table = {
    ("sm80", "rows"): [
        Config({"TILE": 256, "PER_SM": 96, "SPAN": 16}, 2, 1),
        Config({"TILE": 512, "PER_SM": 48, "SPAN": 16}, 4, 1),
    ]
}
_BWD: Table = {
    ("sm80", "rows"): [
        Config({"TILE": 128, "PER_SM": 16, "SPAN": 16}, 1, 1, 128),
        Config({"TILE": 256, "PER_SM": 8, "SPAN": 16}, 2, 1, 128),
    ]
}
_STEP_FWD, _STEP_BWD = 4, 2  # tokens of a step
_HEADS = 8, 64  # (tokens, columns) of a tile of the columns after q, k and v
_SUM_ROWS, _SUM_COLUMNS, _SUM_WARPS = 256, 16, 8  # tile of the kernel that adds the programs' parts


class _Plan(NamedTuple):
    """Tiles and programs of one launch of the convolution's kernels.

    Args:
        BR, BW: heads and channels of a tile, powers of two. blocks: tiles across the heads.
        span: tokens of a program; spans: of one batch row.
        programs: that walk through spans.
    """

    BR: int
    BW: int
    blocks: int
    span: int
    spans: int
    programs: int
    warps: int


def _plan(B: int, T: int, H: int, W: int, step: int, extra: int, config: Config, device: torch.device) -> _Plan:
    """`step`: tokens at a time; `extra`: tokens past its span that a program walks through."""
    constants = config.constants
    BW, BR = 1 << (W - 1).bit_length(), 1
    # Heads side by side make longer runs of memory, as long as no more than a quarter of the lanes lies idle.
    while (wider := 2 * BR) * BW <= constants["TILE"] and 3 * -(-H // wider) * wider <= 4 * H:
        BR = wider
    blocks = -(-H // BR)
    spans = max(1, constants["PER_SM"] * sm_count(device) // (3 * blocks * B))
    span = max(constants["SPAN"], -(-T // spans))
    span += -(span + extra) % step  # whole steps
    spans = -(-T // span)
    warps = max(1, min(16, config.num_warps * BR * BW // constants["TILE"]))
    return _Plan(BR, BW, blocks, span, spans, 3 * blocks * spans * B, warps)


def _places(cu_seqlens: Tensor | None, T: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if cu_seqlens is None else token_places(cu_seqlens, T)


def _in_units(*strides: int) -> tuple[int, list[int]]:
    """(UNIT, the strides in UNITs): 8 elements, 16 bytes of a half, where all are multiples of it, else 1."""
    unit = 1 if any(s % 8 for s in strides) else 8
    return unit, [s // unit for s in strides]


def _outputs(x: Inputs, heads: int, record: Recorder) -> list[Tensor]:
    """q, k, v, eta, mu and the gate logits, not yet filled."""
    B, T = x.projected.shape[:2]
    device, dtype = x.projected.device, x.projected.dtype
    head, wide = (heads, x.conv_weight.shape[0] // (3 * heads)), accumulator_dtype(dtype)
    ends = *[(head, dtype)] * 3, ((heads, 3), wide), ((heads,), wide), ((x.head_bias.shape[0] - 4 * heads,), dtype)
    return [record.result((B, T, *end), kind, device) for end, kind in ends]


def _forward(x: Inputs, o: Options, active: Tensor | None, update: bool) -> tuple[Tensor, ...]:
    """`update`: the tail, contiguous, moves on in the rows that `active` names."""
    given = *x, active
    key = traits(given, "memory_input_fwd", o, update)
    if (done := replay(key, given)) is not None:
        return tuple(done)
    B, T = x.projected.shape[:2]
    device = x.projected.device
    channels, taps = x.conv_weight.shape
    W, columns = channels // (3 * o.heads), x.head_bias.shape[0]
    record = Recorder(given)
    outputs = _outputs(x, o.heads, record)
    if B * T == 0:
        return tuple(outputs)
    sequence, position = _places(x.cu_seqlens, T)
    unit, (s_b, s_t) = _in_units(*x.projected.stride()[:2])
    tail = x.tail if x.tail is None or update else x.tail.contiguous()

    def run(config: Config, record: Recorder) -> None:
        plan = _plan(B, T, o.heads, W, _STEP_FWD, 0, config, device)
        if update:
            plan = plan._replace(span=T, spans=1, programs=3 * plan.blocks * B)
        args = [x.projected, x.conv_weight.contiguous(), x.q_norm, x.k_norm, x.head_bias.contiguous(), *outputs]
        args += [tail, active, sequence, position, T, plan.span, plan.spans, o.norm_eps, o.l2_eps, s_b, s_t, x.projected.stride(2)]
        args += [unit, o.heads, W, columns - 4 * o.heads, taps, update, o.silu, o.l2, plan.BR, plan.BW, *_HEADS]
        args.append(not interpreted(device))
        record.launch_plain(memory_input_fwd_kernel, device, plan.programs, args, config.launch_options() | {"num_warps": plan.warps})

    tried = Recorder(given)
    tune = None if update else lambda config: run(config, tried)
    run(choose("memory_input_fwd", _FWD, gpu_class(device), "rows", tune), record)
    record.file(key)
    return tuple(outputs)


def launch_forward(x: Inputs, options: Options) -> tuple[Tensor, ...]:
    """q, k, v [B, T, H, d], eta [B, T, H, 3], mu [B, T, H], gate logits [B, T, G]."""
    return _forward(x, options, None, False)


def launch_step(x: Inputs, active: Tensor | None, options: Options) -> tuple[Tensor, ...]:
    """As `launch_forward`, one program for all tokens, which then overwrites its part of the tail (contiguous)."""
    return _forward(x, options, active, True)


def launch_backward(
    gradients: Sequence[Tensor], x: Inputs, o: Options, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of projected, conv_weight, head_bias, q_norm and k_norm (None where the argument is) from those of the outputs.

    into: where that of `projected` goes, of its shape and dtype with columns side by side; None: into a tensor of its own.
    """
    given = *gradients, *x, into
    key = traits(given, "memory_input_bwd", o)
    wanted = (x.projected if into is None else None), *x[1:5]
    if (done := replay(key, given)) is not None:
        found = iter(done)
        first, *others = (None if t is None else next(found) for t in wanted)
        return into if first is None else first, *others
    B, T = x.projected.shape[:2]
    device = x.projected.device
    channels, taps = x.conv_weight.shape
    W, columns = channels // (3 * o.heads), x.head_bias.shape[0]
    record = Recorder(given)
    first, *others = (None if t is None else record.result(t.shape, t.dtype, device) for t in wanted)
    grads = dprojected, dtaps, dbias, dq_norm, dk_norm = into if first is None else first, *others
    if B * T == 0:
        return tuple(None if g is None else g.zero_() for g in grads)
    sequence, position = _places(x.cu_seqlens, T)
    unit, (s_b, s_t, s_dx_b, s_dx_t) = _in_units(*x.projected.stride()[:2], *dprojected.stride()[:2])
    tail = None if x.tail is None else x.tail.contiguous()

    def run(config: Config, record: Recorder) -> None:
        plan = _plan(B, T, o.heads, W, _STEP_BWD, taps - 1, config, device)
        parts = B * plan.spans
        tap_sums = record.workspace(parts, taps, channels, dtype=torch.float32, device=device)
        norm_sums = None if x.q_norm is None else record.workspace(parts * plan.blocks, 2, plan.BW, dtype=torch.float32, device=device)
        shares = plan.blocks if columns <= _HEADS[1] else 3 * plan.blocks
        bias_sums = record.workspace(parts * shares, columns, dtype=torch.float32, device=device)
        args = [*gradients, x.projected, x.conv_weight.contiguous(), x.q_norm, x.k_norm, x.head_bias.contiguous(), dprojected]
        args += [tail, sequence, position, tap_sums, norm_sums, bias_sums]
        args += [T, plan.span, plan.spans, o.norm_eps, o.l2_eps, s_b, s_t, x.projected.stride(2)]
        for g in gradients:
            args += g.stride()
        args += [s_dx_b, s_dx_t, unit, o.heads, W, columns - 4 * o.heads, taps, o.silu, o.l2, plan.BR, plan.BW]
        args += [*_HEADS, not interpreted(device)]
        options = config.launch_options() | {"num_warps": plan.warps}
        record.launch_plain(memory_input_bwd_kernel, device, plan.programs, args, options)
        widths = taps * channels, columns, 0 if norm_sums is None else 2 * plan.BW
        args = [tap_sums, norm_sums, bias_sums, dtaps, dq_norm, dk_norm, dbias, parts, parts * plan.blocks, parts * shares]
        args += [channels, W, columns, taps, plan.BW, _SUM_ROWS, _SUM_COLUMNS]
        programs = sum(-(-n // _SUM_COLUMNS) for n in widths)
        record.launch_plain(memory_input_bwd_sums_kernel, device, programs, args, {"num_warps": _SUM_WARPS})

    tried = Recorder(given)
    run(choose("memory_input_bwd", _BWD, gpu_class(device), "rows", lambda config: run(config, tried)), record)
    record.file(key)
    return grads
