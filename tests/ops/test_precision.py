import pytest
import torch

from allmem_ops.ops.precision import accumulator_dtype, ieee_float32, matmul


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_ieee_float32_sets_the_flag_inside_and_restores_it(before):
    flags = torch.backends.cuda.matmul
    saved = flags.fp32_precision
    try:
        flags.fp32_precision = before
        with ieee_float32():
            assert flags.fp32_precision == "ieee"
        assert flags.fp32_precision == before
    finally:
        flags.fp32_precision = saved


def test_ieee_float32_switches_autocast_off_inside_only():
    with torch.autocast("cpu", torch.bfloat16):
        with ieee_float32():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_matmul_keeps_the_sum_unrounded(dtype):
    a, b = torch.randn(3, 5, 64, dtype=dtype), torch.randn(3, 64, 7, dtype=dtype)
    out, exact = matmul(a, b), a.double() @ b.double()
    assert out.dtype == accumulator_dtype(dtype)
    torch.testing.assert_close(
        out.double(), exact, rtol=0, atol=64 * torch.finfo(out.dtype).eps * (a.double().abs() @ b.double().abs()).max()
    )
