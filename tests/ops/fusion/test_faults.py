"""Faults put into `gated_fusion` on purpose: the comparison of test_values.py must fail for each."""

import inspect

import pytest
import torch

from allmem_ops.ops.fusion import chunk, registration
from tests.ops.fusion.forms import FULL, gradients

_FAULTS = {
    "the gate is not a sigmoid": ("torch.sigmoid", lambda x: x.clamp(0, 1)),
    "the mean's term is missing from the norm's gradient": ("x * (dx * x)", "0 * (dx * x)"),
    "alpha's gradient before the gate": ("(g * gated)", "(g * n)"),
    "the gate's gradient without 1 - s": ("s * (1 - s)", "s"),
    "the norm's gradient without its weight": ("dm * norm_weight.to(wide)", "dm"),
    "the weight's gradient of the raw memory": ("(dm * x).sum", "(dm * m).sum"),
    "alpha missing from the gradient": ("g = g * alpha.to(wide)", "pass"),
    "gate missing from the gradient": ("(g * s).flatten(2)", "g.flatten(2)"),
}


def _largest_difference(backward) -> float:
    x = FULL.inputs()
    want = gradients(chunk.gated_fusion_reference(*x.values(), 1e-6), x)
    dy = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = backward(dy, *[v.detach() for v in list(x.values())[1:]], 1e-6)
    return max((a - b).abs().max().item() for a, b in zip(list(want.values())[1:], got, strict=True))


def test_the_comparison_passes_without_a_fault():
    assert _largest_difference(chunk.fusion_backward) < 1e-9


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_fault_in_the_backward_is_seen(fault: str):
    old, new = _FAULTS[fault]
    source = inspect.getsource(chunk.fusion_backward)
    scope = dict(vars(chunk))
    if callable(new):
        scope["fault"], new = new, "fault"
    assert source.count(old) == 1, f"the fault no longer fits the source: {old!r}"
    exec(source.replace(old, new), scope)
    assert _largest_difference(scope["fusion_backward"]) > 1e-3


def test_a_zeroed_output_is_seen(monkeypatch):
    x = FULL.inputs()
    want = chunk.gated_fusion_reference(*x.values(), 1e-6)
    monkeypatch.setattr(registration, "fusion_forward", lambda *a: torch.zeros_like(want))
    got = registration.gated_fusion_chunk(*x.values(), 1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
