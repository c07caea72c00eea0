"""Contests of `rotary`: shares of the copy bandwidth, and against torch.compile of the reference."""

import functools

import torch
from torch import Tensor

from allmem_ops import rotary, rotary_table
from allmem_ops.ops.rotary.reference import rotary_reference
from benchmarks.gpu.contest import OURS, Contest, Gate
from benchmarks.gpu.timing import Call

H100 = "NVIDIA H100"
PEER = "compiled reference"

_compiled = torch.compile(rotary_reference, dynamic=False)


def _build(T: int, HQ: int, HK: int, D: int, norms: bool) -> dict[str, dict[str, Call]]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    qkv, weights = leaf(1, T, HQ + 2 * HK, D), [leaf(D) if norms else None for _ in range(2)]
    inv_freq = 10000.0 ** -(torch.arange(0, D, 2, device="cuda") / D)
    table = rotary_table(torch.arange(T, device="cuda")[None], inv_freq)
    leaves = [t for t in (qkv, *weights) if t is not None]
    up = [torch.randn(1, T, h, D, device="cuda", dtype=torch.bfloat16) for h in (HQ, HK, HK)]
    calls: dict[str, dict[str, Call]] = {"forward": {}, "backward": {}}
    for name, forward in (
        (OURS, lambda: rotary(qkv, *table, heads=HQ, heads_kv=HK, q_norm=weights[0], k_norm=weights[1])),
        (PEER, lambda: _compiled(qkv, *table, *weights, HQ, HK, 1e-6)),
    ):

        def timed(forward: Call = forward) -> None:
            with torch.no_grad():
                forward()

        calls["forward"][name] = timed
        calls["backward"][name] = functools.partial(torch.autograd.grad, list(forward()), leaves, up, retain_graph=True)
    return calls


def _rotary(T: int, HQ: int, HK: int, D: int, norms: bool, forward: list[Gate], backward: list[Gate]) -> Contest:
    half, table = 2 * T * D, 2 * 4 * T * D // 2  # bytes of a head in bf16, and of cos and sin in fp32
    moved = 2 * (HQ + HK) * half + table
    moved_back = (
        2 * (HQ + 2 * HK) * half + table + (HQ + HK) * half * norms
    )  # the three gradients, the projection's, and with norms q and k
    return Contest(
        "rotary", f"T{T}-{HQ}/{HK}x{D}" + "-norms" * norms, functools.partial(_build, T, HQ, HK, D, norms),
        work={"forward": (0, moved), "backward": (0, moved_back)}, gates={H100: {"forward": forward, "backward": backward}},
        device_time=True,
    )  # fmt: skip


_GATES = (
    [Gate(80.0, 88.0, unit="% of copy"), Gate(1.0, 1.0, PEER)],
    [Gate(70.0, 80.0, unit="% of copy"), Gate(1.0, 1.0, PEER)],
)

CONTESTS = (_rotary(32768, 16, 8, 128, True, *_GATES), _rotary(32768, 9, 3, 64, False, *_GATES))
