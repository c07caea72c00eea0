"""Replays of `gated_fusion` and `rotary`; what a replay is made of is tested in tests/ops/swa/test_replay.py."""

import pytest
import torch

from allmem_ops import gated_fusion, rotary, rotary_table
from allmem_ops.ops.kernels import replay

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(replay, "_replays", {})


@pytest.mark.skipif(not CUDA, reason="nothing is replayed in the interpreter")
def test_calls_like_one_before_are_replayed_and_give_the_same():
    kinds = {"device": "cuda", "dtype": torch.bfloat16}

    def results(shift: float) -> list[torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator, **kinds) + shift).requires_grad_()

        attn, memory, alpha, gate, weight, qkv = draw(1, 70, 64), draw(1, 70, 2, 32), draw(64), draw(1, 70, 2), draw(32), draw(1, 70, 4, 32)
        table = rotary_table(torch.arange(70, device="cuda")[None], 10.0 ** -torch.arange(16, device="cuda"))
        outputs = gated_fusion(attn, memory, alpha, gate=gate, norm_weight=weight), *rotary(qkv, *table, heads=2, heads_kv=1)
        leaves = [attn, memory, alpha, gate, weight, qkv]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])]

    for shift in (0.0, 1.0):
        replay._replays.clear()
        want = results(shift)
        assert len(replay._replays) == 4
        again, between, last = results(shift), results(shift + 1), results(shift)
        for a, b, c in zip(want, again, last, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
        assert not torch.equal(want[0], between[0])
