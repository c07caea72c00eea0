"""The parameters' gradients from what the programs of the backward kernels have left behind."""

import triton
import triton.language as tl

from allmem_ops.ops.kernels.sums import column_sums


@triton.jit(do_not_specialize=["tap_rows", "norm_rows", "bias_rows"], do_not_specialize_on_alignment=["tap_rows", "norm_rows", "bias_rows"])
def memory_input_bwd_sums_kernel(
    p_tap_sums,
    p_norm_sums,
    p_bias_sums,
    p_dtaps,
    p_dq_norm,
    p_dk_norm,
    p_dbias,
    tap_rows,
    norm_rows,
    bias_rows,
    C: tl.constexpr,
    W: tl.constexpr,
    E: tl.constexpr,
    TAPS: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """A program sums BC columns of one of fp32 [tap_rows, TAPS, C], [norm_rows, 2, BW] and [bias_rows, E], in this order."""
    i_c = tl.program_id(0)
    NT: tl.constexpr = (TAPS * C + BC - 1) // BC
    NE: tl.constexpr = (E + BC - 1) // BC
    if i_c < NT:
        o_c, b_sum = column_sums(p_tap_sums, tap_rows, TAPS * C, i_c, BN, BC)
        tl.store(p_dtaps + o_c % C * TAPS + o_c // C, b_sum.to(p_dtaps.dtype.element_ty), mask=o_c < TAPS * C)
    elif i_c < NT + NE:
        o_c, b_sum = column_sums(p_bias_sums, bias_rows, E, i_c - NT, BN, BC)
        tl.store(p_dbias + o_c, b_sum.to(p_dbias.dtype.element_ty), mask=o_c < E)
    else:
        if p_norm_sums is not None:
            o_c, b_sum = column_sums(p_norm_sums, norm_rows, 2 * BW, i_c - NT - NE, BN, BC)
            tl.store(p_dq_norm + o_c, b_sum.to(p_dq_norm.dtype.element_ty), mask=o_c < W)
            tl.store(p_dk_norm + (o_c - BW), b_sum.to(p_dk_norm.dtype.element_ty), mask=(o_c >= BW) & (o_c < BW + W))
