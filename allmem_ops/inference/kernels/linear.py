"""Products of a few rows with a weight, as decoding makes them: bound by the weight's bytes, and by the wait for the kernel before.

A program has BN rows of the weight, whole, in registers before it waits for its input (PDL): while the kernel before it drains, the
weights are on their way. What stands around the product is part of it: RMSNorm or SwiGLU on its input, the residual stream on its
output, a second product that is added. So the chain of a layer is a third as long.
"""

import triton
import triton.language as tl

PLAIN, NORM, GATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _tile(w, o_n, o_k, N, K):
    """Rows `o_n` of a weight, [BN, BK]."""
    return tl.load(w + tl.cast(o_n, tl.int64)[:, None] * K + o_k[None, :], mask=(o_n < N)[:, None] & (o_k < K)[None, :], other=0.0)


@triton.jit
def _input(x, norm, o_k, K, eps, FORM: tl.constexpr):
    """A row [BK] of what is multiplied, in float32, rounded where the model rounds."""
    dtype = x.dtype.element_ty
    m_k = o_k < K
    b_x = tl.cast(tl.load(x + o_k, mask=m_k, other=0.0), tl.float32)
    if FORM == NORM:
        b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / K + eps)
        b_w = tl.load(norm + o_k, mask=m_k, other=0.0)
        b_x = tl.cast(tl.cast(tl.cast(b_x, dtype), tl.float32) * tl.cast(b_w, tl.float32), dtype)
    elif FORM == GATED:
        b_up = tl.cast(tl.load(x + K + o_k, mask=m_k, other=0.0), tl.float32)
        b_x = tl.cast(tl.cast(tl.cast(b_x * tl.sigmoid(b_x), dtype), tl.float32) * b_up, dtype)
    return tl.cast(b_x, tl.float32)


@triton.jit
def _fetch(p, lines, LANES: tl.constexpr):
    """Have the L2 cache read this program's share of `lines` times 256 bytes at `p`; nothing waits for it."""
    share = tl.cdiv(lines, tl.num_programs(0))
    start = tl.program_id(0) * share
    stop = tl.minimum(start + share, lines)
    base = tl.cast(p, tl.int64)
    for i in range(start, stop, LANES):
        o = i + tl.arange(0, LANES)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], 256; mov.u32 $0, 0; }",
            "=r,l,r",
            [base + tl.cast(o, tl.int64) * 256, tl.cast(o < stop, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["B", "lines_a", "lines_b", "lines_c"])
def step_linear_kernel(
    x, w, norm, bias, x2, w2, out, next_a, next_b, next_c, B, N, K, K2, stride_x, stride_x2, stride_out, lines_a, lines_b, lines_c, eps,
    BN: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, FORM: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out [B, N] = form(x) @ w.T + bias + x2 @ w2.T, ADD: added to what `out` holds. Grid (cdiv(N, BN),).

    x: [B, K], GATED [B, 2 K]: silu(first half) * second. w [N, K], w2 [N, K2]. next_*: what later kernels read, lines_* times 256 bytes.
    """
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    b_w = _tile(w, o_n, o_k, N, K)
    if w2 is not None:
        o_k2 = tl.arange(0, BK2)
        b_w2 = _tile(w2, o_n, o_k2, N, K2)
    if next_a is not None:
        _fetch(next_a, lines_a, LANES)
    if next_b is not None:
        _fetch(next_b, lines_b, LANES)
    if next_c is not None:
        _fetch(next_c, lines_c, LANES)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for i_b in range(B):
        # [BN, BK] @ [BK] -> [BN]
        b_o = tl.sum(tl.cast(b_w, tl.float32) * _input(x + i_b * stride_x, norm, o_k, K, eps, FORM)[None, :], 1)
        if w2 is not None:
            b_o += tl.sum(tl.cast(b_w2, tl.float32) * _input(x2 + i_b * stride_x2, None, o_k2, K2, eps, PLAIN)[None, :], 1)
        if bias is not None:
            b_o += tl.cast(tl.load(bias + o_n, mask=o_n < N, other=0.0), tl.float32)
        p_o = out + i_b * stride_out + o_n
        if ADD:
            b_o += tl.cast(tl.load(p_o, mask=o_n < N, other=0.0), tl.float32)
        tl.store(p_o, tl.cast(b_o, out.dtype.element_ty), mask=o_n < N)
