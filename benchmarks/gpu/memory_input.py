"""Contests of `memory_input`: shares of the copy bandwidth."""

import functools

import torch
from torch import Tensor

from allmem_ops import memory_input
from benchmarks.gpu.contest import OURS, Contest, Gate
from benchmarks.gpu.timing import Call

H100 = "NVIDIA H100"
TAPS = 4


def _build(T: int, H: int, d: int) -> dict[str, dict[str, Call]]:
    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)

    projected = leaf(1, T, 3 * H * d + 5 * H, dtype=torch.bfloat16)
    weights = leaf(3 * H * d, TAPS), leaf(5 * H)
    norms = {"q_norm": leaf(d), "k_norm": leaf(d)}
    leaves = [projected, *weights, *norms.values()]

    def forward() -> tuple[Tensor, ...]:
        return memory_input(projected, *weights, heads=H, **norms)[:6]

    def timed() -> None:
        with torch.no_grad():
            forward()

    outputs = forward()
    up = [torch.randn_like(y) for y in outputs]
    backward = functools.partial(torch.autograd.grad, outputs, leaves, up, retain_graph=True)
    return {"forward": {OURS: timed}, "backward": {OURS: backward}}


def _memory_input(T: int, H: int, d: int, forward: list[Gate], backward: list[Gate]) -> Contest:
    read = 2 * T * (3 * H * d + 5 * H)
    written = 2 * T * (3 * H * d + H) + 4 * T * 4 * H  # q, k, v, gate; eta and mu in fp32
    return Contest(
        "memory_input", f"T{T}-{H}x{d}", functools.partial(_build, T, H, d),
        work={"forward": (2 * TAPS * T * 3 * H * d, read + written), "backward": (6 * TAPS * T * 3 * H * d, 2 * read + written)},
        gates={H100: {"forward": forward, "backward": backward}}, device_time=True,
    )  # fmt: skip


CONTESTS = (_memory_input(32768, 8, 64, [Gate(80.0, 80.0, unit="% of copy")], [Gate(65.0, 65.0, unit="% of copy")]),)
