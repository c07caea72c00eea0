"""`swa` and `swa_step`: sliding-window attention with sinks, over a sequence and token by token."""

import torch
from torch import Tensor

from allmem_ops._impl import resolve_impl
from allmem_ops._validation import (
    MATMUL_DTYPES,
    check_bool,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_shape,
    fail,
)
from allmem_ops.ops.swa.cache import WindowCache
from allmem_ops.ops.swa.reference import swa_reference, swa_step_reference
from allmem_ops.ops.swa.registration import MAX_HEAD_DIM, run_step, run_triton, swa_chunk, swa_step_chunk


def swa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    q_sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention over the last `window` tokens and the first `sinks` tokens of a sequence.

        o[i] = sum_j softmax_j(scale * <q[i], k[j]>) v[j]      over j <= i with i - j < window or j < sinks

    The queries are the last Tq of Tk positions: query row r is position i = Tk - Tq + r. Query head h reads key/value head
    h // (HQ / HK). Matrix operands have q's dtype (float32 is never tf32), scores and sums are fp32 (float64 for float64
    inputs). `o` and `lse` are differentiable with respect to `q`, `k`, `v` and `q_sinks`.

    Args:
        q: [B, Tq, HQ, D], bfloat16, float16, float32 or float64; any strides, Tq = 0 gives an empty result.
        k, v: [B, Tk, HK, D] in q's dtype, Tk >= Tq; HQ is a multiple of HK.
        window: at least 1, a run-time value: a change neither recompiles nor retunes.
        sinks: at least 0, default 0, a run-time value.
        scale: greater than 0; None is D**-0.5.
        q_sinks: None, or [B, Tq, HQ, D] in q's dtype: stands for `q` in the pairs with j < sinks and i - j >= window (sinks
            outside the window), so that these can be scored at another rotary position. Its gradient is its own.
        cu_seqlens: None, or int32 or int64 [N+1] for N sequences packed into one row (B = 1, Tq = Tk): sequence n is tokens
            cu_seqlens[n] to cu_seqlens[n+1]. Positions, windows and sinks restart in each; sequences may be empty.
            `impl="chunk"` reads it on the host once a call.
        return_lse: also return the log-sum-exp, default False.
        impl: "reference" (dense mask, O(Tq * Tk) memory), "chunk" (O(T * (window + sinks)) time), "triton" (kernels: bfloat16,
            float16, float32, D up to 256), or "auto": "triton" for CUDA tensors that it covers, else "chunk".

    Returns:
        `o` [B, Tq, HQ, D] in q's dtype; with `return_lse` the pair (`o`, `lse`), `lse` fp32 [B, Tq, HQ] (float64 for float64
        inputs), the natural logarithm of the sum of exponentials of the scaled scores.

    Raises:
        ValueError: an argument of another shape, dtype, device or range than above, or an `impl` that does not exist.

    Examples:
        >>> import torch
        >>> from allmem_ops import swa
        >>> q, k, v = torch.randn(1, 50, 4, 16), torch.randn(1, 50, 2, 16), torch.randn(1, 50, 2, 16)
        >>> swa(q, k, v, window=8, sinks=2).shape
        torch.Size([1, 50, 4, 16])

        Packed sequences give what each gives alone:

        >>> packed = swa(q, k, v, window=8, sinks=2, cu_seqlens=torch.tensor([0, 20, 50]))
        >>> alone = [swa(q[:, a:b], k[:, a:b], v[:, a:b], window=8, sinks=2) for a, b in ((0, 20), (20, 50))]
        >>> torch.allclose(packed, torch.cat(alone, 1), atol=1e-6)
        True
    """
    known: dict[str, int] = {}
    if cu_seqlens is None:
        check_shape("q", q, "B Tq HQ D", known)
        check_shape("k", k, "B Tk HK D", known)
        check_shape("v", v, "B Tk HK D", known)
        if known["Tq"] > known["Tk"]:
            fail("q", f"must have at most Tk={known['Tk']} positions (they are the last ones of `k`)", known["Tq"])
    else:
        check_shape("q", q, "B T HQ D", known)
        check_cu_seqlens(cu_seqlens, q)
        check_shape("k", k, "B T HK D", known)
        check_shape("v", v, "B T HK D", known)
    _check_heads(known)
    check_dtype("q", q, MATMUL_DTYPES)
    for name, x in (("k", k), ("v", v)):
        check_dtype(name, x, q.dtype, "the dtype of `q`")
        check_device(name, x, q.device)
    if q_sinks is not None:
        _check_q_sinks(q_sinks, q, known)
    check_int("window", window, 1)
    check_int("sinks", sinks, 0)
    check_bool("return_lse", return_lse)
    run = {"reference": swa_reference, "chunk": swa_chunk, "triton": run_triton}[_resolve("swa", impl, q)]
    o, lse = run(q, k, v, q_sinks, cu_seqlens, window, sinks, _scale(scale, q))
    return (o, lse) if return_lse else o


@torch.no_grad()
def swa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: WindowCache,
    *,
    scale: float | None = None,
    q_sinks: Tensor | None = None,
    active: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Put one token a sequence into `cache`, in place, and attend with it: `swa` at the sequence's last position.

        o = sum_j softmax_j(scale * <q, k[j]>) v[j]            over the sinks and the last `window` tokens, itself included

    `window` and `sinks` are the cache's; each sequence is at its own position. Arithmetic is that of `swa`. It takes no part
    in autograd (the result does not require a gradient, whatever the inputs do), reads nothing on the host, and can be
    captured in a CUDA graph.

    Args:
        q: [B, 1, HQ, D] in the cache's dtype.
        k, v: [B, 1, HK, D] in the cache's dtype, any strides; HQ is a multiple of HK.
        cache: changed in place.
        scale: greater than 0; None is D**-0.5.
        q_sinks: None, or [B, 1, HQ, D]: stands for `q` at the sinks that are outside the window.
        active: None (all), or bool [B] on the cache's device. The row of the cache of an inactive sequence stays as it is, bit
            for bit, and its output is 0.
        impl: "reference", "chunk", "triton" (two kernels: bfloat16, float16, float32, D up to 256, contiguous buffers in `cache`),
            or "auto": "triton" on CUDA for what the kernels take, else "chunk".

    Returns:
        `o` [B, 1, HQ, D] in q's dtype.

    Raises:
        ValueError: an argument of another shape, dtype, device or range than above, or an `impl` that does not exist.

    Examples:
        >>> import torch
        >>> from allmem_ops import WindowCache, swa, swa_step
        >>> q, k, v = torch.randn(3, 2, 20, 4, 16).unbind(0)
        >>> cache = WindowCache.empty(2, 4, 16, window=8, sinks=2, dtype=torch.float32, device="cpu")
        >>> steps = [swa_step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], cache) for t in range(20)]
        >>> torch.allclose(torch.cat(steps, 1), swa(q, k, v, window=8, sinks=2), atol=1e-6)
        True
    """
    if not isinstance(cache, WindowCache):
        fail("cache", "must be a WindowCache", type(cache).__name__)
    known = cache.dims
    check_shape("q", q, "B 1 HQ D", known)
    check_dtype("q", q, cache.ring_k.dtype, "the dtype of `cache`")
    check_device("q", q, cache.device, "cache")
    cache.check_tokens("k", k, "B 1 HK D", known)
    cache.check_tokens("v", v, "B 1 HK D", known)
    _check_heads(known)
    if q_sinks is not None:
        _check_q_sinks(q_sinks, q, known | {"Tq": 1})
    if active is not None:
        check_shape("active", active, "B", known)
        check_dtype("active", active, torch.bool)
        check_device("active", active, cache.device, "cache")
    impl = _resolve("swa_step", impl, q)
    scale = _scale(scale, q)  # the last check: a refused call leaves the cache as it was
    if impl == "triton":
        return run_step(q, k, v, q_sinks, active, cache.sink_k, cache.sink_v, cache.ring_k, cache.ring_v, cache.positions, scale)
    position = cache.positions.clone()  # `write` moves the cache's own on
    cache.write(k, v, active)
    run = swa_step_reference if impl == "reference" else swa_step_chunk
    o = run(q, q_sinks, cache.sink_k, cache.sink_v, cache.ring_k, cache.ring_v, position, scale)
    return o if active is None else torch.where(active[:, None, None, None], o, 0)


def _resolve(op: str, impl: str, q: Tensor) -> str:
    """`resolve_impl`, and the kernels' largest head dim."""
    chosen = resolve_impl(op, impl, q)
    if chosen == "triton" and q.shape[-1] > MAX_HEAD_DIM:
        if impl == "triton":
            fail("q", f"must have a head dim D of at most {MAX_HEAD_DIM} with `impl`='triton'", q.shape[-1], "Use 'chunk'")
        return "chunk"
    return chosen


def _check_heads(known: dict[str, int]) -> None:
    if known["HK"] < 1 or known["HQ"] % known["HK"]:
        fail("q", f"must have a number of heads HQ that is a multiple of HK={known['HK']}", known["HQ"])
    if known["D"] < 1:
        fail("q", "must have a head dim D of at least 1", known["D"])


def _check_q_sinks(q_sinks: Tensor, q: Tensor, known: dict[str, int]) -> None:
    check_shape("q_sinks", q_sinks, f"B {'Tq' if 'Tq' in known else 'T'} HQ D", known)
    check_dtype("q_sinks", q_sinks, q.dtype, "the dtype of `q`")
    check_device("q_sinks", q_sinks, q.device)


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    check_float("scale", scale, above=0)
    return float(scale)
