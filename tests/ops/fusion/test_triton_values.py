"""`gated_fusion` with `impl="triton"`: values and gradients of every form, on a GPU or in Triton's interpreter."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from allmem_ops import gated_fusion
from allmem_ops.ops.fusion import launch
from allmem_ops.ops.kernels.configs import Config
from allmem_ops.testing import assert_within_budget
from tests.ops.fusion.forms import FULL, Form, forms, gradients, plain

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]  # no bfloat16 in the interpreter
SMALL = {("sm80", shape): [Config({"TILE": 64, "PER_SM": 2, "STAGES": 1}, 4, 1)] for shape in ("rows", "readout", "sums")}


def _to(x: dict, device: torch.device) -> dict:
    return {name: None if v is None else v.detach().to(device).requires_grad_() for name, v in x.items()}


def _call(x: dict, impl: str, **options: float) -> torch.Tensor:
    return gated_fusion(x["attn"], x["memory"], x["alpha"], gate=x["gate"], norm_weight=x["norm_weight"], impl=impl, **options)


def check(form: Form, x: dict, device: torch.device) -> None:
    """Output and every gradient within the error budget, and the budget sees a zeroed one."""
    x64 = {name: None if v is None else v.detach().double().requires_grad_() for name, v in x.items()}
    dtype = x["memory"].dtype
    low = {name: None if v is None else v.detach().to(dtype).requires_grad_() for name, v in x.items()}
    ours = _to(x, device)
    y, y64, y_low = _call(ours, "triton"), _call(x64, "reference"), plain(form, low)
    assert y.is_contiguous() and y.dtype == (x["memory"] if x["attn"] is None else x["attn"]).dtype
    assert_within_budget("y", y, y_low, y64)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    got, exact, allowed = gradients(y, ours, dy.to(device)), gradients(y64, x64, dy.double()), gradients(y_low, low, dy)
    for name, grad in got.items():
        assert grad.dtype == x[name].dtype and grad.shape == x[name].shape, name
        assert_within_budget(f"d{name}", grad, allowed[name], exact[name])
        if exact[name].any():
            with pytest.raises(AssertionError):
                assert_within_budget(f"d{name}", torch.zeros_like(grad), allowed[name], exact[name])


# On a GPU the sizes of models loop over many tiles as it is, and every tile size is compiled.
@pytest.fixture(params=["tiles as pinned"] if CUDA else ["tiles as pinned", "many small tiles"])
def _tiles(request, monkeypatch) -> None:
    if request.param == "many small tiles":
        monkeypatch.setattr(launch, "_FWD", SMALL)
        monkeypatch.setattr(launch, "_BWD", SMALL)
        monkeypatch.setattr(launch, "sm_count", lambda device: 1)


@settings(max_examples=3 if CUDA else 20)  # every example is compiled on a GPU
@given(forms())
def test_every_form_equals_the_reference(form: Form):
    x = form.inputs(torch.float32)
    ours = _to(x, torch.device("cuda" if CUDA else "cpu"))
    want, got = _call(x, "reference"), _call(ours, "triton")
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    dy = torch.randn(want.shape)
    got = gradients(got, ours, dy.to(got.device))
    for name, grad in gradients(want, x, dy).items():
        torch.testing.assert_close(got[name].cpu(), grad, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"d{name}: {m}")


ODD = [
    Form(tokens=23, heads=3, width=12),
    Form(tokens=1, heads=1, width=1),
    Form(tokens=63, heads=4, width=16, batch=1),
    Form(tokens=9, heads=5, width=60, gate="channel"),
    Form(tokens=9, heads=2, width=96, attn=False, alpha=False),
    Form(tokens=17, heads=9, width=33, split=False, norm=False, gate=None),
    Form(tokens=17, heads=3, width=70, split=False, norm=False),
    Form(tokens=7, heads=1, width=130, split=False, norm=False, gate="channel"),
    Form(tokens=5, heads=2, width=40, gate=None, norm=False),
    Form(tokens=5, heads=7, width=8, gate=None, attn=False),
]


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("form", ODD[::3] if CUDA else ODD, ids=str)
def test_odd_shapes(form: Form, device: torch.device):
    """Sizes that are no powers of two, in tiles of 64 elements too: then rows of several tokens, many tiles a program, several programs."""
    check(form, form.inputs(torch.float32), device)


@pytest.mark.parametrize("param_dtype", [None, torch.float32], ids=["one-dtype", "fp32-parameters"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [Form(width=60), Form(width=32, split=False, norm=False, gate="channel"), Form(width=64, attn=False)])
def test_low_precision_is_within_the_budget(form: Form, dtype: torch.dtype, param_dtype: torch.dtype | None, device: torch.device):
    form = dataclasses.replace(form, tokens=2000 if CUDA else 111)
    check(form, form.inputs(dtype, param_dtype), device)


@pytest.mark.skipif(not CUDA, reason="a GPU's sizes")
@pytest.mark.parametrize("heads,width,split", [(16, 64, True), (9, 64, False), (12, 96, True), (1, 2048, False)])
def test_model_sizes(heads: int, width: int, split: bool, device: torch.device):
    form = Form(batch=1, tokens=20001, heads=heads, width=width, split=split, norm=split)
    check(form, form.inputs(torch.bfloat16, torch.float32), device)


@pytest.mark.parametrize("attn", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory", [torch.float32, torch.float16])
def test_attention_and_memory_may_have_different_dtypes(attn: torch.dtype, memory: torch.dtype, device: torch.device):
    x = FULL.inputs(memory, torch.float32)
    x["attn"] = x["attn"].detach().to(attn).requires_grad_()
    want, got = _call(x, "chunk"), _call(_to(x, device), "triton")
    assert got.dtype == attn
    torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_zero_returns_attention_bit_for_bit_and_alpha_has_a_gradient(dtype: torch.dtype, device: torch.device):
    x = FULL.inputs(dtype, torch.float32)
    x["attn"] = torch.cat([x["attn"].detach().flatten()[:-4], torch.tensor([-0.0, 0.0, 1e-30, -1e-30], dtype=dtype)]).view(x["attn"].shape)
    x["alpha"] = torch.zeros_like(x["alpha"])
    x = _to(x, device)
    y = _call(x, "triton")
    as_int = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(y.view(as_int), x["attn"].view(as_int))  # -0.0 stays -0.0, which == would not see
    (dalpha,) = torch.autograd.grad(y.float().square().sum(), x["alpha"])
    assert (dalpha != 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy speaks up at 0 * inf
def test_infinite_memory_is_not_hidden_by_alpha_zero(device: torch.device):
    memory = torch.zeros(1, 1, 2, device=device)
    memory[0, 0, 1] = float("inf")
    y = gated_fusion(torch.ones_like(memory), memory, torch.zeros(2, device=device), impl="triton")
    assert y[0, 0, 0] == 1 and y[0, 0, 1].isnan()


def test_sums_over_tokens_are_fp32(device: torch.device):
    # 4096 equal terms of 1 in fp16 stop growing at 2048; the gradient of alpha is their sum.
    memory = torch.ones(1, 4096, 8, dtype=torch.float16, device=device)
    alpha = torch.ones(8, dtype=torch.float16, device=device, requires_grad=True)
    gated_fusion(None, memory, alpha, impl="triton").sum().backward()
    assert torch.equal(alpha.grad, torch.full_like(alpha, 4096.0))


@pytest.mark.parametrize("split", [True, False])
def test_strided_inputs_and_expanded_gradients(split: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    form = Form(batch=3, tokens=6, split=split, norm=split)
    x = form.inputs(torch.float32)
    want = _call(x, "reference")
    strided = {
        "attn": x["attn"].detach().transpose(0, 2).contiguous().transpose(0, 2),
        "memory": torch.cat([x["memory"].detach()] * 2, -1)[..., : x["memory"].shape[-1]],  # a slice of a fused projection
        "alpha": x["alpha"].detach()[:, None].expand(-1, 2).contiguous()[:, 0],
        "gate": x["gate"].detach().transpose(1, 2).contiguous().transpose(1, 2),
        "norm_weight": torch.stack([x["norm_weight"].detach()] * 2, -1)[:, 0] if split else None,
    }
    strided = {name: None if v is None else v.to(device) for name, v in strided.items()}
    strides = {name: None if v is None else v.stride() for name, v in strided.items()}
    strided = {name: None if v is None else v.requires_grad_() for name, v in strided.items()}
    assert all(v is None or v.stride() == strides[name] for name, v in strided.items())
    # Strides go to the kernel; no copy is made on the way.
    for copy in ("contiguous", "clone"):
        monkeypatch.setattr(torch.Tensor, copy, None)
    got = _call(strided, "triton")
    ones = torch.ones((), device=device).expand(want.shape)  # what `y.sum()` hands back
    got_grads = gradients(got, strided, ones)
    monkeypatch.undo()
    torch.testing.assert_close(got.cpu(), want)
    want_grads = gradients(want, x, torch.ones(want.shape))
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name].cpu(), grad, rtol=1e-5, atol=1e-5)


def test_memory_with_heads_before_tokens_and_no_norm(device: torch.device):
    memory = torch.randn(2, 3, 5, 4).to(device).transpose(1, 2)  # [B, T, H, d], not viewable as [B, T, D]
    gate = torch.randn(2, 5, 12, device=device)
    got = gated_fusion(None, memory, None, gate=gate, impl="triton")
    torch.testing.assert_close(got, memory.flatten(2) * gate.sigmoid())


def test_offsets_beyond_32_bits(device: torch.device):
    tokens, far = 3, 2**30 + 8  # elements between two tokens
    storage = torch.empty(2 * far + 64, dtype=torch.float16, device=device)  # on a CPU only the touched pages exist
    memory = storage.as_strided((1, tokens, 4, 16), (3 * far, far, 16, 1))
    memory.copy_(torch.randn(memory.shape))
    weight, dy = torch.randn(16, device=device), torch.randn(1, tokens, 64, device=device).half()
    results = []
    for source in (memory, memory.contiguous()):
        source.requires_grad_()
        y = gated_fusion(None, source, None, norm_weight=weight, impl="triton")
        results.append((y, *torch.autograd.grad(y, source, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("_tiles")
def test_two_runs_are_bitwise_equal_and_a_second_backward_too(device: torch.device):
    form = Form(tokens=2000 if CUDA else 12, width=60 if CUDA else 20)
    x = _to(form.inputs(DTYPES[-1], torch.float32), device)
    dy = torch.randn(form.batch, form.tokens, 3 * form.width).to(device, DTYPES[-1])
    runs = []
    for _ in range(2):
        y = _call(x, "triton")
        for keep in (True, False):
            runs.append((y, *torch.autograd.grad(y, list(x.values()), dy, retain_graph=keep)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_backward_saves_only_the_inputs_and_changes_none(device: torch.device):
    x = _to(FULL.inputs(torch.float32), device)
    before = {name: v.detach().clone() for name, v in x.items()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = _call(x, "triton")
    own = {v.data_ptr() for v in x.values()}
    assert len(saved) == 4 and all(t.data_ptr() in own for t in saved)
    torch.autograd.grad(y.sum(), list(x.values()))
    assert all(torch.equal(x[name], before[name]) for name in x)


def test_eps_stands_inside_the_root_and_zero_rows_are_finite(device: torch.device):
    memory = torch.full((1, 1, 1, 4), 1e-4, device=device)
    y = gated_fusion(None, memory, None, norm_weight=torch.ones(4, device=device), eps=1e-6, impl="triton")
    torch.testing.assert_close(y.cpu(), torch.full((1, 1, 4), 1e-4 / (1e-8 + 1e-6) ** 0.5))
    zeros = torch.zeros(1, 1, 1, 4, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(gated_fusion(None, zeros, None, norm_weight=torch.ones(4, device=device), impl="triton").sum(), zeros)
    assert torch.isfinite(grad).all()


def test_a_head_too_wide_for_one_tile(device: torch.device):
    memory = torch.randn(1, 2, 1, 8193, device=device)
    with pytest.raises(ValueError, match="`memory` must have heads of at most 8192 channels with `impl`='triton'; got 8193"):
        gated_fusion(None, memory, None, impl="triton")
    with pytest.raises(ValueError, match="`gate` must have heads of at most 8192 channels"):
        gated_fusion(None, memory[:, :, 0], None, gate=torch.zeros(1, 2, 1, device=device), impl="triton")
    assert torch.equal(gated_fusion(None, memory[:, :, 0], None, impl="triton"), memory[:, :, 0])  # no heads, no limit
    assert torch.equal(gated_fusion(None, memory, None), memory[:, :, 0])
    weight = torch.ones(8192, device=device)
    got = gated_fusion(None, memory[..., 1:], None, norm_weight=weight, impl="triton")
    torch.testing.assert_close(got, gated_fusion(None, memory[..., 1:], None, norm_weight=weight, impl="chunk"))


def test_float64_has_no_kernel():
    with pytest.raises(ValueError, match="`impl` 'triton' needs one of bfloat16, float16, float32; got float64"):
        _call(FULL.inputs(torch.float64), "triton")
