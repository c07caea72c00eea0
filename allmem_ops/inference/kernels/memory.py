"""The memory of one layer for one token a sequence, from its columns of the projection to its readout, in one kernel.

What `memory_input_step`, the reading half of `ttt_mlp_step` and `gated_fusion` do in three: a head needs nothing of another one, and the
weights that it reads are on their way while convolution and norms are computed. The fold of a full tail is a launch of its own
(`ops/ttt_mlp/kernels/step.py`), for which nobody has to wait.
"""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.step import TAIL, step_counters

HEAD_GATE, CHANNEL_GATE = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _tap(p_taps, p_tail, o_c, m_c, C, TAPS: tl.constexpr, J: tl.constexpr):
    """The tap J of channels `o_c` and the input J tokens before, which is the tail's row TAPS - 1 - J; fp32, zeros where there is none."""
    b_tap, b_before = tl.zeros(o_c.shape, tl.float32), tl.zeros(o_c.shape, tl.float32)
    if J < TAPS:
        b_tap = tl.cast(tl.load(p_taps + o_c * TAPS + (TAPS - 1 - J), mask=m_c, other=0.0), tl.float32)
        b_before = tl.cast(tl.load(p_tail + (TAPS - 1 - J) * C + o_c, mask=m_c, other=0.0), tl.float32)
    return b_tap, b_before


@triton.jit
def _loaded(p_x, p_taps, p_tail, o_c, m_c, C, TAPS: tl.constexpr):
    """What `_convolved` takes of channels `o_c`, nothing of it used yet."""
    b_x = tl.cast(tl.load(p_x + o_c, mask=m_c, other=0.0, cache_modifier=".cg"), tl.float32)
    b_w = tl.cast(tl.load(p_taps + o_c * TAPS + (TAPS - 1), mask=m_c, other=0.0), tl.float32)
    b_w1, b_x1 = _tap(p_taps, p_tail, o_c, m_c, C, TAPS, 1)
    b_w2, b_x2 = _tap(p_taps, p_tail, o_c, m_c, C, TAPS, 2)
    b_w3, b_x3 = _tap(p_taps, p_tail, o_c, m_c, C, TAPS, 3)
    return b_x, b_x1, b_x2, b_x3, b_w, b_w1, b_w2, b_w3


@triton.jit
def _move_on(p_x, p_tail, o_c, m_c, C, TAPS: tl.constexpr):
    """The tail's rows one up, the present token in the last one. Each element is read and written by one thread, in this order."""
    for j in tl.static_range(0, TAPS - 2):
        tl.store(p_tail + j * C + o_c, tl.load(p_tail + (j + 1) * C + o_c, mask=m_c, other=0.0), mask=m_c)
    if TAPS > 1:
        tl.store(p_tail + (TAPS - 2) * C + o_c, tl.load(p_x + o_c, mask=m_c, other=0.0), mask=m_c)


@triton.jit
def _weight(p, o_d, m_d):
    """Of a norm, fp32; ones where there is none."""
    b = tl.full(o_d.shape, 1.0, tl.float32)
    if p is not None:
        b = tl.cast(tl.load(p + o_d, mask=m_d, other=0.0), tl.float32)
    return b


@triton.jit
def _normed(b_y, b_norm, rms_eps, l2_eps, W: tl.constexpr, SILU: tl.constexpr, RMS: tl.constexpr, L2: tl.constexpr):
    if SILU:
        b_y *= tl.sigmoid(b_y)
    if RMS:
        b_y *= b_norm * tl.rsqrt(tl.sum(b_y * b_y, 0) / W + rms_eps)
    if L2:
        b_y *= tl.rsqrt(tl.sum(b_y * b_y, 0) + l2_eps)
    return b_y


@triton.jit
def _softplus(b_x):
    """log(1 + e^x) with the error of the sum taken out: eta is often 1e-3 and less, where that error is 1e-4 of it."""
    b_e = tl.exp(-tl.abs(b_x))
    b_u = 1 + b_e
    b_log = tl.where(b_u > 1, tl.log(b_u) * (b_e / tl.where(b_u > 1, b_u - 1, 1.0)), b_e)
    return tl.maximum(b_x, 0.0) + b_log


@triton.jit
def step_memory_kernel(
    x, taps, q_norm, k_norm, bias, conv_tail, r_gate, r_up, r_down, mu_sum, tail_k, tail_v, tail_eta, count, tail, active, seen,
    readout_norm, out, stride_x, stride_a, rms_eps, l2_eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, L2: tl.constexpr,
    GATE: tl.constexpr, RESIDUAL: tl.constexpr, WRITES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (H, B). x: the memory's columns [B, 3 H D + 4 H + gates]; out [B, H D]; the state's tensors as in `ttt_mlp_step`.

    PDL: x is done when this kernel begins: between the one that makes it and this one there is another, which it runs beside. That one is
    waited for at the end, so that whoever waits for this one has waited for both.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_h, i_b, H = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.num_programs(0)
    i_x = i_b * H + i_h
    o_d, o_h = tl.arange(0, BD), tl.arange(0, BH)
    m_d, m_h = o_d < D, o_h < HID
    m_w = m_h[:, None] & m_d[None, :]
    o_w = i_x * (D * HID) + o_h[:, None] * D + o_d[None, :]
    o_down = i_x * (D * HID) + o_d[:, None] * HID + o_h[None, :]
    # Before all else: what this kernel waits for.
    b_gate = tl.load(r_gate + o_w, mask=m_w, other=0.0)
    b_up = tl.load(r_up + o_w, mask=m_w, other=0.0)
    b_down = tl.load(r_down + o_down, mask=m_d[:, None] & m_h[None, :], other=0.0)
    x += i_b * stride_x
    W = H * D
    dtype = out.dtype.element_ty
    conv_tail += i_b * ((TAPS - 1) * 3) * W
    o_c, o_e = i_h * D + o_d, tl.arange(0, 4)
    p_e = x + 3 * W
    b_q, b_q1, b_q2, b_q3, b_wq, b_wq1, b_wq2, b_wq3 = _loaded(x, taps, conv_tail, o_c, m_d, 3 * W, TAPS)
    b_k, b_k1, b_k2, b_k3, b_wk, b_wk1, b_wk2, b_wk3 = _loaded(x, taps, conv_tail, W + o_c, m_d, 3 * W, TAPS)
    b_v, b_v1, b_v2, b_v3, b_wv, b_wv1, b_wv2, b_wv3 = _loaded(x, taps, conv_tail, 2 * W + o_c, m_d, 3 * W, TAPS)
    b_q_norm, b_k_norm, b_r_norm = _weight(q_norm, o_d, m_d), _weight(k_norm, o_d, m_d), _weight(readout_norm, o_d, m_d)
    b_e = tl.cast(tl.load(p_e + 3 * i_h + o_e, mask=o_e < 3, other=0.0, cache_modifier=".cg"), tl.float32)
    b_e += tl.cast(tl.load(bias + 3 * i_h + o_e, mask=o_e < 3, other=0.0), tl.float32)
    b_mu = tl.cast(tl.load(p_e + 3 * H + i_h, cache_modifier=".cg"), tl.float32) + tl.cast(tl.load(bias + 3 * H + i_h), tl.float32)
    b_mu_sum = tl.load(mu_sum + i_x)
    if GATE == HEAD_GATE:
        b_g = tl.cast(tl.load(p_e + 4 * H + i_h, cache_modifier=".cg"), tl.float32) + tl.cast(tl.load(bias + 4 * H + i_h), tl.float32)
    if GATE == CHANNEL_GATE:
        b_g = tl.cast(tl.load(p_e + 4 * H + o_c, mask=m_d, other=0.0, cache_modifier=".cg"), tl.float32)
        b_g += tl.cast(tl.load(bias + 4 * H + o_c, mask=m_d, other=0.0), tl.float32)
    on, held, kept = step_counters(count, tail, active, stride_a, i_b)

    b_q = b_q * b_wq + b_q1 * b_wq1 + b_q2 * b_wq2 + b_q3 * b_wq3
    b_k = b_k * b_wk + b_k1 * b_wk1 + b_k2 * b_wk2 + b_k3 * b_wk3
    b_v = b_v * b_wv + b_v1 * b_wv1 + b_v2 * b_wv2 + b_v3 * b_wv3
    b_q = tl.cast(tl.cast(_normed(b_q, b_q_norm, rms_eps, l2_eps, D, SILU, q_norm is not None, L2), dtype), tl.float32)
    b_k = _normed(b_k, b_k_norm, rms_eps, l2_eps, D, SILU, k_norm is not None, L2)
    b_v *= tl.sigmoid(b_v)

    b_a = tl.sum(tl.cast(b_gate, tl.float32) * b_q[None, :], 1)
    b_b = tl.sum(tl.cast(b_up, tl.float32) * b_q[None, :], 1)
    b_o = tl.sum(tl.cast(b_down, tl.float32) * (b_a * tl.sigmoid(b_a) * b_b)[None, :], 1)
    if RESIDUAL:
        b_o += b_q
    b_o = tl.cast(tl.cast(tl.where(on, b_o, 0.0), dtype), tl.float32)
    if readout_norm is not None:
        b_o *= tl.rsqrt(tl.sum(b_o * b_o, 0) / D + rms_eps) * b_r_norm
    if GATE != 0:
        b_o *= tl.sigmoid(tl.cast(tl.cast(b_g, dtype), tl.float32))
    tl.store(out + i_b * W + o_c, tl.cast(b_o, dtype), mask=m_d)

    # What the convolution reads, every thread of the program has read by now.
    tl.debug_barrier()
    # Widths and not booleans: the interpreter of Triton 3.9 broadcasts a scalar comparison wrongly.
    width = tl.where(on, D, 0)
    for i in tl.static_range(3):
        _move_on(x, conv_tail, i * W + o_c, o_d < width, 3 * W, TAPS)
    at = i_x * TAIL + kept
    tl.store(tail_k + at * D + o_d, tl.cast(b_k, dtype), mask=o_d < width)
    tl.store(tail_v + at * D + o_d, tl.cast(b_v, dtype), mask=o_d < width)
    b_e = _softplus(b_e) if WRITES else tl.zeros([4], tl.float32)
    tl.store(tail_eta + at * 3 + o_e, b_e, mask=o_e < tl.where(on, 3, 0))
    tl.store(mu_sum + i_x, b_mu_sum + tl.sigmoid(b_mu), mask=on)
    if i_h == 0:
        tl.store(seen + 2 * i_b, tl.where(on, kept, -1))
        tl.store(seen + 2 * i_b + 1, held)
    if PDL:
        tl.extra.cuda.gdc_wait()
