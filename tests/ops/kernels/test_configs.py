"""Which config a kernel is launched with."""

import pytest
import torch

from allmem_ops.ops.kernels import configs
from allmem_ops.ops.kernels.configs import Config, candidates, choose
from allmem_ops.ops.kernels.device import gpu_class, sm_count

SMALL, LARGE = Config({"BM": 64}, 4, 2), Config({"BM": 128}, 8, 3, maxnreg=168)
TABLE = {("sm80", 64): [SMALL], ("sm90", 64): [LARGE, SMALL], ("sm80", 128): [SMALL]}


def test_options_are_the_arguments_of_a_launch():
    assert SMALL.options() == {"BM": 64, "num_warps": 4, "num_stages": 2}
    assert LARGE.options() == {"BM": 128, "num_warps": 8, "num_stages": 3, "maxnreg": 168}


def test_the_newest_class_at_or_below_the_gpu_is_taken():
    assert list(candidates(TABLE, "sm80", 64)) == [SMALL]
    assert list(candidates(TABLE, "sm90", 64)) == [LARGE, SMALL]
    assert list(candidates(TABLE, "sm100", 64)) == [LARGE, SMALL]
    assert list(candidates(TABLE, "sm100", 128)) == [SMALL]
    with pytest.raises(KeyError, match="no config for shape class 32 on sm90"):
        candidates(TABLE, "sm90", 32)


def test_pinned_unless_tuning_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    timed = []

    def timer(call) -> float:
        call()
        return 2.0 if timed[-1] is LARGE else 1.0

    monkeypatch.setattr("triton.testing.do_bench", timer)
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.delenv("ALLMEM_OPS_AUTOTUNE", raising=False)
    assert choose("k", TABLE, "sm90", 64, timed.append) == LARGE
    assert timed == []
    monkeypatch.setenv("ALLMEM_OPS_AUTOTUNE", "1")
    assert choose("k", TABLE, "sm90", 64) == LARGE  # an in-place kernel gives no function to time
    assert choose("k", TABLE, "sm90", 64, timed.append) == SMALL
    assert choose("k", TABLE, "sm90", 64, timed.append) == SMALL
    assert timed == [LARGE, SMALL]  # once per shape class


def test_device_facts(device: torch.device):
    assert gpu_class(torch.device("cpu")) == "sm80" and sm_count(torch.device("cpu")) == 1
    if device.type == "cuda":
        assert gpu_class(device) in ("sm80", "sm90", "sm100") and sm_count(device) >= 1
