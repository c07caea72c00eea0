"""Half precision and float32 within the error budget, however many chunks."""

import pytest
import torch

from allmem_ops import ttt_mlp
from allmem_ops.testing import assert_within_budget, relative_error
from tests.ops.ttt_mlp.cases import LEARNT, NORMS, TOKENS, assert_equal_to, everything, gradients, inputs, outputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def three(x, **options):
    """The chunk path, the reference at the same precision and the reference in float64: values and gradients by name."""
    exact = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    found = []
    for y, impl in ((x, "chunk"), (x, "reference"), (exact, "reference")):
        values = outputs(ttt_mlp(**y, impl=impl, residual=False, output_final_state=True, **options))
        found.append({name: values[name] for name in ("o", *LEARNT)} | {f"d{n}": g for n, g in gradients({"o": values["o"]}, y).items()})
    return found


@pytest.mark.parametrize("chunks", [1, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_the_budget_at_any_number_of_chunks(dtype, chunks):
    x = inputs(batch=1, length=16 * chunks, d=16, h=32, dtype=dtype, eta=0.01)
    got, low, exact = three(x, chunk_size=16)
    for name, t in got.items():
        assert_within_budget(name, t, low[name], exact[name])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_the_budget_for_every_norm_with_a_clip(dtype, norm):
    x = inputs(batch=2, length=70, d=16, h=32, dtype=dtype, eta=0.05)
    got, low, exact = three(x, chunk_size=16, norm=norm, grad_clip=0.1)
    for name, t in got.items():
        assert_within_budget(name, t, low[name], exact[name])


def test_the_budget_finds_a_zeroed_memory():
    x = inputs(batch=1, length=64, d=16, h=32, dtype=torch.bfloat16, eta=0.01)
    got, low, exact = three(x, chunk_size=16)
    for name in got:
        if exact[name].any():
            with pytest.raises(AssertionError):
                assert_within_budget(name, torch.zeros_like(got[name]), low[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_o_minus_q_is_added_in_fp32_before_the_one_rounding(dtype):
    x = inputs(length=20, d=16, h=32, dtype=dtype, grad=False)
    exact = {name: t.double() for name, t in x.items()}
    got, low, want = (ttt_mlp(**y, chunk_size=8, impl=impl).o for y, impl in ((x, "chunk"), (x, "reference"), (exact, "reference")))
    assert_within_budget("o - q", got.double() - exact["q"], low.double() - exact["q"], want - exact["q"])
    two_roundings = (ttt_mlp(**x, chunk_size=8, residual=False).o.float() + x["q"].float()).to(dtype)
    if dtype != torch.float32:
        assert not torch.equal(got, two_roundings)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_and_small_gradients_are_fp32(dtype, impl):
    x = inputs(dtype=dtype)
    result = ttt_mlp(**x, chunk_size=4, output_final_state=True, impl=impl)
    assert result.o.dtype == dtype
    for name, t in result.state.tensors().items():
        # tokens that wait to be folded are operands, counters are integers, all the rest are sums
        operand, counter = name in ("tail_k", "tail_v"), name in ("count", "position", "tail")
        assert t.dtype == (dtype if operand else torch.int64 if counter else torch.float32), name
    found = gradients({"o": result.o}, x)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in x.items()}


def test_gradient_sums_beyond_the_range_of_float16():
    # Before the clip |G| exceeds 65504: the factors that carry a rate, G and its gradient are fp32.
    x = inputs(batch=1, length=64, d=16, h=32, dtype=torch.float16, eta=5e4)
    first = {name: t[:, :32] if name in TOKENS else t for name, t in x.items()}
    assert ttt_mlp(**first, chunk_size=32, output_final_state=True).state.m_down.norm() > 65504
    exact = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    o, want = (ttt_mlp(**y, chunk_size=32, grad_clip=1.0).o for y in (x, exact))
    assert relative_error(o, want) < 2e-3
    for (name, got), reference in zip(gradients({"o": o}, x).items(), gradients({"o": want}, exact).values(), strict=True):
        assert relative_error(got, reference) < 1e-2, name


def test_autocast_changes_nothing():
    x = inputs(length=12, dtype=torch.float32)
    want = everything(x, "chunk", chunk_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_to(everything(x, "chunk", chunk_size=4), want, 0)
        reference = ttt_mlp(**x, chunk_size=4, impl="reference").o
    assert torch.equal(reference, ttt_mlp(**x, chunk_size=4, impl="reference").o)
