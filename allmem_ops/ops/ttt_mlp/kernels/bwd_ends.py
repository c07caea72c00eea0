"""What is left at the start of the sequences: gradients of the initial weights, of N in them, and of the initial state."""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.common import NONE, load_public, load_three, store_public


@triton.jit
def over_norm(b_dn, b_n):
    """dN / N by row: what the row of a weight argument is multiplied by; 0 for a zero row, which has no direction."""
    return tl.where(b_n > 0, tl.div_rn(b_dn, tl.where(b_n > 0, b_n, 1.0)), 0.0)


@triton.jit
def ends_tile(
    w_gate, w_up, w_down, n, dx, dm, dn, g_gate, g_up, g_down, s_gate, s_up, s_down, z_gate, z_up, z_down,
    i_h, i_d, i_k, N, H,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, NORM: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Tile (i_d, i_k) of head `i_h`. g: of the weights, the sequences in their order; with a state s, z: of its weights and momentum."""
    o_d, o_h = i_d * BD + tl.arange(0, BD), i_k * BH + tl.arange(0, BH)
    m_d, m_h = o_d < D, o_h < HID
    mask = m_d[:, None] & m_h[None, :]
    b_gate = tl.zeros([BD, BH], dtype=tl.float32)
    b_up, b_down = b_gate, b_gate
    n_gate = tl.zeros([BH], dtype=tl.float32)
    n_up = n_gate
    n_down = tl.zeros([BD], dtype=tl.float32)
    for i_n in tl.range(0, N):
        i_x = i_n * H + i_h
        c_gate, c_up, c_down = load_three(dx, i_x, o_d, o_h, mask, D, HID)
        if STATE:
            store_public(s_gate, s_up, s_down, i_x, o_d, o_h, mask, c_gate, c_up, c_down, D, HID)
            c_gate, c_up, c_down = load_three(dm, i_x, o_d, o_h, mask, D, HID)
            store_public(z_gate, z_up, z_down, i_x, o_d, o_h, mask, c_gate, c_up, c_down, D, HID)
        else:
            b_gate, b_up, b_down = b_gate + c_gate, b_up + c_up, b_down + c_down
        if NORM != NONE:
            p_dn = dn + tl.cast(i_x, tl.int64) * (2 * HID + D)
            n_gate += tl.load(p_dn + o_h, mask=m_h, other=0.0)
            n_up += tl.load(p_dn + HID + o_h, mask=m_h, other=0.0)
            n_down += tl.load(p_dn + 2 * HID + o_d, mask=m_d, other=0.0)
    p_n = n + i_h * (2 * HID + D)
    r_gate = over_norm(n_gate, tl.load(p_n + o_h, mask=m_h, other=0.0))
    r_up = over_norm(n_up, tl.load(p_n + HID + o_h, mask=m_h, other=0.0))
    r_down = over_norm(n_down, tl.load(p_n + 2 * HID + o_d, mask=m_d, other=0.0))
    c_gate, c_up, c_down = load_public(w_gate, w_up, w_down, i_h, o_d, o_h, mask, D, HID)
    store_public(
        g_gate, g_up, g_down, i_h, o_d, o_h, mask,
        b_gate + c_gate * r_gate[None, :], b_up + c_up * r_up[None, :], b_down + c_down * r_down[:, None], D, HID,
    )  # fmt: skip
