"""Contests of `swa` and `swa_step`: the figures that sliding-window attention has to show."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from allmem_ops import WindowCache, swa, swa_step
from allmem_ops.ops.swa.geometry import visible_pairs
from benchmarks.gpu.contest import OURS, Contest, Gate
from benchmarks.gpu.timing import Call
from benchmarks.peers import optional
from benchmarks.peers.flex import block_mask, compiled_flex, document_mask

H100 = "NVIDIA H100"


def _directions(outputs: dict[str, Callable[[], tuple[Tensor, list[Tensor], Tensor]]]) -> dict[str, dict[str, Call]]:
    """forward without autograd, and backward alone: the graph is built once and kept."""
    calls: dict[str, dict[str, Call]] = {"forward": {}, "backward": {}}
    for name, forward in outputs.items():

        def timed(forward: Callable = forward) -> None:
            with torch.no_grad():
                forward()

        o, leaves, do = forward()
        calls["forward"][name] = timed
        calls["backward"][name] = functools.partial(torch.autograd.grad, o, leaves, do, retain_graph=True)
    return calls


def _tensors(T: int, HQ: int, HK: int, D: int, batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, T, h, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (HQ, HK, HK)]


def _heads_first(x: list[Tensor]) -> list[Tensor]:
    """FlexAttention and SDPA get [B, H, T, D] contiguous, the layout they like best."""
    return [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in x]


def _window(T: int, window: int, sinks: int, HQ: int, HK: int, D: int, full: bool) -> dict[str, dict[str, Call]]:
    x = _tensors(T, HQ, HK, D)
    y = _heads_first(x)
    do = torch.randn_like(x[0])
    do_first = do.transpose(1, 2).contiguous()
    mask = block_mask(T, window, sinks, "cuda")
    outputs: dict[str, Callable] = {
        OURS: lambda: (swa(*x, window=window, sinks=sinks), x, do),
        "flex": lambda: (compiled_flex(*y, block_mask=mask, enable_gqa=True), y, do_first),
    }
    if full:
        sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        outputs["sdpa, full causal"] = lambda: (sdpa(*y), y, do_first)
    if sinks == 0:
        for name, peer in optional.window_attention().items():
            outputs[name] = lambda peer=peer: (peer(*x, window), x, do)
    return _directions(outputs)


def _attention(
    T: int, window: int, sinks: int, gates: tuple[float, float, float, float], HQ: int = 16, HK: int = 8, D: int = 128, full: bool = False
) -> Contest:
    products = HQ * D * visible_pairs(T, T, window, sinks)
    moved = T * D * (2 * HQ + 2 * HK) * 2
    forward, forward_target, backward, backward_target = gates
    return Contest(
        "swa", f"T{T}-w{window}+{sinks}-{HQ}/{HK}x{D}", lambda: _window(T, window, sinks, HQ, HK, D, full),
        work={"forward": (4 * products, moved), "backward": (10 * products, 2 * moved)},
        gates={H100: {"forward": [Gate(forward, forward_target, "flex")], "backward": [Gate(backward, backward_target, "flex")]}},
        device_time=True,
    )  # fmt: skip


def _sinks_cost(T: int, window: int, at_most: float) -> Contest:
    """The same shape without sinks as the peer: its time over ours must not fall below 1 / `at_most`."""
    sinks, HQ, HK, D = 128, 16, 8, 128

    def build() -> dict[str, dict[str, Call]]:
        x = _tensors(T, HQ, HK, D)
        do = torch.randn_like(x[0])
        return _directions(
            {OURS: lambda: (swa(*x, window=window, sinks=sinks), x, do), "no sinks": lambda: (swa(*x, window=window), x, do)}
        )

    products = HQ * D * visible_pairs(T, T, window, sinks)
    moved = T * D * (2 * HQ + 2 * HK) * 2
    gate = Gate(1 / at_most, 1 / at_most, "no sinks")
    return Contest(
        "swa", f"sinks-cost-T{T}-w{window}", build, work={"forward": (4 * products, moved), "backward": (10 * products, 2 * moved)},
        gates={H100: {"forward": [gate], "backward": [gate]}}, device_time=True,
    )  # fmt: skip


def _prefill(queries: int, before: int, window: int, sinks: int) -> Contest:
    """A segment after what a full cache holds: the queries are the last positions."""
    T, HQ, HK, D = queries + before, 16, 8, 128

    def build() -> dict[str, dict[str, Call]]:
        q, (_, k, v) = _tensors(queries, HQ, HK, D)[0], _tensors(T, HQ, HK, D)
        y = _heads_first([q, k, v])
        mask = block_mask(T, window, sinks, "cuda", queries)

        @torch.no_grad()
        def ours() -> None:
            swa(q, k, v, window=window, sinks=sinks)

        @torch.no_grad()
        def flex() -> None:
            compiled_flex(*y, block_mask=mask, enable_gqa=True)

        return {"forward": {OURS: ours, "flex": flex}}

    products = HQ * D * visible_pairs(queries, T, window, sinks)
    return Contest(
        "swa", f"prefill-{queries}-after-{before}-w{window}+{sinks}", build,
        work={"forward": (4 * products, (2 * queries * HQ + 2 * T * HK) * D * 2)},
        gates={H100: {"forward": [Gate(1.0, 1.3, "flex")]}}, device_time=True, as_called=True,
    )  # fmt: skip


def _packed_lengths(total: int, documents: int) -> list[int]:
    """Random lengths of mean total / documents that add up to total; the same on every machine."""
    cuts = torch.randperm(total - 1, generator=torch.Generator().manual_seed(0))[: documents - 1].sort().values + 1
    return torch.diff(torch.cat([torch.tensor([0]), cuts, torch.tensor([total])])).tolist()


def _packed() -> Contest:
    total, documents, window, HQ, HK, D = 32768, 64, 512, 16, 8, 128
    lengths = _packed_lengths(total, documents)

    def build() -> dict[str, dict[str, Call]]:
        x = _tensors(total, HQ, HK, D)
        y, z = _heads_first(x), _tensors(total // documents, HQ, HK, D, batch=documents)
        do, do_batch = torch.randn_like(x[0]), torch.randn_like(z[0])
        do_first = do.transpose(1, 2).contiguous()
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        mask = document_mask(lengths, window, "cuda")
        return _directions({
            OURS: lambda: (swa(*x, window=window, cu_seqlens=cu), x, do),
            "a batch of equal lengths": lambda: (swa(*z, window=window), z, do_batch),
            "flex": lambda: (compiled_flex(*y, block_mask=mask, enable_gqa=True), y, do_first),
        })  # fmt: skip

    products = HQ * D * sum(visible_pairs(n, n, window, 0) for n in lengths)
    moved = total * D * (2 * HQ + 2 * HK) * 2
    gates = [Gate(1 / 1.15, 1 / 1.15, "a batch of equal lengths"), Gate(1.3, 1.3, "flex")]
    return Contest(
        "swa", f"packed-{documents}-documents-T{total}", build,
        work={"forward": (4 * products, moved), "backward": (10 * products, 2 * moved)},
        gates={H100: {"forward": gates, "backward": gates}}, device_time=True,
    )  # fmt: skip


def _decode(batch: int, tokens: int, gate: Gate) -> Contest:
    """One graph replays a step on each of `caches` caches in turn, so that the L2 holds none of them."""
    window, sinks, HQ, HK, D = 4096, 128, 16, 8, 128
    caches = 4 if batch > 4 else 16

    def build() -> dict[str, dict[str, Call]]:
        held = [WindowCache.empty(batch, HK, D, window=window, sinks=sinks, dtype=torch.bfloat16, device="cuda") for _ in range(caches)]
        for cache in held:
            for name in ("sink_k", "sink_v", "ring_k", "ring_v"):
                getattr(cache, name).normal_()
            cache.positions.fill_(tokens)
        q, k, v = (torch.randn(batch, 1, h, D, device="cuda", dtype=torch.bfloat16) for h in (HQ, HK, HK))

        def steps() -> None:
            for cache in held:
                swa_step(q, k, v, cache)

        return {"step": {OURS: steps}}

    keys = min(tokens, window + sinks)
    return Contest(
        "swa_step", f"B{batch}-after-{tokens}", build, work={"step": (4 * batch * HQ * D * keys, 2 * batch * HK * D * keys * 2)},
        gates={H100: {"step": [gate]}}, graph=frozenset({"step"}), inner=caches, as_called=True,
    )  # fmt: skip


CONTESTS = (
    _attention(8192, 512, 0, (1.40, 1.50, 1.08, 1.15)),
    _attention(32768, 512, 0, (1.45, 1.60, 1.08, 1.15)),
    _attention(32768, 1024, 0, (1.38, 1.50, 1.15, 1.30)),
    _attention(32768, 4096, 0, (1.30, 1.45, 1.10, 1.35), full=True),
    _attention(32768, 4096, 128, (1.30, 1.45, 1.20, 1.45)),
    _attention(131072, 8192, 0, (1.15, 1.28, 1.10, 1.40)),
    _attention(32768, 512, 0, (1.15, 1.23, 1.20, 1.29), D=64),
    _attention(32768, 4096, 0, (1.15, 1.32, 1.20, 1.53), D=64),
    _attention(32768, 512, 0, (1.15, 1.15, 1.20, 1.20), HQ=9, HK=3, D=64),
    _attention(32768, 4096, 0, (1.15, 1.15, 1.20, 1.20), HQ=9, HK=3, D=64),
    _sinks_cost(32768, 4096, 1.06),
    _sinks_cost(131072, 512, 1.35),
    _packed(),
    _decode(1, 5000, Gate(12.0, 12.0, unit="us")),
    _decode(32, 5000, Gate(80.0, 80.0, unit="% of copy")),
    _decode(128, 5000, Gate(80.0, 80.0, unit="% of copy")),
    _decode(32, 1_000_000, Gate(80.0, 80.0, unit="% of copy")),
    _prefill(2048, 4224, 4096, 128),
)
