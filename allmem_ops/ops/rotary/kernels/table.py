"""The table of cosines and sines: one launch for what takes PyTorch four, each a pass over the table."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "rows", "s_p_b", "s_p_t", "s_f"], do_not_specialize_on_alignment=["T", "rows", "s_p_b", "s_p_t", "s_f"])
def rotary_table_kernel(
    p_positions, p_inv_freq, p_cos, p_sin, T, rows, s_p_b, s_p_t, s_f, W: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr
):
    """Angles of BR of the rows (tokens of all sequences): positions times inv_freq [W], rounded to float32 as PyTorch rounds them.

    Cosine and sine are CUDA's, exact over all angles; their branch for large ones takes 32 bytes of local memory.
    """
    o_r = tl.cast(tl.program_id(0), tl.int64) * BR + tl.arange(0, BR)
    o_w = tl.arange(0, BW)
    m_r = o_r < rows
    m_w = o_w < W
    b_position = tl.load(p_positions + o_r // T * s_p_b + o_r % T * s_p_t, mask=m_r, other=0).to(tl.float32)
    b_inv_freq = tl.load(p_inv_freq + o_w * s_f, mask=m_w, other=0.0)
    b_angle = b_position[:, None] * b_inv_freq[None, :]
    o_y = o_r[:, None] * W + o_w[None, :]
    m_y = m_r[:, None] & m_w[None, :]
    tl.store(p_cos + o_y, tl.cos(b_angle), mask=m_y)
    tl.store(p_sin + o_y, tl.sin(b_angle), mask=m_y)
