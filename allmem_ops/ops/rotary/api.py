"""The public function `rotary`, and the table of cosines and sines that it takes."""

from typing import NamedTuple

from torch import Tensor

from allmem_ops._impl import resolve_impl
from allmem_ops._validation import MATMUL_DTYPES, check_device, check_dtype, check_float, check_int, check_shape, fail
from allmem_ops.ops.precision import accumulator_dtype
from allmem_ops.ops.rotary import registration
from allmem_ops.ops.rotary.reference import rotary_reference


class Rotary(NamedTuple):
    """What `rotary` returns: q [B, T, HQ, D], k and v [B, T, HK, D], in `qkv`'s dtype. v may be a view of `qkv`."""

    q: Tensor
    k: Tensor
    v: Tensor


def rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    heads_kv: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Rotary:
    """From one projection to what attention reads: RMSNorm and rotary position embedding of each head of q and k.

        q, k, v = qkv.split([HQ, HK, HK], dim=2)
        n       = x / sqrt(mean(x^2) + eps) * weight                   x of q and k, over the D channels of a head
        y       = [n1 cos - n2 sin, n2 cos + n1 sin]                   n = [n1, n2], the halves of a head

    Without `q_norm` and `k_norm` n is x. v is handed on as it is.

    Args:
        qkv: [B, T, HQ + 2*HK, D], D even; float16, bfloat16, float32 or float64, any strides.
        cos, sin: [B or 1, T, D/2], of each token's angles, see `rotary_table`; float32 (float64 for float64) or `qkv`'s dtype. The turn is
            computed in their dtype: with float32 everything is rounded once, at the end; in half precision n and each product are
            rounded, as models in half precision do that (those of transformers, bit for bit without norms). They get no gradient.
        heads, heads_kv: HQ and HK; HK may be 0.
        q_norm, k_norm: weights [D] of the RMSNorms, `qkv`'s dtype or float32; both or neither (`k_norm` None also where HK is 0).
        eps: added to the mean square inside the root, greater than 0.
        impl: `"reference"`, `"chunk"` (plain PyTorch), `"triton"` (one kernel forward, at most two backward; not float64, D up to
            2048) or `"auto"`: `"triton"` on CUDA for what the kernels take, else `"chunk"`.

    Returns:
        `Rotary(q, k, v)`. `qkv`, `q_norm` and `k_norm` get gradients in their
        own dtype; sums over tokens are float32. Backward keeps `qkv` only where there are norms.

    Raises:
        ValueError: an argument of another shape, dtype, device or range than stated, or an `impl` that does not exist.

    Examples:
        >>> import torch
        >>> from allmem_ops import rotary, rotary_table
        >>> qkv, inv_freq = torch.randn(1, 10, 4 + 2 * 2, 8), 10000.0 ** -(torch.arange(0, 8, 2) / 8)
        >>> cos, sin = rotary_table(torch.arange(10)[None], inv_freq)
        >>> q, k, v = rotary(qkv, cos, sin, heads=4, heads_kv=2)
        >>> q.shape, torch.equal(v, qkv[:, :, 6:])
        (torch.Size([1, 10, 4, 8]), True)
        >>> torch.allclose(q.norm(dim=-1), qkv[:, :, :4].norm(dim=-1))  # a rotation
        True
    """
    _check(qkv, cos, sin, heads, heads_kv, q_norm, k_norm, eps)
    chosen = resolve_impl("rotary", impl, qkv)
    if chosen == "triton" and qkv.shape[3] > registration.MAX_HEAD_DIM:
        if impl == "triton":
            fail(
                "qkv", f"must have heads of at most {registration.MAX_HEAD_DIM} channels with `impl`='triton'", qkv.shape[3], "Use 'chunk'"
            )
        chosen = "chunk"
    return Rotary(*_OPS[chosen](qkv, cos, sin, q_norm, k_norm, heads, heads_kv, float(eps)))


_OPS = {
    "reference": rotary_reference,
    "chunk": registration.rotary_chunk,
    "triton": registration.run_triton,
}


def rotary_table(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `positions * inv_freq`: [B or 1, T] and [D/2] -> two tensors [B or 1, T, D/2].

    Angles are float32 (float64 for a float64 `inv_freq`), as the models that were trained with RoPE form them.
    """
    check_shape("positions", positions, "B T", {})
    check_shape("inv_freq", inv_freq, "D/2", {})
    wide = accumulator_dtype(inv_freq.dtype)
    if registration.table_by_kernel(positions, inv_freq):
        return registration.table(positions, inv_freq)
    angle = positions[..., None].to(wide) * inv_freq.to(wide)
    return angle.cos(), angle.sin()


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, heads_kv: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float
) -> None:
    check_int("heads", heads, 1)
    check_int("heads_kv", heads_kv, 0)
    dims = {"HQ+2*HK": heads + 2 * heads_kv}
    check_shape("qkv", qkv, "B T HQ+2*HK D", dims)
    check_dtype("qkv", qkv, MATMUL_DTYPES)
    if dims["D"] % 2 or not dims["D"]:
        fail("qkv", "must have an even number D of channels", dims["D"])
    dims["D/2"] = dims["D"] // 2
    wide = accumulator_dtype(qkv.dtype)
    for name, table in (("cos", cos), ("sin", sin)):
        one = isinstance(table, Tensor) and table.dim() == 3 and table.shape[0] == 1
        check_shape(name, table, "1 T D/2" if one else "B T D/2", dims)
        check_device(name, table, qkv.device, "qkv")
    check_dtype("cos", cos, dict.fromkeys((qkv.dtype, wide)), "the dtype of `qkv`, or float32")
    check_dtype("sin", sin, cos.dtype, "the dtype of `cos`")
    if (q_norm is None) != (k_norm is None) and (q_norm is None or heads_kv):
        fail("k_norm" if k_norm is None else "q_norm", "must be given with the other norm's weight, or neither", None)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_shape(name, weight, "D", dims)
            check_dtype(name, weight, dict.fromkeys((qkv.dtype, wide)), "the dtype of `qkv`, or float32")
            check_device(name, weight, qkv.device, "qkv")
    check_float("eps", eps, above=0.0)
