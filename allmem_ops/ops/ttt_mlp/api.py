"""The public functions `ttt_mlp` and `ttt_mlp_step`."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops._impl import resolve_impl
from allmem_ops._validation import (
    MATMUL_DTYPES,
    check_bool,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_shape,
    fail,
    short,
)
from allmem_ops.ops.eager import direct
from allmem_ops.ops.precision import accumulator_dtype, ieee_float32
from allmem_ops.ops.ttt_mlp.layout import side_by_side
from allmem_ops.ops.ttt_mlp.reference import Carry, Options, row_norms, ttt_mlp_reference
from allmem_ops.ops.ttt_mlp.registration import run_triton, ttt_mlp_chunk, ttt_mlp_step_chunk, ttt_mlp_step_triton
from allmem_ops.ops.ttt_mlp.slots import covers
from allmem_ops.ops.ttt_mlp.state import MemoryState, check_options, check_weights
from allmem_ops.ops.ttt_mlp.step import MAX_STEP_TOKENS, step_reference
from allmem_ops.ops.ttt_mlp.tail import empty_tail, fold_


class TTTMLPOutput(NamedTuple):
    """What `ttt_mlp` returns."""

    o: Tensor
    state: MemoryState | None


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    eta: Tensor,
    mu: Tensor,
    *,
    chunk_size: int = 2048,
    norm: str = "pre_write",
    residual: bool = True,
    grad_clip: float | None = None,
    eps: float = 1e-5,
    initial_state: MemoryState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> TTTMLPOutput:
    """A SwiGLU network whose weights are trained while it reads: the memory of AllMem (arXiv 2602.13680).

        f(W, x) = x + (silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T                        for each head
        for each chunk of `chunk_size` tokens, with W, M from the chunk before (at first the weights and 0):
            o  = f(W, q)                                                                    read
            Wn = W * N / (|W| + eps)                  by row; N: row norms of the weights   normalise
            G  = sum_t eta_t * d(-<f(Wn, k_t), v_t>) / dWn                                  write
            M  = mean_t(mu_t) * M - clip(G)
            W  = Wn + M

    A last chunk of fewer than `chunk_size` tokens is read and not written; what it would write is carried in the state,
    so a sequence can be continued at any token and gives what one pass would have given.

    Matrix operands have q's dtype, sums, weights, momentum and gradient sums are fp32 (float64 with float64 inputs;
    float32 never means tf32; operands that carry a rate or a gradient are fp32 where q is float16). The memory's part
    and the residual are added in fp32 before the one rounding to q's dtype. Gradients reach `q`, `k`, `v`, `eta`, `mu`,
    the three weights (with their part in N) and the weights and momentum of `initial_state`, from `o` and from the
    final state's weights and momentum. None crosses the sums of an open chunk: to get the gradients of one pass, cut
    at a chunk's edge.

    Args:
        q, k, v: [B, T, H, d], bfloat16, float16, float32 or float64, any strides.
        w_gate, w_up: [H, h, d], float32 (float64 with float64 `q`): initial weights.
        w_down: [H, d, h], as `w_gate`.
        eta: [B, T, H, 3], dtype of the weights: each token's rates for gate, up, down. No gradient scale is hidden
            in it: G is a sum over the chunk.
        mu: [B, T, H], dtype of the weights: each token's momentum factor.
        chunk_size: tokens between two writes, counted from the start of each sequence. A run-time value.
        norm: where the rows are normalised. "pre_write": as above (AllMem); "post_write": W = N * U / (|U| + eps) with
            U = W + M, and the gradient at W (LaCT); "none": nowhere.
        residual: whether f adds its input.
        grad_clip: None, or a threshold: G of each matrix and head becomes G * min(1, grad_clip / |G|), Frobenius norm
            of the whole chunk's G.
        eps: added to the row norms, outside the root.
        initial_state: None, or a state with the options of this call: its weights and momentum replace the initial
            ones and its open chunk goes on. N still comes from the weight arguments. Not changed.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: None, or int32 or int64 [N+1]: B = 1 and sequence n holds the tokens cu_seqlens[n] to
            cu_seqlens[n+1]. Chunks restart at each; row n of the states belongs to sequence n. Empty ones are legal.
        impl: "reference" (the definition), "chunk" (batched matrix products and a hand-written backward; the host reads
            `cu_seqlens` and the state's `count` once per call), "triton" (kernels: bfloat16, float16, float32, d and h multiples
            of 16 up to 128 and 512; the host reads nothing) or "auto": "triton" for CUDA tensors that it covers, else "chunk".

    Returns:
        TTTMLPOutput: `o` [B, T, H, d] in q's dtype and `state`, a `MemoryState` of B or N rows, or None.

    Raises:
        ValueError: an argument of another type, shape, dtype, device or range than said here.

    Examples:
        >>> H, d, h, T = 2, 8, 16, 10
        >>> q, k, v = torch.randn(3, 1, T, H, d).unbind()
        >>> weights = torch.randn(H, h, d), torch.randn(H, h, d), torch.randn(H, d, h)
        >>> eta, mu = torch.full((1, T, H, 3), 0.01), torch.full((1, T, H), 0.9)
        >>> o = ttt_mlp(q, k, v, *weights, eta, mu, chunk_size=4).o

        Continued at any token:

        >>> head = ttt_mlp(q[:, :7], k[:, :7], v[:, :7], *weights, eta[:, :7], mu[:, :7], chunk_size=4, output_final_state=True)
        >>> tail = ttt_mlp(q[:, 7:], k[:, 7:], v[:, 7:], *weights, eta[:, 7:], mu[:, 7:], chunk_size=4, initial_state=head.state)
        >>> torch.allclose(torch.cat([head.o, tail.o], 1), o, atol=1e-5)
        True

        Packed, two sequences of 6 and 4 tokens, and the second one alone:

        >>> packed = ttt_mlp(q, k, v, *weights, eta, mu, chunk_size=4, cu_seqlens=torch.tensor([0, 6, 10])).o
        >>> alone = ttt_mlp(q[:, 6:], k[:, 6:], v[:, 6:], *weights, eta[:, 6:], mu[:, 6:], chunk_size=4).o
        >>> torch.allclose(packed[:, 6:], alone, atol=1e-5)
        True
    """
    check_options(chunk_size, norm, residual, grad_clip, eps)
    check_bool("output_final_state", output_final_state)
    known = _check_inputs(q, k, v, w_gate, w_up, w_down, eta, mu)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q)
        sequences = cu_seqlens.shape[0] - 1
    options = Options(chunk_size, norm, residual, grad_clip, eps)
    if initial_state is not None:
        _check_initial_state(initial_state, q, sequences, known, options)
    impl = _resolve("ttt_mlp", impl, q, known["h"])
    if initial_state is not None:
        initial_state = initial_state.folded("triton" if impl == "triton" else "chunk")

    weights = (w_gate, w_up, w_down)
    if impl == "triton":
        o, end = _triton(q, k, v, eta, mu, weights, initial_state, cu_seqlens, options, output_final_state)
    else:
        norms = tuple(map(row_norms, weights))
        arguments = q, k, v, eta, mu, weights, norms, initial_state, sequences, cu_seqlens, options
        o, end = _chunk(*arguments, output_final_state) if impl == "chunk" else _reference(*arguments)
    if not output_final_state:
        return TTTMLPOutput(o, None)
    lengths = q.shape[1] if cu_seqlens is None else cu_seqlens.diff().to(torch.int64)
    zero = torch.zeros(sequences, dtype=torch.int64, device=q.device)
    held, position = (zero, zero) if initial_state is None else (initial_state.count, initial_state.position)
    state = MemoryState(
        *end.w,
        *end.m,
        *(n.detach().expand(sequences, -1, -1).clone() for n in end.n),
        *end.g,
        end.mu_sum,
        *empty_tail(sequences, known["H"], known["d"], q.dtype, w_gate.detach()),
        count=(held + lengths) % chunk_size,
        position=position + lengths,
        initial_gate=w_gate.detach(),
        initial_up=w_up.detach(),
        initial_down=w_down.detach(),
        **options._asdict(),
        dtype=short(q.dtype),
    )
    return TTTMLPOutput(o, state)


def ttt_mlp_step(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, state: MemoryState, *, active: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Read and write 1 to 256 tokens, changing `state` in place: decoding.

        o = f(W, q);   G += sum_t eta_t * d(-<f(Wn, k_t), v_t>) / dWn;   a full chunk is committed to W and M

    Row n goes on at its own position, and a token that completes a chunk still reads the weights from before. What comes
    out, and the state, is what `ttt_mlp` gives over all tokens at once. No autograd, no host synchronisation: every row
    runs the same tensor operations, predicated on the state's counters.

    Args:
        q, k, v: [B, T, H, d], T from 1 to 256, in the state's `dtype`.
        eta: [B, T, H, 3], fp32 (float64 with float64 `q`).
        mu: [B, T, H], as `eta`.
        state: a `MemoryState` of B rows.
        active: None, or bool [B]: a row that is not active keeps its state bit for bit and its output is 0.
        impl: "reference" (token by token), "chunk" (one masked segment for each chunk that the tokens may touch), "triton" (two
            kernels; d and h as for `ttt_mlp`, a contiguous state, whose newest tokens may wait in its tail) or "auto": "triton"
            on CUDA for what the kernels take, else "chunk".

    Returns:
        o [B, T, H, d] in q's dtype.

    Raises:
        ValueError: an argument of another type, shape, dtype, device or range than said here.

    Examples:
        >>> H, d, h = 2, 8, 16
        >>> weights = torch.randn(H, h, d), torch.randn(H, h, d), torch.randn(H, d, h)
        >>> q, k, v = torch.randn(3, 1, 6, H, d).unbind()
        >>> eta, mu = torch.full((1, 6, H, 3), 0.01), torch.full((1, 6, H), 0.9)
        >>> state = MemoryState.initial(*weights, batch=1, chunk_size=4)
        >>> steps = [ttt_mlp_step(*x, state) for x in zip(*(x.split(1, dim=1) for x in (q, k, v, eta, mu)))]
        >>> torch.allclose(torch.cat(steps, 1), ttt_mlp(q, k, v, *weights, eta, mu, chunk_size=4).o, atol=1e-5)
        True
        >>> state.position.tolist(), state.count.tolist()
        ([6], [2])
    """
    known = _check_tokens(q, k, v, eta, mu)
    if not 1 <= q.shape[1] <= MAX_STEP_TOKENS:
        fail("q", f"must have 1 to {MAX_STEP_TOKENS} tokens", q.shape[1])
    _check_state("state", state, q, q.shape[0], known)
    if active is not None:
        check_shape("active", active, "B", known)
        check_dtype("active", active, torch.bool)
        check_device("active", active, q.device)
    impl = _resolve("ttt_mlp_step", impl, q, state.w_gate.shape[2])
    carry = state.carry()
    options = Options(state.chunk_size, state.norm, state.residual, state.grad_clip, state.eps)
    with torch.no_grad():
        if impl == "reference":
            with ieee_float32():
                fold_(carry, state.held_back(), active, options)
                o = step_reference(q, k, v, eta, mu, carry, state.position, active, options)
                state.refresh()
                return o
        changed = [*carry.w, *carry.m, *carry.g, carry.mu_sum, carry.count, state.position, *state.held_back()]
        if impl == "triton":
            return ttt_mlp_step_triton(q, k, v, eta, mu, [*changed, *state.rounded], list(carry.n), active, *options)
        o = ttt_mlp_step_chunk(q, k, v, eta, mu, changed, list(carry.n), active, *options)
        state.refresh()
        return o


def _resolve(op: str, impl: str, q: Tensor, h: int) -> str:
    """The implementation, where the kernels' limits on d and h count too."""
    chosen = resolve_impl(op, impl, q)
    if chosen == "triton" and not covers(q.shape[-1], h):
        if impl == "triton":
            expected = "must have d and h that the kernels take (multiples of 16, d up to 128, h up to 512)"
            fail("q", expected, (q.shape[-1], h), "Use 'chunk'")
        return "chunk"
    return chosen


# Shapes, dtypes and devices of inputs that have passed. To check them takes 25 us of host time, to look them up 3.
_passed: set[Hashable] = set()


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, eta: Tensor, mu: Tensor
) -> dict[str, int]:  # fmt: skip
    """The sizes B, T, H, d and h."""
    found = None
    inputs = q, k, v, w_gate, w_up, w_down, eta, mu
    if direct(*inputs):
        found = tuple([y for x in inputs for y in (x.shape, x.dtype, x.device)])
        if found in _passed:
            return {**dict(zip("BTHd", q.shape, strict=True)), "h": w_gate.shape[1]}
    known = _check_tokens(q, k, v, eta, mu)
    check_weights(w_gate, w_up, w_down, known)
    check_dtype("w_gate", w_gate, accumulator_dtype(q.dtype), f"with `q` in {short(q.dtype)}")
    check_device("w_gate", w_gate, q.device)
    if found is not None:
        if len(_passed) >= 1024:
            _passed.clear()
        _passed.add(found)
    return known


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor) -> dict[str, int]:
    known: dict[str, int] = {}
    check_shape("q", q, "B T H d", known)
    check_dtype("q", q, MATMUL_DTYPES)
    for name, x in (("k", k), ("v", v)):
        check_shape(name, x, "B T H d", known)
        check_dtype(name, x, q.dtype, "the dtype of `q`")
        check_device(name, x, q.device)
    for name, x, dims in (("eta", eta, "B T H 3"), ("mu", mu, "B T H")):
        check_shape(name, x, dims, known)
        check_dtype(name, x, accumulator_dtype(q.dtype), f"with `q` in {short(q.dtype)}")
        check_device(name, x, q.device)
    return known


def _check_state(name: str, state: object, q: Tensor, sequences: int, known: dict[str, int]) -> None:
    if not isinstance(state, MemoryState):
        fail(name, "must be a MemoryState", type(state).__name__)
    state.check()
    sizes = {"N": sequences, "h": known.get("h", state.w_gate.shape[2]), "H": known["H"], "d": known["d"]}
    check_shape(f"{name}.w_gate", state.w_gate, "N H h d", sizes)
    check_device(f"{name}.w_gate", state.w_gate, q.device)
    if state.dtype != short(q.dtype):
        fail(f"{name}.dtype", f"must be {short(q.dtype)}, the dtype of `q`", state.dtype)


def _check_initial_state(state: MemoryState, q: Tensor, sequences: int, known: dict[str, int], options: Options) -> None:
    _check_state("initial_state", state, q, sequences, known)
    for name, value in options._asdict().items():
        if getattr(state, name) != value:
            fail(f"initial_state.{name}", f"must be {value!r}, the `{name}` of the call", repr(getattr(state, name)))


_Three = tuple[Tensor, Tensor, Tensor]


def _reference(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, weights: _Three, norms: _Three, state: MemoryState | None,
    sequences: int, cu_seqlens: Tensor | None, options: Options,
) -> tuple[Tensor, Carry]:  # fmt: skip
    w = tuple(x.expand(sequences, -1, -1, -1) for x in weights)
    zeros = tuple(map(torch.zeros_like, w))
    start = Carry(w, zeros, norms, zeros, w[0].new_zeros(w[0].shape[:2]), torch.zeros(sequences, dtype=torch.int64))
    if state is not None:
        start = state.carry()
    start = start._replace(n=tuple(x.expand(sequences, -1, -1) for x in norms))
    with ieee_float32():
        return ttt_mlp_reference(q, k, v, eta, mu, start, cu_seqlens, options)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, weights: _Three, norms: _Three, state: MemoryState | None,
    sequences: int, cu_seqlens: Tensor | None, options: Options, output_final_state: bool,
) -> tuple[Tensor, Carry | None]:  # fmt: skip
    heads, h, d = weights[0].shape
    if state is None:
        w = _flat(weights).expand(sequences, -1, -1)
        m = w.new_zeros(1, 1, 1).expand(w.shape)
        held = None, None, None
    else:
        w, m = _flat((state.w_gate, state.w_up, state.w_down)), _flat((state.m_gate, state.m_up, state.m_down))
        held = _flat((state.g_gate, state.g_up, state.g_down)), state.mu_sum, state.count
    sizes = side_by_side(q.shape[0], heads, h, d, options.chunk_size, q.device.type)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, eta, mu, w, m, norms[0], norms[1], norms[2]))
    o, w_end, m_end, g_end, mu_end, *_ = ttt_mlp_chunk(
        q, k, v, eta, mu, w, m, torch.cat(norms, -1), *held, cu_seqlens, *options, *sizes, output_final_state, save
    )
    if not output_final_state:
        return o, None
    return o, Carry(*(_three(x, h, d) for x in (w_end, m_end)), norms, _three(g_end, h, d), mu_end, None)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, weights: _Three, state: MemoryState | None,
    cu_seqlens: Tensor | None, options: Options, output_final_state: bool,
) -> tuple[Tensor, Carry | None]:  # fmt: skip
    _, h, d = weights[0].shape
    held = [None] * 11
    if state is not None:
        learnt = state.w_gate, state.w_up, state.w_down, state.m_gate, state.m_up, state.m_down
        held = [*learnt, state.g_gate, state.g_up, state.g_down, state.mu_sum, state.count]
    out = run_triton(q, k, v, eta, mu, weights, held, cu_seqlens, options, output_final_state)
    if not output_final_state:
        return out.o, None
    norms = out.n.split([h, h, d], -1)
    return out.o, Carry(out[1:4], out[4:7], norms, out[7:10], out.mu_sum, None)


def _flat(three: _Three) -> Tensor:
    """gate, up, down [..., H, rows, columns] as [..., H, 3hd]."""
    return torch.cat([x.flatten(-2) for x in three], -1)


def _three(flat: Tensor, h: int, d: int) -> _Three:
    """[N, H, 3hd] as gate, up, down with storage of their own, so that steps may change them in place."""
    gate, up, down = flat.chunk(3, -1)
    return gate.unflatten(-1, (h, d)).clone(), up.unflatten(-1, (h, d)).clone(), down.unflatten(-1, (d, h)).clone()
