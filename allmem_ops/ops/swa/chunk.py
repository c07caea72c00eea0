"""`swa` in blocks of queries: each reads one band of keys and the sinks, O(T * (window + sinks)) time.

Query heads that share a key/value head are folded into the rows of one matrix, so keys and values are never repeated:
x [B, T, H, D] -> [B*HK, T*G, D], G = H / HK, row t*G + g. Scores, softmax and sums are fp32 (float64 for float64); the
probabilities and their gradients are rounded to q's dtype where they become matrix operands.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from allmem_ops._validation import fail
from allmem_ops.ops.precision import accumulator_dtype, ieee_float32, matmul
from allmem_ops.ops.swa.geometry import Block, query_blocks


def block_size(device: torch.device) -> int:
    """Queries a block.

    CPU: of 32 to 256, 64 is fastest or within noise of it at windows 32 to 2048 (9 query heads of 64, float32, two AVX2
    cores): a block's scores stay near the cache and little is computed outside the band. CUDA: larger, since a launch
    costs more than the few products outside the band. H100, bf16, B=4, T=4096, 9/3 heads of 64, window 512, 64 sinks,
    forward + backward in a CUDA graph: 14.1, 9.6, 8.0, 10.2 ms at blocks of 64, 128, 256, 512.
    """
    return 256 if device.type == "cuda" else 64


def _fold(x: Tensor, heads_kv: int) -> Tensor:
    """[B, T, HK*G, D] -> [B*HK, T*G, D]; a view where the strides allow one."""
    B, T, H, D = x.shape
    return x.reshape(B, T, heads_kv, H // heads_kv, D).transpose(1, 2).reshape(B * heads_kv, T * (H // heads_kv), D)


def _unfold(x: Tensor, heads_kv: int, group: int) -> Tensor:
    """[B*HK, T*G, D] -> [B, T, HK*G, D]."""
    BH, TG, D = x.shape
    return x.reshape(BH // heads_kv, heads_kv, TG // group, group, D).transpose(1, 2).flatten(2, 3)


def _sequences(cu_seqlens: Tensor | None, Tq: int, Tk: int) -> list[tuple[slice, slice]]:
    """Query and key range of each sequence that has tokens."""
    if cu_seqlens is None:
        return [(slice(0, Tq), slice(0, Tk))] if Tq else []
    # One host read a call: the loop over blocks needs the lengths in Python.
    offsets = cu_seqlens.tolist()
    pairs = list(pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] != Tq or any(a > b for a, b in pairs):
        fail("cu_seqlens", f"must rise from 0 to T={Tq} without decreasing", offsets)
    return [(slice(a, b), slice(a, b)) for a, b in pairs if a < b]


class _Triangles:
    """The masks of every block are column ranges of two triangles over a block's rows."""

    def __init__(self, size: int, group: int, device: torch.device) -> None:
        row = torch.arange(size, device=device)
        self.after = row > row[:, None]  # key index > query index
        self.upto = ~self.after
        self.group = group

    def hide(self, scores: Tensor, triangle: Tensor, start: int) -> None:
        """Hide the pairs of `scores` [B*HK, n*G, cols], whose first column is column `start` of `triangle`."""
        n, cols = scores.shape[1] // self.group, scores.shape[2]
        scores.unflatten(1, (n, self.group)).masked_fill_(triangle[:n, None, start : start + cols], float("-inf"))


def _scores(q: Tensor, q_far: Tensor, k: Tensor, blk: Block, window: int, masks: _Triangles) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """The unscaled scores of a block, hidden pairs -inf: (queries, scores, key range) of the band, then of the sinks."""
    i0, i1, b0, s1 = blk
    scores = matmul(q, k[:, b0:i1].mT)
    masks.hide(scores[:, :, i0 - b0 :], masks.after, 0)  # the future: j > i
    if i1 - window > b0:
        masks.hide(scores[:, :, : i1 - window - b0], masks.upto, b0 + window - i0)  # left behind: j + window <= i
    yield q, scores, slice(b0, i1)
    if s1:
        scores = matmul(q_far, k[:, :s1].mT)
        c0 = max(i0 - window + 1, 0)
        if c0 < s1:
            masks.hide(scores[:, :, c0:], masks.after, c0 + window - i0)  # still in the window: j + window > i
        yield q_far, scores, slice(0, s1)


def swa_chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    with ieee_float32():
        for sq, sk in _sequences(cu_seqlens, q.shape[1], k.shape[1]):
            qs = None if q_sinks is None else q_sinks[:, sq]
            _forward_sequence(q[:, sq], k[:, sk], v[:, sk], qs, window, sinks, scale, o[:, sq], lse[:, sq])
    return o, lse


def _forward_sequence(
    q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, window: int, sinks: int, scale: float, o: Tensor, lse: Tensor
) -> None:
    (Tq, HQ), (Tk, HK), dtype = q.shape[1:3], k.shape[1:3], q.dtype
    G, start, size = HQ // HK, Tk - Tq, block_size(q.device)
    q, k, v = _fold(q, HK), _fold(k, HK), _fold(v, HK)
    q_far = q if q_sinks is None else _fold(q_sinks, HK)
    masks = _Triangles(min(size, Tq), G, q.device)
    for blk in query_blocks(Tq, Tk, window, sinks, size):
        tokens = slice(blk.i0 - start, blk.i1 - start)
        rows = slice(tokens.start * G, tokens.stop * G)
        parts = list(_scores(q[:, rows], q_far[:, rows], k, blk, window, masks))
        top = parts[0][1].amax(-1, keepdim=True)
        for _, scores, _ in parts[1:]:
            top = torch.maximum(top, scores.amax(-1, keepdim=True))
        top *= scale
        total, out = 0, 0
        for _, scores, keys in parts:
            p = torch.add(-top, scores, alpha=scale, out=scores).exp_()
            total = total + p.sum(-1, keepdim=True)
            out = out + matmul(p.to(dtype), v[:, keys])
        o[:, tokens] = _unfold(out / total, HK, G)
        lse[:, tokens] = _unfold(top + total.log(), HK, G).squeeze(-1)


def swa_chunk_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dq_sinks (of size 0 without `q_sinks`), in q's dtype, from the recomputed probabilities."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dq_sinks = q.new_empty(0) if q_sinks is None else torch.empty_like(dq)
    acc = accumulator_dtype(q.dtype)
    with ieee_float32():
        # d score = p * (dp - <do, o> + dlse), p the probability and dp its gradient through o.
        delta = (do.to(acc) * o.to(acc)).sum(-1) - dlse
        for sq, sk in _sequences(cu_seqlens, q.shape[1], k.shape[1]):
            qs, dqs = (None, None) if q_sinks is None else (q_sinks[:, sq], dq_sinks[:, sq])
            rows = (do[:, sq], delta[:, sq, :, None], lse[:, sq, :, None])
            _backward_sequence(*rows, q[:, sq], k[:, sk], v[:, sk], qs, window, sinks, scale, dq[:, sq], dk[:, sk], dv[:, sk], dqs)
    if not q.shape[1]:
        dk.zero_()
        dv.zero_()
    return dq, dk, dv, dq_sinks


def _backward_sequence(
    do: Tensor,
    delta: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sinks: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dq_sinks: Tensor | None,
) -> None:
    B, Tq, HQ, D = q.shape
    Tk, HK, dtype = k.shape[1], k.shape[2], q.dtype
    G, start, size = HQ // HK, Tk - Tq, block_size(q.device)
    do, delta, lse, q, k, v = (_fold(x, HK) for x in (do, delta, lse, q, k, v))
    q_far = q if q_sinks is None else _fold(q_sinks, HK)
    masks = _Triangles(min(size, Tq), G, q.device)
    sum_dk, sum_dv = (q.new_zeros(B * HK, Tk, D, dtype=accumulator_dtype(dtype)) for _ in range(2))
    for blk in query_blocks(Tq, Tk, window, sinks, size):
        tokens = slice(blk.i0 - start, blk.i1 - start)
        rows = slice(tokens.start * G, tokens.stop * G)
        grads = []
        for queries, scores, keys in _scores(q[:, rows], q_far[:, rows], k, blk, window, masks):
            p = torch.add(-lse[:, rows], scores, alpha=scale, out=scores).exp_()
            ds = matmul(do[:, rows], v[:, keys].mT).sub_(delta[:, rows]).mul_(p).to(dtype)
            sum_dv[:, keys] += matmul(p.to(dtype).mT, do[:, rows])
            sum_dk[:, keys] += matmul(ds.mT, queries)
            grads.append(matmul(ds, k[:, keys]))
        near, far = grads[0], grads[1] if len(grads) > 1 else None
        if dq_sinks is not None:
            dq_sinks[:, tokens] = 0 if far is None else _unfold(far * scale, HK, G)
        elif far is not None:
            near += far
        dq[:, tokens] = _unfold(near * scale, HK, G)
    dk.copy_(_unfold(sum_dk.mul_(scale), HK, 1))
    dv.copy_(_unfold(sum_dv, HK, 1))


def swa_step_attend(
    q: Tensor,
    q_sinks: Tensor | None,
    sink_k: Tensor,
    sink_v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """As `swa_step_reference`, the group of a key/value head as the rows of one product, without joining the buffers."""
    B, _, HQ, D = q.shape
    sinks, window, HK = sink_k.shape[1], ring_k.shape[1], ring_k.shape[2]
    i = position[:, None, None, None]
    slot = torch.arange(max(window, sinks), device=q.device)

    def scores(queries: Tensor, k: Tensor) -> Tensor:
        return matmul(queries.reshape(B, HK, HQ // HK, D), k.permute(0, 2, 3, 1))

    with ieee_float32():
        # The ring holds the last `window` tokens after the sinks: all of them lie in the window, slot by slot as they were written.
        parts = [(scores(q, ring_k).masked_fill(slot[:window] > i - sinks, float("-inf")), ring_v)]
        if sinks:
            near = scores(q, sink_k)
            if q_sinks is not None:
                near = torch.where(slot[:sinks] + window <= i, scores(q_sinks, sink_k), near)
            parts.append((near.masked_fill(slot[:sinks] > i, float("-inf")), sink_v))
        p = torch.cat([s for s, _ in parts], -1).mul_(scale).softmax(-1).to(q.dtype)
        outs = [matmul(x, v.transpose(1, 2)) for x, (_, v) in zip(p.split([v.shape[1] for _, v in parts], -1), parts, strict=True)]
    return sum(outs[1:], outs[0]).reshape(B, 1, HQ, D).to(q.dtype)
