"""Contests of `gated_fusion`: shares of the copy bandwidth, and against torch.compile of the reference."""

import functools

import torch
from torch import Tensor

from allmem_ops import gated_fusion
from allmem_ops.ops.fusion.reference import gated_fusion_reference
from benchmarks.gpu.contest import OURS, Contest, Gate
from benchmarks.gpu.timing import Call

H100 = "NVIDIA H100"
PEER = "compiled reference"

_compiled = torch.compile(gated_fusion_reference, dynamic=False)

# form -> which of (attn, alpha, gate, norm_weight) it has
FORMS = {"norm+gate+alpha": (True, True, True), "norm+gate, no attention": (False, True, True), "alpha": (True, False, False)}


def _build(T: int, H: int, d: int, form: str) -> dict[str, dict[str, Call]]:
    with_attn, with_gate, with_norm = FORMS[form]

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    attn, alpha = (leaf(1, T, H * d), leaf(H * d)) if with_attn else (None, None)
    gate, norm_weight = leaf(1, T, H) if with_gate else None, leaf(d) if with_norm else None
    memory = leaf(1, T, H, d)
    leaves = [t for t in (attn, memory, alpha, gate, norm_weight) if t is not None]
    calls: dict[str, dict[str, Call]] = {"forward": {}, "backward": {}}
    dy = torch.randn(1, T, H * d, device="cuda", dtype=torch.bfloat16)
    for name, forward in (
        (OURS, lambda: gated_fusion(attn, memory, alpha, gate=gate, norm_weight=norm_weight)),
        (PEER, lambda: _compiled(attn, memory, alpha, gate, norm_weight, 1e-6)),
    ):

        def timed(forward: Call = forward) -> None:
            with torch.no_grad():
                forward()

        calls["forward"][name] = timed
        calls["backward"][name] = functools.partial(torch.autograd.grad, forward(), leaves, dy, retain_graph=True)
    return calls


def _fusion(T: int, H: int, d: int, form: str, forward: list[Gate], backward: list[Gate]) -> Contest:
    with_attn, with_gate, _ = FORMS[form]
    D = H * d
    elements = T * (2 * D + D * with_attn + H * with_gate)
    # dy, memory and gate in; dmemory and dgate out; dattn is dy
    elements_back = T * (3 * D + 2 * H * with_gate)
    return Contest(
        "gated_fusion", f"T{T}-{H}x{d}-{form}", functools.partial(_build, T, H, d, form),
        work={"forward": (0, 2 * elements), "backward": (0, 2 * elements_back)}, gates={H100: {"forward": forward, "backward": backward}},
        device_time=True,
    )  # fmt: skip


_SHARE = Gate(88.0, 88.0, unit="% of copy"), Gate(75.0, 75.0, unit="% of copy")
# Never slower than the compiled reference.
_LEVEL = Gate(1.0, 1.0, PEER)

CONTESTS = (
    *(_fusion(32768, H, 64, "norm+gate+alpha", [_SHARE[0], _LEVEL], [_SHARE[1], Gate(2.0, 2.0, PEER)]) for H in (16, 32)),
    *(_fusion(32768, 16, 64, form, [_SHARE[0], _LEVEL], [_SHARE[1], _LEVEL]) for form in ("norm+gate, no attention", "alpha")),
)
