"""Sampling: what is cut off is never drawn, and what is drawn has the probabilities of the softmax."""

import pytest
import torch

from allmem_ops.inference import Sampling

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0, -50.0]])


def frequencies(sampling: Sampling, device: torch.device, draws: int = 20000) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    tokens = sampling.choose(LOGITS.to(device).expand(draws, -1), generator)
    assert tokens.dtype == torch.int64 and tokens.shape == (draws,)
    return torch.bincount(tokens.cpu(), minlength=6) / draws


def test_greedy_takes_the_likeliest(device):
    assert Sampling().choose(LOGITS.to(device)).tolist() == [4]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(device, temperature):
    expected = (LOGITS[0] / temperature).softmax(0)
    assert (frequencies(Sampling(temperature), device) - expected).abs().max() < 0.015


def test_top_k_draws_among_the_k_likeliest(device):
    found = frequencies(Sampling(1.0, top_k=2), device)
    expected = torch.zeros(6)
    expected[[4, 0]] = LOGITS[0, [4, 0]].softmax(0)
    assert (found - expected).abs().max() < 0.015
    assert found[[1, 2, 3, 5]].sum() == 0


@pytest.mark.parametrize("top_k", [None, 5])
def test_top_p_keeps_the_fewest_that_reach_p(device, top_k):
    """Softmax in order: .63, .23, .086, ...: the first alone reaches .6; the first two .8."""
    for top_p, kept in ((0.6, [4]), (0.8, [4, 0]), (0.9, [4, 0, 1])):
        found = frequencies(Sampling(1.0, top_k=top_k, top_p=top_p), device)
        assert set(found.nonzero()[:, 0].tolist()) == set(kept)


def test_the_same_seed_gives_the_same_tokens(device):
    logits = torch.randn(64, 50, device=device)
    draws = [Sampling(1.0).choose(logits, torch.Generator(device).manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_bad_values_are_refused():
    for options, message in (
        ({"temperature": -1.0}, "`temperature` must be at least 0"),
        ({"temperature": 1.0, "top_k": 0}, "`top_k` must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "`top_p` must be greater than 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "`top_p` must be at most 1"),
        ({"top_k": 5}, "`temperature` must be above 0 with `top_k` or `top_p`"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**options)
