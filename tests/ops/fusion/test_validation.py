"""`gated_fusion` names the argument, what was expected and what came."""

import pytest
import torch

from allmem_ops import gated_fusion
from tests.ops.fusion.forms import FULL

_t = torch.zeros

_BAD = {
    "memory-not-a-tensor": ({"memory": [1.0]}, "`memory` must be a torch.Tensor; got list"),
    "memory-integer": ({"memory": _t(2, 5, 3, 4, dtype=torch.int64)}, "`memory` must have dtype .*; got int64"),
    "memory-2d": ({"memory": _t(2, 5)}, r"`memory` must have shape \[B, T, H, d\]; got \[2, 5\]"),
    "memory-flat-with-norm": ({"memory": _t(2, 5, 12)}, r"`memory` must have shape \[B, T, H, d\]; got \[2, 5, 12\]"),
    "attn-tokens": ({"attn": _t(2, 4, 12)}, r"`attn` must have shape \[B, T, D\] with T=5; got \[2, 4, 12\]"),
    "attn-heads": ({"attn": _t(2, 5, 3, 4)}, r"`attn` must have shape \[B, T, D\] with B=2, T=5, D=12; got \[2, 5, 3, 4\]"),
    "attn-double": ({"attn": _t(2, 5, 12).double()}, "`attn` must have dtype .* and only there.; got float64"),
    "attn-device": ({"attn": _t(2, 5, 12, device="meta")}, "`attn` must be on cpu, the device of `memory`; got meta"),
    "alpha-shape": ({"alpha": _t(11)}, r"`alpha` must have shape \[D\] with D=12; got \[11\]"),
    "alpha-scalar": ({"alpha": 1.0}, "`alpha` must be a torch.Tensor; got float"),
    "alpha-dtype": ({"alpha": _t(12).half()}, "`alpha` must have dtype float32 .*; got float16"),
    "gate-heads": ({"gate": _t(2, 5, 4)}, r"`gate` must have shape \[B, T, H\] with H=3; got \[2, 5, 4\]"),
    "gate-tokens": ({"gate": _t(2, 6, 12)}, r"`gate` must have shape \[B, T, D\] with T=5; got \[2, 6, 12\]"),
    "gate-2d": ({"gate": _t(2, 5)}, r"`gate` must have shape \[B, T, H\] with B=2, T=5, H=3; got \[2, 5\]"),
    "gate-dtype": ({"gate": _t(2, 5, 3).bfloat16()}, "`gate` must have dtype float32 .*; got bfloat16"),
    "gate-not-a-tensor": ({"gate": True}, "`gate` must be a torch.Tensor; got bool"),
    "norm-shape": ({"norm_weight": _t(12)}, r"`norm_weight` must have shape \[d\] with d=4; got \[12\]"),
    "norm-device": ({"norm_weight": _t(4, device="meta")}, "`norm_weight` must be on cpu"),
    "eps-zero": ({"eps": 0.0}, "`eps` must be greater than 0.0; got 0.0"),
    "eps-nan": ({"eps": float("nan")}, "`eps` must be greater than 0.0; got nan"),
    "eps-tensor": ({"eps": torch.tensor(1e-6)}, "`eps` must be a number; got Tensor"),
    "impl-unknown": ({"impl": "cuda"}, "`impl` must be one of 'reference', 'chunk', 'triton', 'auto'; got 'cuda'"),
}


def _call(**changes: object) -> torch.Tensor:
    x = {**FULL.inputs(torch.float32), **changes}
    return gated_fusion(x.pop("attn"), x.pop("memory"), x.pop("alpha"), **x)


def test_the_call_is_legal_before_it_is_changed():
    assert torch.isfinite(_call()).all()


@pytest.mark.parametrize("case", _BAD)
def test_bad_input_is_a_value_error_that_names_it(case: str):
    changes, message = _BAD[case]
    with pytest.raises(ValueError, match=message):
        _call(**changes)


def test_float64_memory_needs_float64_parameters():
    x = FULL.inputs(torch.float64)
    with pytest.raises(ValueError, match="`alpha` must have dtype float64"):
        gated_fusion(x["attn"], x["memory"], x["alpha"].float())


def test_gate_heads_must_divide_the_channels_of_a_flat_memory():
    memory = _t(2, 5, 12)
    assert gated_fusion(None, memory, None, gate=_t(2, 5, 6)).shape == (2, 5, 12)
    with pytest.raises(ValueError, match=r"`gate` must have shape \[B, T, H\] with H a divisor of D=12; got \[2, 5, 5\]"):
        gated_fusion(None, memory, None, gate=_t(2, 5, 5))
    with pytest.raises(ValueError, match="a divisor of D=12"):
        gated_fusion(None, memory, None, gate=_t(2, 5, 0))


def test_options_are_keyword_only_and_an_unknown_one_is_a_type_error():
    x = FULL.inputs(torch.float32)
    with pytest.raises(TypeError):
        gated_fusion(x["attn"], x["memory"], x["alpha"], x["gate"])
    with pytest.raises(TypeError):
        gated_fusion(x["attn"], x["memory"], x["alpha"], epsilon=1e-6)
