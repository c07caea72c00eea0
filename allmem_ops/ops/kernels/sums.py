"""Sums of what many programs have left behind, in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def column_sums(p_sums, rows, columns, i_c, BN: tl.constexpr, BC: tl.constexpr):
    """(o_c, sums) [BC]: block i_c of the columns of fp32 [rows, columns], contiguous; every row, always in the same order."""
    o_c = i_c * BC + tl.arange(0, BC)
    o_n = tl.cast(tl.arange(0, BN), tl.int64)
    b_sum = tl.zeros([BN, BC], dtype=tl.float32)
    for i_n in range(0, rows, BN):
        m_n = (i_n + o_n < rows)[:, None] & (o_c < columns)[None, :]
        b_sum += tl.load(p_sums + (i_n + o_n)[:, None] * columns + o_c[None, :], mask=m_n, other=0.0)
    return o_c, tl.sum(b_sum, 0)
