"""Contests of `memory_input`: shares of the copy bandwidth, and fla-core's convolution and norms where it is installed."""

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from allmem_ops import memory_input
from benchmarks.gpu.contest import OURS, Contest, Gate
from benchmarks.gpu.timing import Call
from benchmarks.peers import optional

H100 = "NVIDIA H100"
TAPS = 4


def _build(T: int, H: int, d: int) -> dict[str, dict[str, Call]]:
    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)

    projected = leaf(1, T, 3 * H * d + 5 * H, dtype=torch.bfloat16)
    weights = leaf(3 * H * d, TAPS), leaf(5 * H)
    norms = {"q_norm": leaf(d), "k_norm": leaf(d)}
    leaves = [projected, *weights, *norms.values()]

    def ours() -> tuple[Tensor, ...]:
        return memory_input(projected, *weights, heads=H, **norms)[:6]

    up = [torch.randn_like(y) for y in ours()]
    calls: dict[str, dict[str, Call]] = {"forward": {}, "backward": {}}
    peers = {name: functools.partial(peer, projected, *weights, H, *norms.values()) for name, peer in optional.memory_input().items()}
    for name, forward in ({OURS: ours} | peers).items():

        def timed(forward: Call = forward) -> None:
            with torch.no_grad():
                forward()

        calls["forward"][name] = timed
        calls["backward"][name] = functools.partial(torch.autograd.grad, forward(), leaves, up, retain_graph=True)
    return calls


def _memory_input(T: int, H: int, d: int, forward: list[Gate], backward: list[Gate]) -> Contest:
    read = 2 * T * (3 * H * d + 5 * H)
    written = 2 * T * (3 * H * d + H) + 4 * T * 4 * H  # q, k, v, gate; eta and mu in fp32
    return Contest(
        "memory_input", f"T{T}-{H}x{d}", functools.partial(_build, T, H, d),
        work={"forward": (2 * TAPS * T * 3 * H * d, read + written), "backward": (6 * TAPS * T * 3 * H * d, 2 * read + written)},
        gates={H100: {"forward": forward, "backward": backward}}, device_time=True, as_called=True,
    )  # fmt: skip


_FASTER = [Gate(1.0, 1.0, "fla-core")] if find_spec("fla") else []

CONTESTS = (_memory_input(32768, 8, 64, [Gate(80.0, 80.0, unit="% of copy"), *_FASTER], [Gate(65.0, 65.0, unit="% of copy"), *_FASTER]),)
