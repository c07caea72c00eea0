"""Contests of `ttt_mlp` and `ttt_mlp_step`: the figures that the memory has to show.

    python -m benchmarks.gpu.ttt_mlp        # compiles the loop that is the peer of two of them, into torch's cache

Run before the contests it spares them the minutes that a peer compiles.
"""

import functools
import multiprocessing
import time

import torch
from torch import Tensor

from allmem_ops import MemoryState, ttt_mlp, ttt_mlp_step
from allmem_ops.ops.ttt_mlp.tail import TAIL_TOKENS
from benchmarks.gpu.contest import OURS, Contest, Gate
from benchmarks.gpu.timing import Call
from benchmarks.peers.chunk_loop import chunk_loop, chunk_step

H100 = "NVIDIA H100"
PEER = "compiled loop"

_compiled_step = torch.compile(chunk_step, fullgraph=True, dynamic=False)


def _inputs(B: int, T: int, H: int, d: int, h: int) -> dict[str, Tensor]:
    x = {n: torch.randn(B, T, H, d, device="cuda") for n in "qkv"}
    x |= {n: torch.nn.functional.normalize(x[n], dim=-1) for n in "qk"}
    x = {n: t.to(torch.bfloat16) for n, t in x.items()}
    x |= {n: torch.randn(H, h, d, device="cuda") * d**-0.5 for n in ("w_gate", "w_up")}
    x |= {"w_down": torch.randn(H, d, h, device="cuda") * h**-0.5}
    return x | {"eta": torch.rand(B, T, H, 3, device="cuda") * 2e-3, "mu": torch.rand(B, T, H, device="cuda")}


def _training(B: int, T: int, H: int, d: int, h: int, chunk: int, peer_graph: bool) -> dict[str, dict[str, Call]]:
    x = {n: t.requires_grad_() for n, t in _inputs(B, T, H, d, h).items()}
    do = torch.randn_like(x["q"])

    def ours() -> Tensor:
        return ttt_mlp(*x.values(), chunk_size=chunk).o

    with torch.no_grad():  # the peer has sequences and heads as one dimension, contiguous
        y = [x[n].transpose(1, 2).flatten(0, 1).contiguous() for n in "qkv"]
        y += [x[n].repeat(B, 1, 1) for n in ("w_gate", "w_up", "w_down")]
        y += [x[n].transpose(1, 2).flatten(0, 1).contiguous() for n in ("eta", "mu")]
    y = [t.requires_grad_() for t in y]
    do_peer = do.transpose(1, 2).flatten(0, 1).contiguous()
    calls: dict[str, dict[str, Call]] = {"forward": {}, "forward and backward": {}}
    for name, forward, leaves, up in (
        (OURS, ours, list(x.values()), do),
        (PEER, lambda: chunk_loop(*y, chunk, _compiled_step), y, do_peer),
    ):

        def timed(forward: Call = forward) -> None:
            with torch.no_grad():
                forward()

        def both(forward: Call = forward, leaves: list[Tensor] = leaves, up: Tensor = up) -> None:
            torch.autograd.grad(forward(), leaves, up)

        if name == OURS or peer_graph:
            calls["forward"][name] = timed
            calls["forward and backward"][name] = both
    return calls


def allowed_bytes(B: int, T: int, H: int, d: int, h: int, chunk: int) -> int:
    """What forward and backward may take beside their inputs (issue 4): o and the gradients, 1.5 times the stored states, and 64 MB.

        o, dq, dk, dv       4 * 2 d bytes a token and head
        deta, dmu           16 bytes a token and head
        dW_0                12 d h bytes a head
        stored states       (4 + 2) * 3 d h bytes a chunk and head: W_j in fp32, the cotangents of the chunk's gradients in bf16

    Linear in T.
    """
    chunks = B * -(-T // chunk)
    return B * T * H * (8 * d + 16) + 12 * H * d * h + 3 * chunks * H * 6 * d * h * 3 // 2 + 64 * 10**6


def _memory(B: int, H: int, T: int, d: int, h: int, chunk: int, forward: list[Gate], both: list[Gate], peer: bool) -> Contest:
    moved = B * T * H * (4 * d * 2 + 16) + 3 * H * d * h * 4
    moved_back = B * T * H * (7 * d * 2 + 32) + 6 * H * d * h * 4
    work = 18 * d * h * B * T * H
    if d == 64 and not peer:
        bound = allowed_bytes(B, T, H, d, h, chunk) / 1e6
        both = [*both, Gate(bound, bound, unit="MB")]
    return Contest(
        "ttt_mlp", f"{B * H}x{d}x{h}-T{T}-c{chunk}" + "-against-a-loop" * peer, functools.partial(_training, B, T, H, d, h, chunk, peer),
        work={"forward": (work, moved), "forward and backward": (3 * work, moved + moved_back)},
        gates={H100: {"forward": forward, "forward and backward": both}},
        graph=frozenset({"forward", "forward and backward"}), as_called=True,
    )  # fmt: skip


def _decode(batch: int, gates: list[Gate], steps: int = 1) -> Contest:
    """One graph replays `steps` steps of 4 states in turn (1 MB each at batch 1: with 64 states the L2 holds none of them).

    One step: no fold is due. As many as a tail holds: in one of them every row folds, and the time is the average.
    """
    H, d, h, chunk = 8, 64, 128, 2048
    states = 4 if batch >= 16 else 64

    def build() -> dict[str, dict[str, Call]]:
        x = _inputs(batch, 1, H, d, h)
        weights = [x.pop(n) for n in ("w_gate", "w_up", "w_down")]
        held = [MemoryState.initial(*weights, batch=batch, chunk_size=chunk, dtype=torch.bfloat16) for _ in range(states)]

        def decode() -> None:
            for _ in range(steps):
                for state in held:
                    ttt_mlp_step(*x.values(), state)

        return {"step": {OURS: decode}}

    return Contest(
        "ttt_mlp_step", f"B{batch}-{H}x{d}x{h}" + f"-mean-of-{steps}" * (steps > 1), build,
        work={"step": (18 * batch * H * d * h, 3 * batch * H * d * h * 4)},
        gates={H100: {"step": gates}}, graph=frozenset({"step"}), inner=states * steps, as_called=steps == 1,
    )  # fmt: skip


def _ms(gate: float, target: float) -> list[Gate]:
    return [Gate(gate, target, unit="ms"), Gate(gate, target, unit="ms as called")]


CONTESTS = (
    _memory(1, 8, 32768, 64, 128, 2048, _ms(0.40, 0.30), _ms(1.5, 1.1), peer=False),
    _memory(1, 8, 32768, 64, 128, 512, _ms(0.80, 0.60), _ms(2.6, 1.9), peer=False),
    _memory(8, 8, 8192, 64, 128, 2048, _ms(0.45, 0.35), _ms(1.8, 1.4), peer=False),
    _memory(1, 8, 131072, 64, 128, 2048, _ms(1.6, 1.15), _ms(5.8, 4.2), peer=False),
    _memory(1, 16, 32768, 128, 256, 2048, _ms(1.6, 1.3), _ms(6.2, 5.2), peer=False),
    _decode(1, [Gate(8.0, 8.0, unit="us")]),
    _decode(64, [Gate(20.0, 20.0, unit="us")]),
    _decode(1, [Gate(8.0, 8.0, unit="us")], TAIL_TOKENS),
    _decode(64, [Gate(20.0, 20.0, unit="us")], TAIL_TOKENS),
)

AGAINST_A_LOOP = (
    _memory(1, 4, 32768, 128, 512, 4096, [Gate(1.0, 1.0, PEER)], [Gate(1.0, 1.0, PEER)], peer=True),
    _memory(
        1, 8, 32768, 64, 128, 2048,
        [Gate(12.0, 17.0, PEER, "x as called"), Gate(1.0, 1.0, PEER)], [Gate(16.0, 23.0, PEER, "x as called"), Gate(1.0, 1.0, PEER)],
        peer=True,
    ),
)  # fmt: skip


def compile_peer(contest: Contest) -> None:
    """Run every call of a contest once."""
    torch.manual_seed(0)
    for direction, calls in contest.build().items():
        for name, call in calls.items():
            start = time.monotonic()
            call()
            torch.cuda.synchronize()
            print(f"{contest} | {direction} | {name} | first call {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(len(AGAINST_A_LOOP)) as pool:
        pool.map(compile_peer, AGAINST_A_LOOP)
