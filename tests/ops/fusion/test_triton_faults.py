"""Faults put into the kernels of `gated_fusion` on purpose: the comparison with the reference must fail for each."""

import importlib.util
import inspect

import pytest
import torch

from allmem_ops.ops.fusion import chunk, launch
from allmem_ops.ops.fusion.kernels import bwd, fwd
from allmem_ops.ops.kernels import replay
from allmem_ops.ops.kernels.configs import Config
from tests.ops.fusion.forms import Form

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="faults are put in where nothing has to be compiled: in the interpreter")

# Heads that do not divide a tile's rows, several tiles a program and a token count that ends inside a tile.
FORM = Form(tokens=11, heads=3, width=12)
TILES = {("sm80", "rows"): [Config({"TILE": 64, "PER_SM": 2, "STAGES": 1}, 4, 1)]}

_FAULTS = {
    "y without attn": (fwd, "b_attn - (0.0 - b_y)", "b_y"),
    "y without its gate": (fwd, "b_y *= tl.sigmoid(tl.load(p_gates + o_h", "b_y *= 0.5 + 0 * (tl.load(p_gates + o_h"),
    "y's norm without its weight": (fwd, "inverse_rms(b_y, eps, W) * b_weight", "inverse_rms(b_y, eps, W)"),
    "y's norm over the padded width": (fwd, "inverse_rms(b_y, eps, W)", "inverse_rms(b_y, eps, BW)"),
    "only the first tile of a program": (fwd, "tl.range(0, last, step", "tl.range(0, tl.minimum(last, 1), step"),
    "the first token's gate for all": (fwd, "p_gate + token_offsets(o_t,", "p_gate + token_offsets(0 * o_t,"),
    "alpha missing from the gradient": (bwd, "b_g = b_dy * b_alpha", "b_g = b_dy"),
    "gate missing from the gradient": (bwd, "b_dn = b_g * b_s", "b_dn = b_g"),
    "the gate's gradient without 1 - s": (bwd, "b_dgate = b_s * (1 - b_s) * b_dot", "b_dgate = b_s * b_dot"),
    "the mean's term without the gate": (bwd, "b_dot *= b_s", "b_dot *= 1.0"),
    "the mean's term missing": (bwd, "b_x * (b_dot / W)", "b_x * 0.0"),
    "alpha's sum without the norm's weight": (bwd, "b_sum = b_z * b_weight", "b_sum = b_z"),
    "alpha's sum before the gate": (bwd, "b_dy *= b_s", "b_dy *= 1.0"),
    "the weight's sum without alpha": (bwd, "b_z *= b_alpha", "b_z *= 1.0"),
    "sums of the last tile only": (bwd, "b_z += b_dy * b_x", "b_z = b_dy * b_x"),
    "sums of the first program only": (bwd, "p_alpha_sums, alpha_rows,", "p_alpha_sums, 2,"),
}


def _largest_difference() -> float:
    x = {name: v.detach().to("cuda" if torch.cuda.is_available() else "cpu") for name, v in FORM.inputs(torch.float32).items()}
    dy = torch.randn(2, 11, 36, generator=torch.Generator().manual_seed(1)).to(x["memory"].device)
    inputs = list(x.values())[1:]
    got = launch.launch_forward(*x.values(), 1e-6), *launch.launch_backward(dy, *inputs, 1e-6)
    want = chunk.fusion_forward(*x.values(), 1e-6), *chunk.fusion_backward(dy, *inputs, 1e-6)
    return max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_replays", {})  # a faulty kernel is another one
    monkeypatch.setattr(launch, "_FWD", TILES)
    monkeypatch.setattr(launch, "_BWD", TILES)
    monkeypatch.setattr(launch, "sm_count", lambda device: 1)
    monkeypatch.setattr(launch, "_SUM_ROWS", 2)


def test_the_comparison_passes_without_a_fault():
    assert _largest_difference() < 1e-4


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_fault_in_a_kernel_is_seen(fault: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    module, old, new = _FAULTS[fault]
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"the fault no longer fits the source: {old!r}"
    file = tmp_path / "faulty.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty", file)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    for name in ("gated_fusion_fwd_kernel", "gated_fusion_bwd_kernel", "gated_fusion_bwd_sums_kernel"):
        if hasattr(faulty, name):
            monkeypatch.setattr(launch, name, getattr(faulty, name))
    difference = _largest_difference()
    assert not difference < 1e-3, difference
