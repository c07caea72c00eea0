"""A converted model on the kernels: on a GPU, or a very small one in Triton's interpreter."""

import pytest
import torch

from allmem_ops.hf import convert
from allmem_ops.testing import assert_within_budget
from allmem_ops.training import fine_tune
from tests.hf.tiny import awaken, tiny_config, tiny_model, tokens

CUDA = torch.cuda.is_available()


def built(device: torch.device, impl: str, dtype: torch.dtype = torch.float32):
    """A converted model whose base has `dtype`; the memory's parameters stay float32."""
    model = tiny_model(num_hidden_layers=3 if CUDA else 1).to(dtype)
    return awaken(convert(model, tiny_config(impl=impl, head_dim=16))).to(device)


@torch.no_grad()
def test_logits_are_those_of_the_chunk_path(device: torch.device):
    ids = tokens(2, 150 if CUDA else 20).to(device)
    exact = built(device, "reference").double()(ids).logits
    low, got = (built(device, impl)(ids).logits for impl in ("chunk", "triton"))
    assert_within_budget("logits", got, low, exact)
    with pytest.raises(AssertionError):
        assert_within_budget("zeros", torch.zeros_like(got), low, exact)


@torch.no_grad()
def test_generation_token_by_token_is_that_of_the_chunk_path(device: torch.device):
    ids = tokens(2, 30 if CUDA else 8).to(device)
    options = {"max_new_tokens": 40 if CUDA else 3, "do_sample": False}
    want, got = (built(device, impl).generate(ids, **options) for impl in ("chunk", "triton"))
    assert got.shape[1] == ids.shape[1] + options["max_new_tokens"]
    assert torch.equal(got, want)


@pytest.mark.skipif(not CUDA, reason="30 training steps: hours in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_curve_is_that_of_the_chunk_path(device: torch.device, dtype: torch.dtype):
    batches = [tokens(2, 300, seed=i).to(device) for i in range(30)]
    curves = []
    for impl in ("chunk", "triton"):
        model = built(device, impl, dtype)
        curves.append(torch.tensor([step.kl for step in fine_tune(model, batches, steps=30, lr=1e-3).steps]))
    want, got = curves
    assert ((got - want).abs() / want).max() <= 0.01
    assert want[-5:].mean() < want[:5].mean()


@pytest.mark.skipif(not CUDA, reason="'auto' takes the kernels on a GPU alone")
@torch.no_grad()
def test_auto_is_the_kernels_on_a_gpu(device: torch.device):
    ids = tokens(1, 100).to(device)
    auto, triton, chunk = (built(device, impl)(ids).logits for impl in ("auto", "triton", "chunk"))
    assert torch.equal(auto, triton)
    assert not torch.equal(auto, chunk)
