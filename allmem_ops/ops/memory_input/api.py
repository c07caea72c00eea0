"""The public functions `memory_input` and `memory_input_step`."""

from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops._impl import resolve_impl
from allmem_ops._validation import (
    MATMUL_DTYPES,
    check_bool,
    check_choice,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_shape,
    check_tensor,
    fail,
)
from allmem_ops.ops.memory_input import registration
from allmem_ops.ops.memory_input.chunk import tail_after
from allmem_ops.ops.memory_input.reference import Inputs, Options, memory_input_reference
from allmem_ops.ops.memory_input.state import ConvTail
from allmem_ops.ops.precision import accumulator_dtype

STEP_TOKENS = 256  # of a call of `memory_input_step`, at most
_ONE_PROGRAM_TOKENS = 16  # up to here the step kernel walks through all tokens of a sequence in one program


class MemoryInput(NamedTuple):
    """What `memory_input` returns.

    Args:
        q, k, v: [B, T, H, d], in `projected`'s dtype.
        eta: [B, T, H, 3] in (0, inf), fp32 (float64 for float64): rates of w_gate, w_up, w_down.
        mu: [B, T, H] in (0, 1), likewise.
        gate: logits [B, T, G] in `projected`'s dtype; None without gate columns.
        state: what the next call goes on from, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    mu: Tensor
    gate: Tensor | None
    state: ConvTail | None


def memory_input(
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    *,
    heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    l2: bool = True,
    qk_activation: str = "silu",
    norm_eps: float = 1e-6,
    l2_eps: float = 1e-6,
    initial_state: ConvTail | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> MemoryInput:
    """From one projection of the hidden state to everything that the memory reads.

        q, k, v = SiLU(conv(projected[..., : 3*H*d]))      q, k: RMSNorm per head, then L2 norm per head
        eta, mu, gate = softplus(z_eta), sigmoid(z_mu), z_gate      z = projected[..., 3*H*d :] + head_bias

    conv is depth-wise and causal: y_t = sum_i conv_weight[:, i] * x_{t-K+1+i} within a sequence, zeros before its first token.

    Args:
        projected: [B, T, 3*H*d + 4*H + G]: H heads of d channels of q, then of k, then of v; 3*H logits of eta (three a head), H of mu,
            and G >= 0 of a gate. float16, bfloat16, float32 or float64, any strides.
        conv_weight: [3*H*d, K], K from 1 to 4; `conv_weight[:, K-1]` multiplies the current token. `projected`'s dtype or float32, as are:
        head_bias: [4*H + G].
        heads: H.
        q_norm, k_norm: weights [d] of the RMSNorms, both or neither; None: no RMSNorm.
        l2: whether q and k are divided by their L2 norm, after the RMSNorm.
        qk_activation: "silu" or "none", of q and k; v always has SiLU.
        norm_eps, l2_eps: added inside the root; l2_eps to the sum of squares.
        initial_state: where the N sequences stand (N = B, or the packed sequences); None: at their first token. No gradient crosses it.
        output_final_state: also return the state after the last token.
        cu_seqlens: [N+1] int32 or int64 offsets of packed sequences (B = 1), or None.
        impl: `"reference"`, `"chunk"` (plain PyTorch), `"triton"` (not float64; d up to 1024) or `"auto"`: `"triton"` on CUDA for what
            the kernels take, else `"chunk"`. "chunk" and "triton" are library operators whose backward starts from the inputs.

    Returns:
        `MemoryInput(q, k, v, eta, mu, gate, state)`. All arithmetic is float32 (float64 for float64) and rounded once. `projected`,
        `conv_weight`, `head_bias`, `q_norm` and `k_norm` get gradients in their own dtype; sums over tokens are float32.

    Raises:
        ValueError: an argument of another shape, dtype, device or range than stated.

    Examples:
        >>> import torch
        >>> from allmem_ops import memory_input
        >>> H, d = 2, 8
        >>> projected, conv_weight, head_bias = torch.randn(1, 7, 3*H*d + 5*H), torch.randn(3*H*d, 4), torch.zeros(5*H)
        >>> whole = memory_input(projected, conv_weight, head_bias, heads=H)
        >>> whole.q.shape, whole.eta.shape, whole.gate.shape
        (torch.Size([1, 7, 2, 8]), torch.Size([1, 7, 2, 3]), torch.Size([1, 7, 2]))
        >>> first = memory_input(projected[:, :3], conv_weight, head_bias, heads=H, output_final_state=True)
        >>> second = memory_input(projected[:, 3:], conv_weight, head_bias, heads=H, initial_state=first.state)
        >>> torch.allclose(torch.cat([first.q, second.q], 1), whole.q)
        True

        Packed equals separate:

        >>> packed = memory_input(projected, conv_weight, head_bias, heads=H, cu_seqlens=torch.tensor([0, 3, 7]))
        >>> torch.allclose(packed.k[:, 3:], memory_input(projected[:, 3:], conv_weight, head_bias, heads=H).k)
        True
    """
    dims = _check(projected, conv_weight, head_bias, heads, q_norm, k_norm, l2, qk_activation, norm_eps, l2_eps)
    check_bool("output_final_state", output_final_state)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, projected, name="projected")
        dims["N"] = cu_seqlens.shape[0] - 1
    tail = None if initial_state is None else _check_state("initial_state", initial_state, projected, dims)
    chosen = _choose(impl, projected, dims["d"])
    inputs = Inputs(projected, conv_weight, head_bias, q_norm, k_norm, tail, cu_seqlens)
    outputs = _OPS[chosen](inputs, Options(heads, qk_activation == "silu", l2, float(norm_eps), float(l2_eps)))
    state = None
    if output_final_state:
        state = ConvTail(tail_after(projected[..., : dims["C"]].detach(), tail, cu_seqlens, dims["K"] - 1))
    return _result(outputs, state)


def memory_input_step(
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    state: ConvTail,
    *,
    heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    l2: bool = True,
    qk_activation: str = "silu",
    norm_eps: float = 1e-6,
    l2_eps: float = 1e-6,
    active: Tensor | None = None,
    impl: str = "auto",
) -> MemoryInput:
    """`memory_input` for the next 1 to 256 tokens of each sequence; moves `state` on in place.

    No autograd, no host synchronisation, safe in a CUDA graph.

    Args:
        projected, conv_weight, head_bias, heads, q_norm, k_norm, l2, qk_activation, norm_eps, l2_eps, impl: as in `memory_input`.
        state: where the B sequences stand; overwritten.
        active: None (all), or bool [B]: the state of an inactive sequence stays as it is, bit for bit; its outputs are those of its
            tokens all the same.

    Returns:
        `MemoryInput(q, k, v, eta, mu, gate, state)`; `state` is the one given.

    Raises:
        ValueError: as `memory_input`, or another number of tokens.

    Examples:
        >>> import torch
        >>> from allmem_ops import memory_input, memory_input_step
        >>> from allmem_ops.ops.memory_input.state import ConvTail
        >>> projected, conv_weight, head_bias = torch.randn(1, 5, 3*16 + 8), torch.randn(3*16, 4), torch.zeros(8)
        >>> state = ConvTail.zeros(1, 3*16, 4, dtype=torch.float32)
        >>> steps = [memory_input_step(x, conv_weight, head_bias, state, heads=2).q for x in projected.split(1, 1)]
        >>> torch.allclose(torch.cat(steps, 1), memory_input(projected, conv_weight, head_bias, heads=2).q)
        True
    """
    dims = _check(projected, conv_weight, head_bias, heads, q_norm, k_norm, l2, qk_activation, norm_eps, l2_eps)
    if not 1 <= dims["T"] <= STEP_TOKENS:
        fail("projected", f"must have from 1 to {STEP_TOKENS} tokens", dims["T"])
    if active is not None:
        check_shape("active", active, "B", dims)
        check_dtype("active", active, torch.bool)
        check_device("active", active, projected.device, "projected")
    tail = _check_state("state", state, projected, dims)
    chosen = _choose(impl, projected, dims["d"])
    options = Options(heads, qk_activation == "silu", l2, float(norm_eps), float(l2_eps))
    with torch.no_grad():
        if chosen == "triton" and dims["T"] <= _ONE_PROGRAM_TOKENS and tail.is_contiguous():
            outputs = registration.memory_input_step_triton(projected, conv_weight, head_bias, q_norm, k_norm, tail, active, *options)
        else:
            outputs = _OPS[chosen](Inputs(projected, conv_weight, head_bias, q_norm, k_norm, tail, None), options)
            after = tail_after(projected[..., : dims["C"]], tail, None, dims["K"] - 1)
            tail.copy_(after if active is None else torch.where(active[:, None, None], after, tail))
    return _result(outputs, state)


_OPS = {
    "reference": memory_input_reference,
    "chunk": registration.run_chunk,
    "triton": registration.run_triton,
}


def _result(outputs: tuple[Tensor, ...], state: ConvTail | None) -> MemoryInput:
    *outputs, gate = outputs
    return MemoryInput(*outputs, gate if gate.shape[-1] else None, state)


def _choose(impl: str, projected: Tensor, d: int) -> str:
    chosen = resolve_impl("memory_input", impl, projected)
    if chosen == "triton" and d > registration.MAX_HEAD_DIM:
        if impl == "triton":
            fail("conv_weight", f"must have heads of at most {registration.MAX_HEAD_DIM} channels with `impl`='triton'", d, "Use 'chunk'")
        chosen = "chunk"
    return chosen


def _check(
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    l2: bool,
    qk_activation: str,
    norm_eps: float,
    l2_eps: float,
) -> dict[str, int]:
    """The sizes B, T, C = 3*H*d, K, d and H."""
    check_tensor("projected", projected)
    check_dtype("projected", projected, MATMUL_DTYPES)
    check_int("heads", heads, 1)
    dims: dict[str, int] = {"H": heads}
    check_shape("projected", projected, "B T columns", dims)
    check_shape("conv_weight", conv_weight, "C K", dims)
    if dims["C"] % (3 * heads) or dims["C"] < 3 * heads:
        fail("conv_weight", f"must have 3*H*d rows with H={heads}", dims["C"])
    if not 1 <= dims["K"] <= 4:
        fail("conv_weight", "must have from 1 to 4 taps", dims["K"])
    dims["d"] = dims["C"] // (3 * heads)
    gates = dims["columns"] - dims["C"] - 4 * heads
    if gates < 0:
        fail("projected", f"must have at least 3*H*d + 4*H = {dims['C'] + 4 * heads} columns", dims["columns"])
    check_shape("head_bias", head_bias, "columns-C", {"columns-C": 4 * heads + gates})
    if (q_norm is None) != (k_norm is None):
        fail("k_norm" if k_norm is None else "q_norm", "must be given with the other norm's weight, or neither", None)
    for name, value in (("conv_weight", conv_weight), ("head_bias", head_bias), ("q_norm", q_norm), ("k_norm", k_norm)):
        if value is not None:
            if name in ("q_norm", "k_norm"):
                check_shape(name, value, "d", dims)
            wide = accumulator_dtype(projected.dtype)
            check_dtype(name, value, dict.fromkeys((projected.dtype, wide)), "the dtype of `projected`, or float32")
            check_device(name, value, projected.device, "projected")
    check_bool("l2", l2)
    check_choice("qk_activation", qk_activation, ("silu", "none"))
    check_float("norm_eps", norm_eps, minimum=0.0)
    check_float("l2_eps", l2_eps, minimum=0.0)
    return dims


def _check_state(name: str, state: ConvTail, projected: Tensor, dims: dict[str, int]) -> Tensor:
    if not isinstance(state, ConvTail):
        fail(name, "must be a ConvTail", type(state).__name__)
    shape = {"N": dims.get("N", dims["B"]), "K-1": dims["K"] - 1, "C": dims["C"]}
    check_shape(f"{name}.inputs", state.inputs, "N K-1 C", shape)
    check_dtype(f"{name}.inputs", state.inputs, projected.dtype, "the dtype of `projected`")
    check_device(f"{name}.inputs", state.inputs, projected.device, "projected")
    return state.inputs.detach()
