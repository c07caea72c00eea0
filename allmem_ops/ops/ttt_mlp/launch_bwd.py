"""Launches of the Triton backward of `ttt_mlp`, from what the forward has saved (slots.py).

    pack     operands from X: what queries read, what chunks write from           parallel
    dread    the reads' part of dW, a slot at a time                              parallel
    dq       dQ                                                                   parallel
    chain    dX, dM, dN from the last slot to the first, each chunk's dD          serial over chunks
    last     dK, dV, deta from dD; dmu; dW_0 with its part in N, summed over      parallel
             the sequences

Nothing of size [T, h]: `workspace_bytes`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allmem_ops._validation import short
from allmem_ops.ops.kernels.configs import candidates
from allmem_ops.ops.kernels.device import gpu_class, interpreted, sm_count
from allmem_ops.ops.ttt_mlp import configs_bwd
from allmem_ops.ops.ttt_mlp.kernels import bwd_chain, bwd_last, bwd_owned, bwd_persistent, bwd_read
from allmem_ops.ops.ttt_mlp.kernels.bwd_regions import GROUPS, scratch_size
from allmem_ops.ops.ttt_mlp.launch import NORM, OWNED_TOKENS, Kind, layout, power_of_two, run, traits
from allmem_ops.ops.ttt_mlp.reference import Options
from allmem_ops.ops.ttt_mlp.replay import Call, replay
from allmem_ops.ops.ttt_mlp.slots import Outputs, State
from allmem_ops.ops.ttt_mlp.slots import spans as spans_of


class Gradients(NamedTuple):
    """Gradients of the operator's tensors; those of a state that was not given are None."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    mu: Tensor
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    state: tuple[Tensor, ...] | None  # of the state's w_gate, w_up, w_down, m_gate, m_up, m_down


class Recipe(NamedTuple):
    """What launches of one width and dtype have in common."""

    wide: torch.dtype  # of operands: float16 lacks the range for gradients
    pack: Kind
    dread: Kind
    dq: Kind
    chain: Kind
    carry: Kind  # what the chain's kernels without a token loop take of it
    last: Kind
    room: int  # programs of the persistent chain that are resident at a time
    owned: Kind | None  # of the chain whose programs take all tokens, where it exists; one of them to an SM


@functools.cache
def recipe(gpu: str, sms: int, interpret: bool, d: int, h: int, dtype: torch.dtype) -> Recipe:
    shape_class = max(power_of_two(d), 16), max(power_of_two(h), 16), short(dtype)
    shape = {"D": d, "HID": h, "BD": shape_class[0]}
    math = {"PREC": "tf32" if dtype == torch.float16 else "ieee", "FAST": dtype != torch.float32 and not interpret}

    def of(table: configs_bwd.Table, **more: Any) -> Kind:
        config = candidates(table, gpu, shape_class)[0]
        return Kind({**shape, **config.constants, **math, **more}, config.launch_options())

    chain = of(configs_bwd.CHAIN)
    room = chain.constants.pop("RESIDENT") * sms
    return Recipe(
        wide=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        pack=Kind({**shape, "BH": min(32, shape_class[1]), "FAST": math["FAST"]}, {"num_warps": 4}),
        dread=of(configs_bwd.DREAD),
        dq=of(configs_bwd.DQ),
        chain=chain,
        carry=Kind({name: chain.constants[name] for name in (*shape, "BH", "FAST")}, {"num_warps": chain.options["num_warps"]}),
        last=of(configs_bwd.LAST, BR=min(shape_class[0], 32), BC=16, BS=chain.constants["BH"]),
        room=room,
        owned=of(configs_bwd.OWNED) if (gpu, shape_class) in configs_bwd.OWNED and not interpret else None,
    )


def workspace_bytes(sequences: int, slots: int, heads: int, d: int, h: int, operand: int, BH: int, SP: int = 8) -> int:
    """What the backward takes at most beside inputs, saved tensors and gradients; `operand`: 2 bytes for bfloat16, else 4.

    For each slot and head dread in fp32 and six matrices of operands, 24 d h bytes with bfloat16. Beside it dX, dM and dN of each sequence
    and head, and what its SP programs for each BH hidden units exchange.
    """
    R, X = slots * heads, sequences * heads
    return 6 * operand * R * d * h + 4 * scratch_size(R, X, d, h, BH, -(-h // BH) * SP)


def splits(slices: int, room: int) -> int:
    """In how many parts a chunk's tokens are split, so that `slices` of all heads fill `room` programs: a power of two, at most 8."""
    parts = 1
    while 2 * parts * slices <= room and parts < 8:
        parts *= 2
    return parts


def ttt_mlp_triton_backward(
    do: Tensor,
    d_end: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    weights: Sequence[Tensor],
    state: State | None,
    cu_seqlens: Tensor | None,
    saved: Outputs,
    options: Options,
    keep: bool,
    persistent: bool | None = None,
) -> Gradients:
    """The backward of `ttt_mlp_triton_forward`.

    Args:
        do: gradient of o.
        d_end: gradients of the final state's w_gate, w_up, w_down, m_gate, m_up, m_down, each perhaps None.
        saved: what the forward returned; of it `n` and what follows is read.
        persistent: whether the chain is one launch of programs that meet at barriers, or two or three launches a chunk, with the same
            result; None: where all the programs of a head can be resident, and for short chunks the chain of bwd_owned.py.
        others: as the forward took them.
    """
    chunk_size, norm, residual, grad_clip, eps = options
    _, tokens, H, d = q.shape
    h = weights[0].shape[1]
    kept = tuple(x if x is not None and x.numel() else None for x in saved[11:])  # the operator has tensors without elements
    m_state, count = ((None,) * 3, None) if state is None else (state[3:6], state.count)
    inputs = do, q, k, v, eta, mu, *weights, cu_seqlens, *m_state, count, *kept
    END = any(g is not None for g in d_end)
    key = None
    if not END and persistent is None:
        key = "backward", *layout(*inputs), options, keep
        done = replay(key, inputs)
        if done is not None:
            return Gradients(*done[:8], None if state is None else tuple(done[8:]))
    spans = spans_of(q, cu_seqlens, chunk_size, state is not None, keep)
    N = spans.sequences
    new = weights[0].new_empty
    weights = [w.contiguous() for w in weights]
    of_state = None if state is None else tuple(new(N, *w.shape) for w in (*weights, *weights))
    out = Gradients(*(x.new_empty(x.shape) for x in (q, k, v, eta, mu, *weights)), of_state)
    if N * H == 0:
        for x in out[5:8]:
            x.zero_()
        return out

    # Fixed for the call: sizes, spans, and the two buffers that everything else lies in.
    device = q.device
    interpret = interpreted(device)
    r = recipe(gpu_class(device), sm_count(device), interpret, d, h, q.dtype)
    R, X = spans.slots * H, N * H
    owned = r.owned if grad_clip is None and persistent is None and chunk_size <= OWNED_TOKENS else None
    if owned is not None and X * -(-h // owned.constants["BH"]) > sm_count(device):
        owned = None
    BH = (owned or r.chain).constants["BH"]
    slices = -(-h // BH)
    SP = 1 if owned is not None else splits(X * slices, r.room)
    parts = slices * SP
    operands = new(6 * R * d * h, dtype=r.wide)
    scratch = new(scratch_size(R, X, d, h, BH, parts))
    m_state = [None if x is None else x.contiguous() for x in m_state]
    steps = spans.slots if spans.packed else spans.steps
    span, sizes = (cu_seqlens, count), (tokens, chunk_size, H, steps)
    n, x, size, m, mu_mean, g_size, first, slots = kept
    momentum = x, m, size, n, *m_state
    CLIP, SAVE_M = grad_clip is not None, m is not None
    case = {"STATE": spans.carried, "PACKED": spans.packed}
    if END:
        _set_ends(scratch, d_end, R, N, H, d, h)
    others = cu_seqlens, count, chunk_size, grad_clip, mu_mean, g_size, slots, first
    call = Call(traits(do, q, k, v, eta, mu, *weights, *momentum, *others), inputs)
    results = *out[:8], *(of_state or ())
    for tensor in (*results, operands, scratch):
        call.keep(tensor)

    # the reads
    same = norm != "pre_write"
    q_strides, o_strides = q.stride(), do.stride()
    columns = -(-h // r.pack.constants["BH"])
    run(
        bwd_read.ttt_mlp_bwd_pack_kernel, call, device, R * columns, [x, size, n, slots, operands, scratch, R, H, steps, eps],
        {**r.pack.constants, "NORM": NORM[norm], "PACKED": spans.packed}, r.pack.options,
    )  # fmt: skip
    columns = -(-h // r.dread.constants["BH"])
    run(
        bwd_read.ttt_mlp_bwd_dread_kernel, call, device, columns * R,
        [q, do, *span, slots, operands, scratch, R, X, *sizes, *q_strides, *o_strides],
        {**r.dread.constants, **case, "SAME": same}, r.dread.options,
    )  # fmt: skip
    tiles = _tiles(chunk_size, tokens, r.dq)
    run(
        bwd_read.ttt_mlp_bwd_dq_kernel, call, device, R * tiles,
        [q, do, out.q, *span, slots, operands, R, *sizes, tiles, *q_strides, *o_strides],
        {**r.dq.constants, **case, "SAME": same, "RESIDUAL": residual}, r.dq.options,
    )  # fmt: skip

    # the reverse chain
    strides = *k.stride(), *v.stride(), *eta.stride()
    case |= {"KEEP": keep, "NORM": NORM[norm], "SP": SP, "END": END, "CLIP": CLIP, "SAVE_M": SAVE_M}
    stays = persistent if persistent is not None else not interpret and parts <= r.room
    if owned is not None:
        run(
            bwd_owned.ttt_mlp_bwd_owned_kernel, call, device, X * parts,
            [k, v, eta, *span, first, x, size, n, mu_mean, operands, scratch, R, X, *sizes, eps, *strides],
            {**owned.constants, **case}, {**owned.options, "launch_cooperative_grid": True},
        )  # fmt: skip
    elif stays:
        groups = min(X, r.room // parts, GROUPS.value)
        run(
            bwd_persistent.ttt_mlp_bwd_chain_kernel, call, device, groups * parts,
            [
                k, v, eta, *span, first, *momentum, mu_mean, g_size, operands, scratch,
                R, X, *sizes, eps, grad_clip, *strides,
            ],
            {**r.chain.constants, **case}, {**r.chain.options, "launch_cooperative_grid": True},
        )  # fmt: skip
    else:
        call.note(None, 0, ())  # launches of their own, not to be done again
        _chain_by_steps(
            r, case, (X, slices, SP), spans.steps, (k, v, eta), span, first, momentum, mu_mean, g_size, operands, scratch, R, sizes, eps,
            grad_clip, strides,
        )  # fmt: skip

    # what follows from it
    tiles = _tiles(chunk_size, tokens, r.last)
    ends = H * -(-d // r.last.constants["BR"]) * -(-h // r.last.constants["BC"])
    run(
        bwd_last.ttt_mlp_bwd_last_kernel, call, device, R + ends + R * tiles,
        [
            k, v, eta, *out[1:5], *span, slots, *momentum, *weights, *out[5:8], *(of_state or (None,) * 6), operands, scratch,
            R, N, *sizes, tiles, eps, *strides,
        ],
        {**r.last.constants, **case, "PARTS": parts, "BS": BH}, r.last.options,
    )  # fmt: skip
    if key is not None:
        call.file(key, results)
    return out


def _chain_by_steps(
    r: Recipe, case: dict[str, Any], grid: tuple[int, int, int], most: int, tensors: Sequence[Tensor], span: Sequence[Tensor | None],
    first: Tensor | None, momentum: Sequence[Tensor | None], mu_mean: Tensor, g_size: Tensor | None, operands: Tensor,
    scratch: Tensor, R: int, sizes: Sequence[int], eps: float, grad_clip: float | None, strides: Sequence[int],
) -> None:  # fmt: skip
    """The reverse chain as two launches a step, three with a clip."""
    X, (tokens, chunk_size, H, steps) = grid[0], sizes

    def named(kernel: Any, kind: Kind) -> dict[str, Any]:
        return {n: x for n, x in {**kind.constants, **case}.items() if n in kernel.arg_names} | kind.options

    slab, carry, clip = bwd_chain.ttt_mlp_bwd_slab_kernel, bwd_chain.ttt_mlp_bwd_carry_kernel, bwd_chain.ttt_mlp_bwd_clip_kernel
    of_slab, of_carry, of_clip = named(slab, r.chain), named(carry, r.carry), named(clip, r.carry)
    for i_step in range(most):
        at = R, X, tokens, chunk_size, i_step, H, steps
        slab[grid](*tensors, *span, first, momentum[0], operands, scratch, *at, *strides, **of_slab)
        carry[grid](*span, first, *momentum, mu_mean, operands, scratch, *at, eps, **of_carry)
        if case["CLIP"]:
            clip[grid](*span, first, *momentum, mu_mean, g_size, operands, scratch, *at, eps, grad_clip, **of_clip)


def _tiles(chunk_size: int, tokens: int, kind: Kind) -> int:
    """Tiles of a chunk."""
    return max(-(-min(chunk_size, tokens) // kind.constants["BT"]), 1)


def _set_ends(scratch: Tensor, d_end: Sequence[Tensor | None], R: int, N: int, H: int, d: int, h: int) -> None:
    """The final state's gradients into dX and dM, zeros for what has none."""
    at = GROUPS.value * 32 + R * 3 * d * h
    carried = scratch[at : at + 2 * N * H * 3 * d * h].view(2, N, H, 3, d, h)
    for i, x in enumerate(d_end):
        into = carried[i // 3, :, :, i % 3]
        if x is None:
            into.zero_()
        else:
            into.copy_(x if i % 3 == 2 else x.mT)
