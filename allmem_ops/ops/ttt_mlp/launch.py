"""Launches of the Triton forward of `ttt_mlp`."""

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allmem_ops._config import settings
from allmem_ops._validation import short
from allmem_ops.ops.kernels.configs import candidates
from allmem_ops.ops.kernels.device import gpu_class, sm_count
from allmem_ops.ops.kernels.launcher import launch
from allmem_ops.ops.ttt_mlp.configs import CHAIN, OWNED, READ
from allmem_ops.ops.ttt_mlp.kernels import chain, owned, persistent
from allmem_ops.ops.ttt_mlp.kernels import read as read_kernels
from allmem_ops.ops.ttt_mlp.kernels.common import NONE, POST_WRITE, PRE_WRITE
from allmem_ops.ops.ttt_mlp.kernels.plan import ttt_mlp_plan_kernel
from allmem_ops.ops.ttt_mlp.reference import Options
from allmem_ops.ops.ttt_mlp.replay import Call, replay
from allmem_ops.ops.ttt_mlp.slots import Outputs, Spans, State, outputs, slot_tensors
from allmem_ops.ops.ttt_mlp.slots import spans as spans_of

# Programs of the read on an SM, counting those that wait.
WAVES = 2
# Chunks of up to so many tokens take the chain whose programs take all of them (owned.py), where it has a config and its programs fit. It
# takes 2.7 us a chunk and 9.4 us for each 1000 of its tokens, the one that splits tokens 7.5 and 3.8; the reverse chains 4.3 and 11.7, and
# 13.7 and 3.3 (H100, 8 heads of 64, hidden 128).
OWNED_TOKENS = 768
NORM = {"none": NONE.value, "pre_write": PRE_WRITE.value, "post_write": POST_WRITE.value}
# Decided when triton is imported, for good.
INTERPRET = settings().interpret
# Values of mu that are added at once.
BM = 64 if INTERPRET else 1024
NO_STATE = ((None,) * 3, (None,) * 3, (None,) * 3, None, None)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


class Kind(NamedTuple):
    """Compile-time arguments of a kernel by name, and options of its launch."""

    constants: dict[str, Any]
    options: dict[str, Any]


class Recipe(NamedTuple):
    """What follows from device, widths and dtype alone."""

    sms: int
    persistent: bool  # whether the chain may be one launch
    lone_clip: bool  # also with a clip and a chunk's tokens in one part
    HS: int
    slices: int
    shape: dict[str, int]
    chain: Kind  # of the programs with a token loop: tile, arithmetic, warps and stages
    read: Kind
    owned: Kind | None  # of the chain whose programs take all tokens, where it exists


@functools.cache
def recipe(device: torch.device, d: int, h: int, dtype: torch.dtype) -> Recipe:
    gpu, BD = gpu_class(device), max(power_of_two(d), 16)
    shape_class = BD, max(power_of_two(h), 16), short(dtype)
    shape = {"D": d, "HID": h, "BD": BD}
    # bfloat16 hides the error of the special function unit; the interpreter knows no PTX
    arithmetic = {"PREC": "ieee", "FAST": dtype == torch.bfloat16 and not INTERPRET}
    of_chain, of_read = (candidates(table, gpu, shape_class)[0] for table in (CHAIN, READ))
    of_owned = candidates(OWNED, gpu, shape_class)[0] if (gpu, shape_class) in OWNED and not INTERPRET else None
    HS = of_chain.constants["HS"]
    resident = h <= 2 * of_read.constants["BH"] and BD * h <= 64 * 128 and dtype != torch.float32
    return Recipe(
        # Triton 3.7 stops at that form for sm100: "parent layout must have at least rank >= 2"
        sm_count(device), not INTERPRET, gpu != "sm100", HS, -(-h // HS), shape,
        Kind({"BT": of_chain.constants["BT"], **arithmetic}, of_chain.launch_options()),
        Kind({**shape, "RESIDENT": resident, **of_read.constants, **arithmetic}, of_read.launch_options()),
        None if of_owned is None else Kind({**of_owned.constants, **arithmetic}, of_owned.launch_options()),
    )  # fmt: skip


def run(
    kernel: Any, call: Call, device: torch.device, programs: int, args: Sequence[Any],
    constants: Mapping[str, Any], options: Mapping[str, Any],
) -> None:  # fmt: skip
    """`launcher.launch` of a kernel whose last arguments are its constants, given by name."""
    values = [constants[name] for name in kernel.arg_names[len(args) :]]
    args = [*args, *values]
    call.note(launch(kernel, (call.traits, *values), device, programs, args, options), programs, args)


def traits(*inputs: Tensor | int | float | None) -> tuple[Hashable, ...]:
    """What Triton compiles kernels anew for in the inputs of a call; everything else they get is new, aligned and contiguous.

    Of a tensor its dtype and alignment, and of each stride whether it is 1, divisible by 16, beyond 32 bits.
    """
    found: list[Hashable] = []
    for x in inputs:
        if isinstance(x, Tensor):
            found += x.dtype, x.data_ptr() % 16 == 0
            found += [2 if s == 1 else (s % 16 == 0) + 4 * (s >= 2**31) for s in x.stride()]
        else:
            found.append(x >= 2**31 if isinstance(x, int) else x is None)
    return tuple(found)


def layout(*inputs: Tensor | None) -> list[Hashable]:
    """Device, shapes, strides and dtypes of a call's inputs."""
    found: list[Hashable] = [inputs[0].device]
    for x in inputs:
        found += (None,) if x is None else (x.shape, x.stride(), x.dtype)
    return found


def splits(programs: int, HS: int, sms: int) -> int:
    """In how many parts a chunk's tokens are split, so that `programs` slices fill the GPU: a power of two, at most 8."""
    parts = 1
    while 2 * parts * programs <= sms and 2 * parts <= min(HS, 8):
        parts *= 2
    return parts


def plan(cu_seqlens: Tensor, count: Tensor | None, spans: Spans, first: Tensor, slots: Tensor, call: Call) -> None:
    """Fill the slot tables of packed sequences."""
    args = [cu_seqlens, count, first, slots, spans.sequences, spans.slots, spans.tokens, spans.chunk_size]
    constants = {"STATE": spans.carried, "KEEP": spans.keep, "BN": 64 if INTERPRET else 1024}
    run(ttt_mlp_plan_kernel, call, cu_seqlens.device, spans.sequences, args, constants, {"num_warps": 4})


def ttt_mlp_triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    weights: Sequence[Tensor],
    state: State | None,
    cu_seqlens: Tensor | None,
    options: Options,
    keep: bool,
    save: bool,
) -> Outputs:
    """The forward: see `Outputs`. weights: w_gate, w_up, w_down as `ttt_mlp` takes them."""
    _, tokens, heads, d = q.shape
    h = weights[0].shape[1]
    inputs = q, k, v, eta, mu, *weights, cu_seqlens, *(state or ())
    key = "forward", *layout(*inputs), options, keep, save
    done = replay(key, inputs)
    if done is not None:
        return Outputs(*done)
    spans = spans_of(q, cu_seqlens, options.chunk_size, state is not None, keep)
    out = outputs(q, weights[0], spans, options.grad_clip is not None, save)
    if spans.sequences * heads == 0:
        return out
    weights = [w.contiguous() for w in weights]
    if state is not None:
        state = State(*(x.contiguous() for x in state))
    kept = out
    if not save:
        kept = Outputs(*out[:12], *slot_tensors(weights[0].new_empty, spans, heads, d, h, options.grad_clip is not None, False))
    call = Call(traits(q, k, v, eta, mu, *weights, cu_seqlens, options.chunk_size, options.grad_clip, *(state or ())), inputs)
    for i, x in enumerate(kept):
        if x is not None:
            call.keep(x, zero=save and i > 11 and (spans.packed or spans.carried))
    if spans.packed:
        plan(cu_seqlens, None if state is None else state.count, spans, kept.first, kept.slots, call)
    x_read = call.keep(q.new_empty(spans.slots, heads, 3, d, h))
    write(k, v, eta, mu, weights, state, cu_seqlens, options, spans, kept, x_read, call)
    if tokens:
        read(q, state, cu_seqlens, options, spans, kept, x_read, call)
    call.file(key, out)
    return out


def write(
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    weights: Sequence[Tensor],
    state: State | None,
    cu_seqlens: Tensor | None,
    options: Options,
    spans: Spans,
    out: Outputs,
    x_read: Tensor,
    call: Call,
) -> None:
    """The chain: fills every slot and, with `keep`, the final state."""
    _, tokens, heads, d = k.shape
    h = weights[0].shape[1]
    chunk_size, norm, _, grad_clip, eps = options
    sms, may_stay, lone_clip, HS, slices, shape, kind, _, of_owned = recipe(k.device, d, h, k.dtype)
    X = spans.sequences * heads
    owners = 0 if of_owned is None else -(-h // of_owned.constants["HS"])
    SP = splits(X * slices, HS, sms)
    parts = slices * SP
    state_w, state_m, state_g, mu_held, count = NO_STATE
    if state is not None:
        state_w, state_m, state_g, mu_held, count = state[:3], state[3:6], state[6:9], state.mu_sum, state.count
    sizes = tokens, chunk_size, heads, spans.slots if spans.packed else spans.steps
    strides = *k.stride(), *v.stride(), *eta.stride(), *mu.stride()
    span = cu_seqlens, count, out.first
    clipped, empty = grad_clip is not None, out.n.new_empty
    case = {"STATE": spans.carried, "PACKED": spans.packed, "KEEP": spans.keep}
    normed = {**shape, "HS": HS, "SP": SP, "NORM": NORM[norm]}
    saving = {"SAVE_M": out.m is not None, "FAST": kind.constants["FAST"]}
    alone = 0 < X * owners <= sms and chunk_size <= OWNED_TOKENS and (may_stay or owners == 1)
    if alone or (may_stay and parts <= sms and (SP > 1 or grad_clip is None or lone_clip)):
        groups = X if alone else min(X, sms // parts)
        room = owners * (3 * d + 6) if alone else ((SP if SP > 1 else 0) + 1) * 3 * d * h + parts * (3 * d + 6)
        scratch = call.keep(empty(X * room))
        counters = call.keep(torch.zeros(groups * 32, dtype=torch.int32, device=k.device), zero=True)
        args = [
            k, v, eta, mu, *span, *weights, *state_w, *state_m, *state_g, mu_held,
            out.x, x_read, out.m, out.size, out.n, out.mu_mean, out.g_size, *out[1:11],
            counters, scratch, X, *sizes, eps, grad_clip, *strides,
        ]  # fmt: skip
        if alone:
            kernel, programs, kind = owned.ttt_mlp_fwd_owned_kernel, X * owners, of_owned
        else:
            kernel, programs = persistent.ttt_mlp_fwd_chain_kernel, groups * parts
        constants = {**normed, **case, **saving, **kind.constants, "CLIP": clipped, "BM": BM}
        run(kernel, call, k.device, programs, args, constants, {**kind.options, "launch_cooperative_grid": True})
        return
    call.note(None, 0, ())  # launches of their own, not to be done again
    m, slabs = empty(X, 3, d, h), empty(X, SP, 3, d, h)
    sums, n_sums, squares = empty(2, X, parts, d), empty(X, parts, d), empty(X, parts, 3)
    by_part = (X, parts)
    what = {**shape, "HS": HS, "SP": SP}
    chain.ttt_mlp_fwd_init_kernel[by_part](
        mu, *span, *weights, *state_w, *state_m, mu_held, out.x, x_read, m, out.m, out.size, out.n, out.mu_mean, out.mu_sum, sums, n_sums,
        *sizes, eps, *mu.stride(), **normed, **case, **saving, BM=BM,
    )  # fmt: skip
    for i_c in range(spans.steps if spans.keep else spans.steps - 1):
        chain.ttt_mlp_fwd_write_kernel[X, slices, SP](
            k, v, eta, *span, *weights, out.x, out.size, sums[i_c % 2], n_sums, slabs, i_c, *sizes, eps, *strides[:12],
            **normed, **case, **kind.constants, **kind.options,
        )  # fmt: skip
        if clipped:
            chain.ttt_mlp_fwd_clip_kernel[by_part](*span, *state_g, slabs, squares, i_c, *sizes, **what, **case)
        chain.ttt_mlp_fwd_commit_kernel[by_part](
            *span, *weights, *state_g, out.x, x_read, m, out.m, out.size, sums[i_c % 2], sums[1 - i_c % 2], n_sums, slabs,
            squares, out.mu_mean, out.g_size, *out[7:10], i_c, *sizes, eps, grad_clip, **normed, **case, **saving, CLIP=clipped,
        )  # fmt: skip
    chain.ttt_mlp_fwd_finish_kernel[by_part](
        *span, *weights, out.x, m, out.size, out.n, sums, n_sums, *out[1:7], *sizes, eps, **normed, **case, FAST=kind.constants["FAST"]
    )


def read(
    q: Tensor,
    state: State | None,
    cu_seqlens: Tensor | None,
    options: Options,
    spans: Spans,
    out: Outputs,
    x_read: Tensor,
    call: Call,
) -> None:
    """All reads, once every slot is filled."""
    _, tokens, heads, d = q.shape
    sms, *_, kind, _ = recipe(q.device, d, x_read.shape[-1], q.dtype)
    # Programs for a slot and head: as many as a chunk of the average length has tiles, fewer where that fills the GPU several times.
    slots = spans.slots
    tiles = -(-spans.batch * tokens // (slots * kind.constants["BT"]))
    programs = max(min(tiles, WAVES * sms // (slots * heads)), 1)
    args = [
        q, out.o, cu_seqlens, None if state is None else state.count, out.slots, x_read, out.size, out.n,
        tokens, options.chunk_size, heads, slots if spans.packed else spans.steps, programs, options.eps, *q.stride(), *out.o.stride(),
    ]  # fmt: skip
    case = {"NORM": NORM[options.norm], "STATE": spans.carried, "PACKED": spans.packed, "RESIDUAL": options.residual}
    run(read_kernels.ttt_mlp_fwd_read_kernel, call, q.device, slots * heads * programs, args, {**kind.constants, **case}, kind.options)
