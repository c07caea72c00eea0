"""`warmup` runs what a layer will launch, and says how long it took."""

import pytest
import torch

from allmem_ops import AllMemConfig, TokenMixer, warmup

SHAPE = {"d_model": 32, "heads": 2, "heads_kv": 1, "head_dim": 16}
CONFIG = AllMemConfig(heads=1, head_dim=16, hidden_dim=16, window=4096, chunk_size=2048)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """(tokens, whether with a state, whether packed, whether with gradients) of each call of a mixer."""
    found, forward = [], TokenMixer.forward

    def recorded(self, x, *, state=None, cu_seqlens=None, active=None):
        found.append((tuple(x.shape[:2]), state is not None, cu_seqlens is not None, torch.is_grad_enabled()))
        return forward(self, x, state=state, cu_seqlens=cu_seqlens, active=active)

    monkeypatch.setattr(TokenMixer, "forward", recorded)
    return found


def test_everything_is_run(calls):
    assert warmup(CONFIG, **SHAPE, batch=2, packed=True, dtype=torch.float32, device="cpu") > 0
    assert calls == [
        ((2, 256), False, False, True), ((1, 256), False, True, True),
        ((2, 256), True, False, False), ((2, 192), True, False, False), ((2, 1), True, False, False), ((2, 1), True, False, False),
    ]  # fmt: skip


def test_only_what_is_asked_for(calls):
    warmup(CONFIG, **SHAPE, training=False, decoding=False, dtype=torch.float32, device="cpu")
    assert calls == [((1, 256), False, False, False)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "`batch` must be"),
        ({"dtype": torch.float64}, "`dtype` must be one of bfloat16, float16, float32; got torch.float64"),
        ({"config": None}, "`config` must be an AllMemConfig; got NoneType"),
        ({"training": 1}, "`training` must be"),
        ({"batch": 300, "packed": True}, "`batch` must be at most 256 with `packed`; got 300"),
        ({"heads": 3, "heads_kv": 2}, "`heads` must be a multiple of heads_kv=2; got 3"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        warmup(**{"config": CONFIG, **SHAPE, "dtype": torch.float32, "device": "cpu", **change})
