"""The public function `gated_fusion`."""

import torch

from allmem_ops._impl import resolve_impl
from allmem_ops._validation import MATMUL_DTYPES, check_device, check_dtype, check_float, check_shape, check_tensor, fail
from allmem_ops.ops.fusion import registration
from allmem_ops.ops.fusion.reference import gated_fusion_reference
from allmem_ops.ops.precision import accumulator_dtype


def gated_fusion(
    attn: torch.Tensor | None,
    memory: torch.Tensor,
    alpha: torch.Tensor | None,
    *,
    gate: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> torch.Tensor:
    """Add a memory's readout to the output of attention: normalised, gated and scaled, with one rounding.

        y = attn + alpha * ( sigmoid(gate) * rmsnorm(memory; norm_weight) )
        rmsnorm(m; w) = m / sqrt(mean(m^2) + eps) * w            over the d channels of each head

    A part whose argument is None is left out: no addition, no scale, no gate, no norm.

    Args:
        attn: [B, T, D] or None, float16, bfloat16, float32 or float64.
        memory: [B, T, D], or [B, T, H, d] with D = H * d. float64 where `attn` is float64 and only there.
        alpha: [D] or None, `memory`'s dtype or float32: one factor a channel. At 0, `y` is `attn` bit for bit (for finite
            `memory`), while alpha's gradient is not 0.
        gate: logits [B, T, H] (one gate a head), [B, T, D] (one a channel) or None, `memory`'s dtype or float32. With `memory`
            [B, T, D] any H that divides D is legal: head i owns channels i * D/H to (i + 1) * D/H. H = D means the same in both readings.
        norm_weight: [d] or None, `memory`'s dtype or float32. Given, it switches the norm on; `memory` is then [B, T, H, d].
        eps: Added to the mean square inside the root, greater than 0. Default 1e-6.
        impl: `"reference"`, `"chunk"` (plain PyTorch), `"triton"` (one kernel forward, two backward; not float64; heads of at most
            8192 channels, where `memory` has four dimensions or `gate` is per head) or `"auto"`: `"triton"` on CUDA for what the
            kernels take, else `"chunk"`. "chunk" and "triton" are library operators that save their inputs and nothing else
            for backward.

    Returns:
        y [B, T, D], contiguous, in `attn`'s dtype, or in `memory`'s where `attn` is None; also for `memory` [B, T, H, d]. All
        arithmetic is float32 (float64 for float64) and rounded once. Every tensor argument gets a gradient in its own dtype; those of
        `alpha`, `gate` and `norm_weight` are summed in float32.

    Raises:
        ValueError: an argument of another shape, dtype or device than stated, or an `impl` that does not exist.

    Examples:
        >>> import torch
        >>> from allmem_ops import gated_fusion
        >>> attn, memory = torch.randn(2, 5, 12), torch.randn(2, 5, 3, 4)
        >>> gate, norm_weight = torch.randn(2, 5, 3), torch.ones(4)
        >>> torch.equal(gated_fusion(attn, memory, torch.zeros(12), gate=gate, norm_weight=norm_weight), attn)
        True

        The two calls of a memory block, before and after its output projection:

        >>> readout = gated_fusion(None, memory, None, gate=gate, norm_weight=norm_weight)
        >>> readout.shape
        torch.Size([2, 5, 12])
        >>> y = gated_fusion(attn, torch.nn.functional.linear(readout, torch.eye(12)), torch.full([12], 0.1))
        >>> torch.allclose(y, attn + 0.1 * readout)
        True
    """
    _check(attn, memory, alpha, gate, norm_weight, eps)
    chosen = resolve_impl("gated_fusion", impl, memory)
    if chosen == "triton" and (width := _head_dim(memory, gate)) > registration.MAX_HEAD_DIM:
        if impl == "triton":
            name = "memory" if memory.dim() == 4 else "gate"
            fail(name, f"must have heads of at most {registration.MAX_HEAD_DIM} channels with `impl`='triton'", width, "Use 'chunk'")
        chosen = "chunk"
    return _OPS[chosen](attn, memory, alpha, gate, norm_weight, eps)


_OPS = {
    "reference": gated_fusion_reference,
    "chunk": registration.gated_fusion_chunk,
    "triton": registration.run_triton,
}


def _head_dim(memory: torch.Tensor, gate: torch.Tensor | None) -> int:
    """Channels of what a norm or a gate is taken over; 1 where there are no heads."""
    if memory.dim() == 4:
        return memory.shape[3]
    return 1 if gate is None else memory.shape[2] // gate.shape[2]


def _check(
    attn: torch.Tensor | None,
    memory: torch.Tensor,
    alpha: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> None:
    check_tensor("memory", memory)
    check_dtype("memory", memory, MATMUL_DTYPES)
    dims: dict[str, int] = {}
    by_head = memory.dim() == 4 or norm_weight is not None
    check_shape("memory", memory, "B T H d" if by_head else "B T D", dims)
    if by_head:
        dims["D"] = dims["H"] * dims["d"]

    if attn is not None:
        check_shape("attn", attn, "B T D", dims)
        wide = memory.dtype == torch.float64
        check_dtype("attn", attn, torch.float64 if wide else MATMUL_DTYPES[:3], "float64 where `memory` is, and only there")
        check_device("attn", attn, memory.device, "memory")
    if gate is not None:
        by_channel = isinstance(gate, torch.Tensor) and gate.dim() == 3 and gate.shape[2] == dims["D"]
        check_shape("gate", gate, "B T D" if by_channel else "B T H", dims)
        if not by_channel and (dims["H"] == 0 or dims["D"] % dims["H"] != 0):
            fail("gate", f"must have shape [B, T, H] with H a divisor of D={dims['D']}", list(gate.shape))
    for name, value, shape in (("alpha", alpha, "D"), ("gate", gate, None), ("norm_weight", norm_weight, "d")):
        if value is not None:
            if shape is not None:
                check_shape(name, value, shape, dims)
            check_dtype(name, value, dict.fromkeys((memory.dtype, accumulator_dtype(memory.dtype))), "the dtype of `memory`, or float32")
            check_device(name, value, memory.device, "memory")
    check_float("eps", eps, above=0.0)
