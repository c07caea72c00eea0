"""The kernels of `gated_fusion` as a library operator: opcheck, torch.compile, CUDA graphs, checkpointing, no recompilation."""

import pytest
import torch

from allmem_ops import gated_fusion
from allmem_ops.ops.fusion import launch, registration
from tests.ops.fusion.forms import FULL, Form, gradients

CUDA = torch.cuda.is_available()
_FORMS = [
    FULL,
    Form(split=False, norm=False, gate="channel"),
    Form(attn=False, alpha=False),
    Form(split=False, norm=False, attn=False, alpha=False, gate=None),
]


def _inputs(form: Form, device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
    x = form.inputs(dtype, torch.float32)
    return {name: None if v is None else v.detach().to(device).requires_grad_() for name, v in x.items()}


def _block(attn, memory, alpha, gate, norm_weight):
    return gated_fusion(attn, memory, alpha, gate=gate, norm_weight=norm_weight, impl="triton")


@pytest.mark.parametrize("form", _FORMS, ids=["full", "flat", "readout", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(form: Form, dtype: torch.dtype, device: torch.device):
    x = _inputs(form, device, dtype)
    torch.library.opcheck(registration.gated_fusion_triton, (*x.values(), 1e-6))
    dy = torch.randn(form.batch, form.tokens, form.heads * form.width, device=device).to(dtype)
    detached = [None if v is None else v.detach() for v in list(x.values())[1:]]
    torch.library.opcheck(registration.gated_fusion_triton_bwd, (dy, *detached, 1e-6))


def test_compiles_whole_and_does_not_recompile_for_another_length(device: torch.device):
    block = torch.compile(_block, fullgraph=True, dynamic=True, backend="inductor" if CUDA else "aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 17, 64):
            x = _inputs(Form(tokens=tokens), device)
            want, got = _block(*x.values()), block(*x.values())
            assert torch.equal(got, want)
            want, got = gradients(want, x, torch.ones_like(want)), gradients(got, x, torch.ones_like(want))
            for name, grad in want.items():
                assert torch.equal(got[name], grad), name


@pytest.mark.skipif(not CUDA, reason="compiled kernels are counted")
def test_kernels_are_not_compiled_again_for_another_length(device: torch.device):
    kernels = (launch.gated_fusion_fwd_kernel, launch.gated_fusion_bwd_kernel, launch.gated_fusion_bwd_sums_kernel)

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    for tokens in (64, 1, 2, 15, 16, 17, 1024, 4097):
        x = _inputs(Form(batch=1, tokens=tokens), device)
        gradients(_block(*x.values()), x, torch.ones(1, tokens, 12, device=device))
        if tokens == 64:
            before = compiled()
    assert compiled() == before


def test_checkpointing(device: torch.device):
    from torch.utils.checkpoint import checkpoint

    x = _inputs(FULL, device)
    dy = torch.randn(2, 5, 12, device=device)
    want = gradients(_block(*x.values()), x, dy)
    got = gradients(checkpoint(_block, *x.values(), use_reentrant=False), x, dy)
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name


@pytest.mark.skipif(not CUDA, reason="CUDA graphs")
def test_forward_and_backward_in_a_cuda_graph(device: torch.device):
    x = _inputs(Form(tokens=700, width=60), device, torch.bfloat16)
    dy = torch.randn(2, 700, 180, device=device, dtype=torch.bfloat16)

    def both() -> tuple[torch.Tensor, ...]:
        y = _block(*x.values())
        return y, *torch.autograd.grad(y, list(x.values()), dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        for v in x.values():
            v.copy_(torch.randn_like(v))
    graph.replay()
    for a, b in zip(captured, both(), strict=True):
        assert torch.equal(a, b)


def test_auto_takes_the_kernels_on_a_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    called = []
    for name in ("launch_forward", "launch_backward"):
        original = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, name=name, original=original: called.append(name) or original(*a))
    x = _inputs(FULL, device)
    y = gated_fusion(x["attn"], x["memory"], x["alpha"], gate=x["gate"], norm_weight=x["norm_weight"])
    torch.autograd.grad(y.sum(), list(x.values()))
    assert called == (["launch_forward", "launch_backward"] if CUDA else [])
