"""The attention modules' replaced forward: the bits of transformers' own."""

import copy

import pytest
import torch

from allmem_ops.hf import convert
from allmem_ops.hf import forward as replaced
from allmem_ops.hf.layout import Layout
from allmem_ops.hf.runtime import runtime_of
from tests.hf.tiny import FAMILY_NAMES, awaken, tiny_config, tiny_model, tokens

CUDA = torch.cuda.is_available()


def built(family: str, dtype: torch.dtype, device: torch.device | str = "cpu", **options):
    return awaken(convert(tiny_model(family).to(dtype), tiny_config(**options))).to(device)


def own_forward(model):
    """A copy whose attention modules run transformers' forward."""
    model = copy.deepcopy(model)
    for attention in runtime_of(model).attentions(model):
        del attention.forward
    return model


@pytest.fixture
def turned(monkeypatch) -> list[int]:
    """One entry a call of `rotary`."""
    calls: list[int] = []
    original = replaced.rotary
    monkeypatch.setattr(replaced, "rotary", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_logits_and_gradients_are_those_of_the_class_bit_for_bit(family: str, dtype: torch.dtype, turned: list[int]):
    model, ids = built(family, dtype), tokens(2, 40)
    found = []
    for one in (model, own_forward(model)):
        logits = one(ids).logits
        parameters = [p for p in one.parameters() if p.requires_grad]
        found.append([logits, *torch.autograd.grad(logits.float().square().mean(), parameters)])
    assert len(turned) == 2 * 3
    (logits, *gradients), (want, *want_gradients) = found
    assert torch.equal(logits, want)
    for got, want in zip(gradients, want_gradients, strict=True):
        if family == "qwen3":  # the norm's backward is one formula here and a chain of rounded steps there
            assert (got - want).norm() <= (0.05 if dtype == torch.bfloat16 else 1e-5) * want.norm()
        else:
            assert torch.equal(got, want)


@pytest.mark.skipif(not CUDA, reason="the kernels in bfloat16")
@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_the_kernels_give_the_bits_of_the_class_in_bfloat16(family: str, turned: list[int]):
    model, ids = built(family, torch.bfloat16, "cuda", head_dim=16), tokens(2, 200).cuda()
    got, want = (one(ids).logits for one in (model, own_forward(model)))
    assert turned
    if family == "qwen3":
        assert (got - want).float().norm() <= 0.02 * want.float().norm()
    else:
        assert torch.equal(got, want)


@torch.no_grad()
def test_generation_with_padding_is_that_of_the_class(turned: list[int]):
    model = built("qwen3", torch.float32)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    got, want = (one.generate(ids, **options) for one in (model, own_forward(model)))
    assert turned and torch.equal(got, want)


@pytest.mark.parametrize("why", ["autocast", "another kind of projection"])
@torch.no_grad()
def test_what_does_not_fit_goes_the_class_own_way(why: str, turned: list[int]):
    model, ids = built("qwen3", torch.bfloat16), tokens(1, 20)
    for attention in runtime_of(model).attentions(model):
        if why == "another kind of projection":
            attention.q_proj = torch.nn.Sequential(attention.q_proj)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        got, want = (one(ids).logits for one in (model, own_forward(model)))
    assert not turned and torch.equal(got, want)


def test_packed_rows_without_padding_are_handed_on_uncopied():
    layout = Layout(tiny_config(), (12,), True, None, 0, batch=2, tokens=3, cu_seqlens=torch.tensor([0, 4, 6]))
    x = torch.randn(2, 3, 4, 5)
    packed = layout.pack(x)
    assert packed.shape == (1, 6, 4, 5) and packed.data_ptr() == x.data_ptr()
    back = layout.unpack(packed)
    assert torch.equal(back, x) and back.data_ptr() == x.data_ptr()
