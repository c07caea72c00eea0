"""`gated_fusion`: values and gradients of every form, against independent computations."""

import pytest
import torch
from hypothesis import given

from allmem_ops import gated_fusion
from allmem_ops.testing import assert_within_budget
from tests.ops.fusion.forms import FULL, Form, by_element, forms, gradients, plain


def _call(x: dict, impl: str, **options: float) -> torch.Tensor:
    return gated_fusion(x["attn"], x["memory"], x["alpha"], gate=x["gate"], norm_weight=x["norm_weight"], impl=impl, **options)


@given(forms())
def test_reference_equals_the_formula_element_by_element(form: Form):
    x = form.inputs()
    want = torch.tensor(by_element(form, x), dtype=torch.float64)
    got = _call(x, "reference")
    assert got.shape == (form.batch, form.tokens, form.heads * form.width)
    torch.testing.assert_close(got.flatten(), want, rtol=1e-12, atol=1e-12)


@given(forms())
def test_chunk_equals_reference_in_float64(form: Form):
    x = form.inputs()
    want, got = _call(x, "reference"), _call(x, "chunk")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    want_grads, got_grads = gradients(want, x), gradients(got, x)
    assert want_grads.keys() == got_grads.keys()
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize(
    "form",
    [
        FULL,
        Form(split=False, norm=False),
        Form(split=False, norm=False, gate="channel", attn=False),
        Form(gate="channel", alpha=False),
        Form(gate=None, attn=False, alpha=False),
    ],
    ids=["full", "flat", "flat-channel", "channel", "norm-only"],
)
def test_gradcheck(form: Form, impl: str):
    x = form.inputs()
    present = [name for name, value in x.items() if value is not None]

    def f(*values):
        return _call({**x, **dict(zip(present, values, strict=True))}, impl)

    torch.autograd.gradcheck(f, [x[name] for name in present], fast_mode=False)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_alpha_zero_returns_attention_bit_for_bit_and_alpha_has_a_gradient(impl: str, dtype: torch.dtype):
    x = FULL.inputs(dtype, torch.float32)
    x["attn"] = torch.cat([x["attn"].detach().flatten()[:-4], torch.tensor([-0.0, 0.0, 1e-30, -1e-30], dtype=dtype)]).view(x["attn"].shape)
    x["alpha"] = torch.zeros_like(x["alpha"]).requires_grad_()
    y = _call(x, impl)
    as_int = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(y.view(as_int), x["attn"].view(as_int))  # -0.0 stays -0.0, which == would not see
    (dalpha,) = torch.autograd.grad(y.float().square().sum(), x["alpha"])
    assert (dalpha != 0).all()


@pytest.mark.parametrize("param_dtype", [None, torch.float32], ids=["one-dtype", "fp32-parameters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", [Form(tokens=111, width=60), Form(tokens=63, width=32, split=False, norm=False, gate="channel")])
def test_low_precision_is_within_the_budget(form: Form, dtype: torch.dtype, param_dtype: torch.dtype | None):
    x = form.inputs(dtype, param_dtype)
    x64 = {name: None if v is None else v.detach().double().requires_grad_() for name, v in x.items()}
    low = {name: None if v is None else v.detach().to(dtype).requires_grad_() for name, v in x.items()}
    y, y64, y_low = _call(x, "chunk"), _call(x64, "reference"), plain(form, low)
    assert y.dtype == dtype
    assert_within_budget("y", y, y_low, y64)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    got, exact, allowed = gradients(y, x, dy), gradients(y64, x64, dy.double()), gradients(y_low, low, dy)
    for name, grad in got.items():
        assert grad.dtype == x[name].dtype, name
        assert_within_budget(f"d{name}", grad, allowed[name], exact[name])
        with pytest.raises(AssertionError):
            assert_within_budget(f"d{name}", torch.zeros_like(grad), allowed[name], exact[name])


def test_sums_over_tokens_are_fp32():
    # 4096 equal terms of 1 in bf16 stop growing at 256; the gradient of alpha is their sum.
    memory = torch.ones(1, 4096, 8, dtype=torch.bfloat16)
    alpha = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    gated_fusion(None, memory, alpha, impl="chunk").sum().backward()
    assert torch.equal(alpha.grad, torch.full((8,), 4096.0, dtype=torch.bfloat16))


def test_the_result_is_rounded_once():
    # One rounding is at most half a unit in the last place away; the formula typed in bf16 (`plain`) is not.
    x = FULL.inputs(torch.bfloat16, torch.float32)
    exact = _call({name: v.detach().double() for name, v in x.items()}, "reference")
    half_ulp = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() * 1.001  # fp32 arithmetic may turn a near-tie
    assert ((_call(x, "chunk").double() - exact).abs() <= half_ulp).all()
    low = {name: v.detach().bfloat16() for name, v in x.items()}
    assert not ((plain(FULL, low).double() - exact).abs() <= half_ulp).all()


def test_output_dtype_is_attentions_else_memorys():
    memory, alpha = torch.randn(1, 3, 4), torch.randn(4)
    assert gated_fusion(torch.randn(1, 3, 4).bfloat16(), memory, alpha).dtype == torch.bfloat16
    assert gated_fusion(torch.randn(1, 3, 4), memory.bfloat16(), alpha).dtype == torch.float32
    assert gated_fusion(None, memory.bfloat16(), alpha).dtype == torch.bfloat16


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_strided_inputs_and_expanded_gradients(impl: str):
    form = Form(batch=3, tokens=6)
    x = form.inputs()
    want = _call(x, "reference")
    strided = {
        "attn": x["attn"].detach().transpose(0, 2).contiguous().transpose(0, 2),
        "memory": torch.cat([x["memory"].detach()] * 2, -1)[..., : form.width],  # a slice of a fused projection
        "alpha": x["alpha"].detach()[:, None].expand(-1, 2).contiguous()[:, 0],
        "gate": x["gate"].detach().flip(1).contiguous().flip(1).transpose(1, 2).contiguous().transpose(1, 2),
        "norm_weight": torch.stack([x["norm_weight"].detach()] * 2, -1)[:, 0],
    }
    strided = {name: v.requires_grad_() for name, v in strided.items()}
    got = _call(strided, impl)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    ones = torch.ones((), dtype=torch.float64).expand(want.shape)  # what `y.sum()` hands back
    want_grads, got_grads = gradients(want, x, ones.contiguous()), gradients(got, strided, ones)
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-9, atol=1e-9)


def test_backward_twice_gives_the_same_and_saves_only_the_inputs():
    x = FULL.inputs(torch.float32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = _call(x, "chunk")
    own = {v.data_ptr() for v in x.values()}
    assert len(saved) == 4 and all(t.data_ptr() in own for t in saved)
    dy = torch.ones_like(y)
    first = torch.autograd.grad(y, list(x.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, list(x.values()), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_input_is_changed():
    x = FULL.inputs(torch.float32)
    before = {name: v.detach().clone() for name, v in x.items()}
    for impl in ("reference", "chunk"):
        gradients(_call(x, impl), x)
        assert all(torch.equal(x[name], before[name]) for name in x)


def test_the_output_is_never_a_view_of_an_input():
    memory = torch.randn(2, 3, 4, requires_grad=True)
    y = gated_fusion(None, memory, None)
    assert torch.equal(y, memory) and y.data_ptr() != memory.data_ptr()
    dy = torch.randn(2, 3, 4)
    (grad,) = torch.autograd.grad(y, memory, dy)
    assert torch.equal(grad, dy) and grad.data_ptr() != dy.data_ptr()


def test_eps_stands_inside_the_root():
    memory = torch.full((1, 1, 1, 4), 1e-4, dtype=torch.float64)
    y = gated_fusion(None, memory, None, norm_weight=torch.ones(4, dtype=torch.float64), eps=1e-6)
    torch.testing.assert_close(y, torch.full((1, 1, 4), 1e-4 / (1e-8 + 1e-6) ** 0.5, dtype=torch.float64))
    zeros = torch.zeros(1, 1, 1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(gated_fusion(None, zeros, None, norm_weight=torch.ones(4)).sum(), zeros)
    assert torch.isfinite(grad).all()


def test_infinite_memory_is_not_hidden_by_alpha_zero():
    memory = torch.zeros(1, 1, 2)
    memory[0, 0, 1] = float("inf")
    y = gated_fusion(torch.ones(1, 1, 2), memory, torch.zeros(2))
    assert y[0, 0, 0] == 1 and y[0, 0, 1].isnan()
