"""Launches of the Triton backward of `ttt_mlp`, from what the forward has saved (launch.py).

    pack    W operands from X: what queries read, what chunks write from         parallel
    dread   the reads' part of dW, a slot at a time                              parallel
    dq      dQ                                                                   parallel
    chain   dX, dM, dN from the last slot to the first, each chunk's dD          serial over chunks
    tokens  dK, dV, deta, dmu from dD                                            parallel
    ends    dW_0 with its part in N, summed over the sequences                   parallel

Nothing of size [T, h]: `workspace_bytes`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops._config import settings
from allmem_ops._validation import short
from allmem_ops.ops.kernels.configs import Config, candidates
from allmem_ops.ops.kernels.device import gpu_class, interpreted, sm_count
from allmem_ops.ops.ttt_mlp import configs_bwd
from allmem_ops.ops.ttt_mlp.kernels import bwd_chain, bwd_ends, bwd_persistent, bwd_read, bwd_tokens
from allmem_ops.ops.ttt_mlp.launch import NORM, power_of_two
from allmem_ops.ops.ttt_mlp.reference import Options
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


def workspace_bytes(rows: int, slots: int, heads: int, d: int, h: int, operand: int, BH: int, SP: int = 8) -> int:
    """What the backward takes at most beside inputs, saved tensors and gradients; `operand`: 2 bytes for bfloat16, else 4.

    A slot and head: dread (fp32), the write point's gate and up, dD, the write point's down: 24 d h with bfloat16 (the reads' operands
    are gone by then). Beside it what SP programs for each BH hidden units of `rows` (sequence, head) exchange, dX, dM and dN.
    """
    parts = -(-h // BH) * SP
    of_slots = slots * heads * (12 * d * h + 6 * operand * d * h + 4 * parts)
    return of_slots + 4 * rows * (parts * (3 * d * BH + 2 * BH + 2 * d + 3) + 6 * d * h + 2 * h + d + 32)


def splits(slices: int, room: int) -> int:
    """In how many parts a chunk's tokens are split, so that `slices` of all heads fill `room` programs: a power of two, at most 8."""
    parts = 1
    while 2 * parts * slices <= room and parts < 8:
        parts *= 2
    return parts


def _carried(three: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """[N, H, 3, d, h] of gradients of gate, up [N, H, h, d] and down [N, H, d, h], each perhaps None; zeros for three of them."""
    out = torch.zeros_like(like)
    for i, x in enumerate(three):
        if x is not None:
            out[:, :, i].copy_(x if i == 2 else x.mT)
    return out


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
            result; None: where all the programs of a head can be resident.
        others: as the forward took them.
    """
    chunk_size, norm, residual, grad_clip, eps = options
    _, tokens, heads, d = q.shape
    h = weights[0].shape[1]
    spans = spans_of(q, cu_seqlens, chunk_size, state is not None, keep)
    sequences, S = spans.sequences, spans.slots
    rows = sequences * heads
    weights = [w.contiguous() for w in weights]
    new = weights[0].new_empty
    of_state = None if state is None else tuple(new(sequences, *w.shape) for w in (*weights, *weights))
    out = Gradients(*(x.new_empty(x.shape) for x in (q, k, v, eta, mu, *weights)), of_state)
    if rows == 0:
        for x in out[5:8]:
            x.zero_()
        return out
    count, m_state = (None, (None, None, None)) if state is None else (state.count, [x.contiguous() for x in state[3:6]])
    wide = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    precision = "tf32" if q.dtype == torch.float16 else "ieee"
    fast = q.dtype != torch.float32 and not settings().interpret
    BD = max(power_of_two(d), 16)
    shape_class = BD, max(power_of_two(h), 16), short(q.dtype)
    gpu = gpu_class(q.device)

    def config(table: dict) -> Config:
        return candidates(table, gpu, shape_class)[0]

    shape = {"D": d, "HID": h, "BD": BD}
    kind = {"STATE": spans.carried, "PACKED": spans.packed}
    dots = {"PREC": precision, "FAST": fast}
    steps = S if spans.packed else spans.steps
    span = cu_seqlens, count
    sizes = tokens, chunk_size, heads, steps
    x, size, n, slots = saved.x, saved.size, saved.n, saved.slots

    # the reads
    pre_write = norm == "pre_write"
    point_gate_up = new(S, heads, d, 2 * h, dtype=wide)
    read_gate_up = new(S, heads, d, 2 * h, dtype=wide) if pre_write else point_gate_up
    read_down = new(S, heads, d, h, dtype=wide)
    BH = min(32, shape_class[1])
    bwd_read.ttt_mlp_bwd_pack_kernel[(S * heads, -(-h // BH))](
        x, size, n, slots, read_gate_up, read_down, point_gate_up, heads, steps, eps,
        **shape, BH=BH, NORM=NORM[norm], PACKED=spans.packed, num_warps=4,
    )  # fmt: skip
    found = config(configs_bwd.DREAD)
    dread = new(S, heads, 3, d, h)
    bwd_read.ttt_mlp_bwd_dread_kernel[(S * heads, -(-h // found.constants["BH"]))](
        q, do, dread, *span, slots, read_gate_up, read_down, *sizes, *q.stride(), *do.stride(), **shape, **kind, **dots, **found.options()
    )
    found = config(configs_bwd.DQ)
    tiles = max(-(-min(chunk_size, tokens) // found.constants["BT"]), 1)
    grad_strides = out.q.stride()[:3]
    bwd_read.ttt_mlp_bwd_dq_kernel[(S * heads * tiles,)](
        q, do, out.q, *span, slots, read_gate_up, read_down, *sizes, tiles, *q.stride(), *do.stride(), *grad_strides,
        **shape, **kind, RESIDUAL=residual, **dots, **found.options(),
    )  # fmt: skip
    del read_gate_up, read_down

    # the reverse chain
    found = config(configs_bwd.CHAIN)
    constants = dict(found.constants)
    room = constants.pop("RESIDENT") * sm_count(q.device)
    BH = constants["BH"]
    slices = -(-h // BH)
    SP = splits(rows * slices, room)
    parts = slices * SP
    dx, dm = (_carried(three, new(sequences, heads, 3, d, h)) for three in (d_end[:3], d_end[3:]))
    dn = torch.zeros(sequences, heads, 2 * h + d, dtype=dx.dtype, device=dx.device)
    d_gate_up, down = (new(S, heads, d, 2 * h, dtype=wide) for _ in range(2))
    mu_parts, clip_parts = new(S, heads, parts), new(rows, parts, 3)
    slabs = new(rows, parts, d, 2 * BH), new(rows, parts, d, BH), new(rows, parts, 2, BH), new(rows, parts, 2, d)
    momentum = saved.m, size, n, *m_state
    first = saved.first
    SAVE_M, CLIP = saved.m is not None and saved.m.numel() > 0, grad_clip is not None
    chain = shape | kind | {"BH": BH, "SP": SP, "NORM": NORM[norm], "KEEP": keep}
    of_tokens = {"BT": constants["BT"], **dots, "num_warps": found.num_warps, "num_stages": found.num_stages}
    if persistent if persistent is not None else not interpreted(q.device) and parts <= room:
        groups = min(rows, room // parts)
        counters = torch.zeros(groups * 32, dtype=torch.int32, device=q.device)
        bwd_persistent.ttt_mlp_bwd_chain_kernel[(groups * parts,)](
            k, v, eta, *span, first, dx, dm, dn, dread, x, *momentum, saved.mu_mean, saved.g_size, point_gate_up, down, d_gate_up,
            mu_parts, clip_parts, *slabs, counters, rows, tokens, chunk_size, heads, steps, eps, grad_clip,
            *k.stride(), *v.stride(), *eta.stride(), **chain, CLIP=CLIP, SAVE_M=SAVE_M, **of_tokens, launch_cooperative_grid=True,
        )  # fmt: skip
    else:
        grid = rows, slices, SP
        for i_step in range(spans.steps):
            bwd_chain.ttt_mlp_bwd_slab_kernel[grid](
                k, v, eta, *span, first, dx, dread, x, point_gate_up, d_gate_up, down, *slabs, tokens, chunk_size, i_step, heads, steps,
                *k.stride(), *v.stride(), *eta.stride(), **chain, **of_tokens,
            )  # fmt: skip
            bwd_chain.ttt_mlp_bwd_carry_kernel[grid](
                *span, first, dx, dm, dn, dread, x, *momentum, saved.mu_mean, down, d_gate_up, mu_parts, clip_parts, *slabs,
                tokens, chunk_size, i_step, heads, steps, eps, **chain, CLIP=CLIP, SAVE_M=SAVE_M, num_warps=found.num_warps,
            )  # fmt: skip
            if CLIP:
                bwd_chain.ttt_mlp_bwd_clip_kernel[grid](
                    *span, first, dm, x, *momentum, saved.mu_mean, saved.g_size, down, d_gate_up, clip_parts,
                    tokens, chunk_size, i_step, heads, steps, eps, grad_clip, **chain, SAVE_M=SAVE_M, num_warps=found.num_warps,
                )  # fmt: skip

    # what follows from it
    found = config(configs_bwd.TOKENS)
    tiles = max(-(-min(chunk_size, tokens) // found.constants["BT"]), 1)
    bwd_tokens.ttt_mlp_bwd_tokens_kernel[(S * heads * tiles,)](
        k, v, eta, out.k, out.v, out.eta, out.mu, *span, slots, point_gate_up, d_gate_up, down, mu_parts, *sizes, tiles,
        *k.stride(), *v.stride(), *eta.stride(), *grad_strides, **shape, PARTS=parts, BP=max(power_of_two(parts), 2), **kind, KEEP=keep,
        **dots, **found.options(),
    )  # fmt: skip
    BR = min(BD, 32)
    bwd_ends.ttt_mlp_bwd_ends_kernel[(heads, -(-d // BR), -(-h // 16))](
        *weights, n, dx, dm, dn, *out[5:8], *(of_state or (None,) * 6), sequences, heads,
        D=d, HID=h, BD=BR, BH=16, STATE=spans.carried, num_warps=4,
    )  # fmt: skip
    return out
