"""The memory branch as one node of autograd, against the same branch operator by operator: bit for bit."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from allmem_ops import AllMemConfig, MemoryBranch
from allmem_ops.layers import branch as fused

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
D_MODEL = 256 if CUDA else 24
FORMS = {
    "plain": {},
    "no gate, no norms": {"gate": "none", "readout_norm": False, "qk_norm": "none", "conv_size": 1},
    "gate a channel, RMSNorm": {"gate": "channel", "qk_norm": "rms", "qk_activation": "none"},
    "clipped": {"grad_clip": 0.01, "norm": "post_write", "residual": False},
}


def built(device: torch.device, heads: int = 1, **options: object) -> MemoryBranch:
    """A branch with everything away from its start, so that every gradient is one."""
    torch.manual_seed(0)
    config = AllMemConfig(chunk_size=100 if CUDA else 6, head_dim=64 if CUDA else 16, impl="triton").replace(**options)
    made = MemoryBranch(D_MODEL, config, heads=heads)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.to(device)


def inputs(device: torch.device, dtype: torch.dtype, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    shape = batch, 333 if CUDA else 9, D_MODEL
    return tuple(torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))


def results(made: MemoryBranch, x: torch.Tensor, attn: torch.Tensor | None, **options: object) -> list[torch.Tensor | None]:
    """The output and every gradient."""
    y = made(x, attn, **options)
    leaves = [t for t in (x, attn, *made.parameters()) if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, upstream(y), allow_unused=True)]


def upstream(y: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)


def assert_fused_is_composed(monkeypatch: pytest.MonkeyPatch, made: MemoryBranch, *args: object, **options: object) -> None:
    calls = []
    monkeypatch.setattr(fused._Branch, "backward", counted(calls, fused._Branch.backward))
    got = results(made, *args, **options)
    assert calls
    monkeypatch.setattr(MemoryBranch, "_fused", lambda *_: None)
    want = results(made, *args, **options)
    assert len(calls) == 1
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def counted(calls: list, function: object) -> object:
    def run(*args: object) -> object:
        calls.append(1)
        return function(*args)

    return staticmethod(run)


@pytest.mark.parametrize(("form", "dtype"), [("plain", torch.float32), *((form, DTYPES[-1]) for form in FORMS)])
def test_as_operator_by_operator(device: torch.device, monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype):
    made = built(device, heads=3 if CUDA else 1, **FORMS[form])  # rows that are no multiple of 8
    assert made.in_proj.weight.shape[0] % 8
    assert_fused_is_composed(monkeypatch, made, *inputs(device, dtype))


def test_without_attention(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    x, _ = inputs(device, torch.float32)
    assert_fused_is_composed(monkeypatch, built(device), x, None)


def test_packed(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    x, attn = inputs(device, torch.float16)
    offsets = torch.tensor([0, 4, x.shape[1]], dtype=torch.int32, device=device)
    assert_fused_is_composed(monkeypatch, built(device), x, attn, cu_seqlens=offsets)


def test_without_writes_and_with_frozen_parameters(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    made = built(device)
    made.writes = False
    for frozen in (made.in_proj.weight, made.out_proj.weight, made.alpha):
        frozen.requires_grad_(False)
    x, attn = inputs(device, torch.float16, batch=2)
    assert_fused_is_composed(monkeypatch, made, x.detach(), attn)


def test_recomputed_and_in_a_checkpoint(device: torch.device):
    x, attn = inputs(device, torch.float16)
    made = built(device)
    want = results(made, x, attn)
    y = checkpoint(made, x, attn, use_reentrant=False)
    for a, b in zip(want[1:], torch.autograd.grad(y, [x, attn, *made.parameters()], upstream(y)), strict=True):
        assert torch.equal(a, b)
    made.recompute = True
    for a, b in zip(want, results(made, x, attn), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("overwrite", [False, True])
def test_without_gradients(device: torch.device, monkeypatch: pytest.MonkeyPatch, overwrite: bool):
    x, attn = (t.detach() for t in inputs(device, torch.float16, batch=2))
    made = built(device)
    got = made(x, attn.clone(), overwrite_attn=overwrite)
    monkeypatch.setattr(MemoryBranch, "_fused", lambda *_: None)
    assert torch.equal(got, made(x, attn.clone(), overwrite_attn=overwrite))


def test_what_does_not_fit_goes_operator_by_operator(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    made, (x, attn) = built(device), inputs(device, torch.float16)
    assert made._fused(x, attn) is not None
    assert made._fused(x, attn.float()) is None
    assert made._fused(x[:, :0], attn[:, :0]) is None
    with torch.autocast(device.type, torch.bfloat16):
        assert made._fused(x, attn) is None
    made.config = made.config.replace(impl="chunk")
    assert made._fused(x, attn) is None
    made.config = made.config.replace(impl="triton")
    made.alpha.data = made.alpha.data.to(torch.float16)
    assert made._fused(x, attn) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded(dtype: torch.dtype):
    weight = torch.randn(13, 5)
    got = fused.padded(weight, dtype)
    assert got.dtype == dtype and got.shape[0] == (13 if dtype == torch.float32 else 16)
    assert torch.equal(got[:13], weight.to(dtype)) and not got[13:].any()
