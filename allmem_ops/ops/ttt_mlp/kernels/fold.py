"""The gradient sums of open chunks with their tails: what a state holds back, added before anything but a step goes on from it."""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.chain import descent
from allmem_ops.ops.ttt_mlp.kernels.common import PRE_WRITE, column_size, load_public, row_scale, store_public


@triton.jit
def ttt_mlp_fold_kernel(
    w_gate, w_up, w_down, n_gate, n_up, n_down, g_gate, g_up, g_down, tail_k, tail_v, tail_eta, tail, f_gate, f_up, f_down, H, eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, BT: tl.constexpr, TAIL: tl.constexpr,
    NORM: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """f = G plus the gradient of the tail's tokens, HS hidden units a program; a copy of G if there is none. Grid (N * H * slices,)."""
    SLICES: tl.constexpr = (HID + HS - 1) // HS
    i_x, i_s = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES
    o_d, o_h = tl.arange(0, BD), i_s * HS + tl.arange(0, HS)
    m_d, m_h = o_d < D, o_h < HID
    mask = m_d[:, None] & m_h[None, :]
    kept = tl.minimum(tl.maximum(tl.cast(tl.load(tail + i_x // H), tl.int32), 0), TAIL)
    b_gate, b_up, b_down = load_public(g_gate, g_up, g_down, i_x, o_d, o_h, mask, D, HID)
    if kept > 0:
        p_gate, p_up, p_down = load_public(w_gate, w_up, w_down, i_x, o_d, o_h, mask, D, HID)
        if NORM == PRE_WRITE:
            i_y = tl.cast(i_x, tl.int64)
            # rows of Wdown run over all hidden units
            b_sum = tl.zeros([BD], dtype=tl.float32)
            for i_k in tl.range(0, HID, HS):
                o_k = i_k + tl.arange(0, HS)
                m_k = m_d[:, None] & (o_k < HID)[None, :]
                b_w = tl.load(w_down + i_y * (D * HID) + (o_d[:, None] * HID + o_k[None, :]), mask=m_k, other=0.0)
                b_sum += tl.sum(b_w * b_w, 1)
            s_down = row_scale(tl.load(n_down + i_y * D + o_d, mask=m_d, other=0.0), tl.sqrt_rn(b_sum), eps)
            p_gate *= row_scale(tl.load(n_gate + i_y * HID + o_h, mask=m_h, other=0.0), column_size(p_gate), eps)[None, :]
            p_up *= row_scale(tl.load(n_up + i_y * HID + o_h, mask=m_h, other=0.0), column_size(p_up), eps)[None, :]
            p_down *= s_down[:, None]
        at = tl.cast(i_x, tl.int64) * TAIL
        dtype = tail_k.dtype.element_ty
        d_gate, d_up, d_down = descent(
            tail_k + at * D, tail_v + at * D, tail_eta + at * 3, D, 1, D, 1, 3, 1,
            tl.cast(p_gate, dtype), tl.cast(p_up, dtype), tl.cast(p_down, dtype), 0, kept, 0, D, BT, 1, PREC, False,
        )  # fmt: skip
        b_gate -= d_gate
        b_up -= d_up
        b_down -= d_down
    store_public(f_gate, f_up, f_down, i_x, o_d, o_h, mask, b_gate, b_up, b_down, D, HID)
