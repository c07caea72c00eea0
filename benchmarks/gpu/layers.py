"""Contests of the layers: `MemoryBranch`, and the whole token mixer against the same layer with full attention."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allmem_ops import AllMemConfig, MemoryBranch, TokenMixer
from allmem_ops.ops.swa.geometry import visible_pairs
from benchmarks.gpu.contest import OURS, Contest, Gate
from benchmarks.gpu.timing import Call
from benchmarks.peers.full_attention import FullAttention, flex, sdpa

H100 = "NVIDIA H100"
SDPA, FLEX, QUARTER = "full attention, SDPA", "full attention, FlexAttention", "ours at a quarter of T"
CONFIG = AllMemConfig(window=4096, sinks=128, chunk_size=2048, heads=8, head_dim=64, hidden_dim=128)

# name -> d_model, heads, heads_kv, head_dim
MODELS = {"Qwen3-0.6B": (1024, 16, 8, 128), "Qwen3-1.7B": (2048, 16, 8, 128), "SmolLM2-135M": (576, 9, 3, 64)}


def _awake(module: torch.nn.Module) -> torch.nn.Module:
    """alpha and the heads' weights away from zero, so that every gradient is one."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return module


@dataclass(frozen=True)
class _Entry:
    """A contestant: a layer, and what it is called with."""

    layer: torch.nn.Module
    inputs: tuple[Tensor, ...]

    def forward(self) -> None:
        with torch.no_grad():
            self.layer(*self.inputs)

    def both(self, up: Tensor) -> None:
        """With the gradients of the inputs and of every parameter."""
        torch.autograd.grad(self.layer(*self.inputs), [*self.inputs, *self.layer.parameters()], up)


def _directions(entries: dict[str, _Entry]) -> dict[str, dict[str, Call]]:
    ups = {name: torch.randn_like(e.inputs[0]) for name, e in entries.items()}
    return {
        "forward": {name: e.forward for name, e in entries.items()},
        "forward and backward": {name: functools.partial(e.both, ups[name]) for name, e in entries.items()},
    }


def _input(T: int, d_model: int) -> Tensor:
    return torch.randn(1, T, d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def _both(parts: dict[str, float], moved: int) -> dict[str, tuple[int, int]]:
    """Work of both directions, from that of the forward's parts: backward repeats attention's scores and doubles everything else."""
    backward = {"attention": 2.5}
    forward = sum(parts.values())
    return {
        "forward": (forward, moved),
        "forward and backward": (sum(flops * (1 + backward.get(part, 2)) for part, flops in parts.items()), 3 * moved),
    }


def _memory_flops(T: int, d_model: int, config: AllMemConfig) -> dict[str, int]:
    width = config.heads * config.head_dim
    return {"memory projections": 2 * T * d_model * (4 * width + 5 * config.heads), "memory": 18 * T * width * config.hidden}


def _branch(T: int, forward: Gate, both: Gate) -> Contest:
    d_model = 1024

    def build() -> dict[str, dict[str, Call]]:
        branch = _awake(MemoryBranch(d_model, CONFIG, device="cuda"))
        return _directions({OURS: _Entry(branch, (_input(T, d_model), _input(T, d_model)))})

    moved = 2 * T * 3 * d_model  # the hidden state, attention's output and the sum
    return Contest(
        "memory_branch", f"Qwen3-0.6B-T{T}", build, work=_both(_memory_flops(T, d_model, CONFIG), moved),
        gates={H100: {"forward": [forward], "forward and backward": [both]}}, device_time=True, as_called=True,
    )  # fmt: skip


def _mixer(
    model: str, T: int, forward: Sequence[Gate] = (), both: Sequence[Gate] = (), quarter: bool = False, both_peers: bool = False
) -> Contest:
    """`both_peers`: full attention by FlexAttention too, which compiles for 10 s and more; SDPA is the faster one on an H100."""
    d_model, heads, heads_kv, head_dim = MODELS[model]
    config = CONFIG if model != "SmolLM2-135M" else CONFIG.replace(heads=3)

    def build() -> dict[str, dict[str, Call]]:
        qk_norm = model.startswith("Qwen3")
        mixer = TokenMixer(
            d_model, heads=heads, heads_kv=heads_kv, head_dim=head_dim, config=config, qk_norm=qk_norm, device="cuda", dtype=torch.bfloat16
        )
        x = _input(T, d_model)
        entries = {OURS: _Entry(_awake(mixer), (x,)), SDPA: _Entry(FullAttention(mixer, sdpa), (x,))}
        if both_peers:
            entries[FLEX] = _Entry(FullAttention(mixer, flex), (x,))
        if quarter:
            entries[QUARTER] = _Entry(mixer, (_input(T // 4, d_model),))
        return _directions(entries)

    def work(T: int, full: bool = False) -> dict[str, tuple[int, int]]:
        pairs = visible_pairs(T, T, *((T, 0) if full else (config.window, config.sinks)))
        attention = {"projections": 2 * T * d_model * 2 * (heads + heads_kv) * head_dim, "attention": 4 * heads * head_dim * pairs}
        return _both(attention | ({} if full else _memory_flops(T, d_model, config)), 2 * T * 2 * d_model)

    return Contest(
        "token_mixer", f"{model}-T{T}" + ("-both-peers" if both_peers else ""), build,
        work=work(T), work_of={SDPA: work(T, full=True), FLEX: work(T, full=True), QUARTER: work(T // 4)},
        gates={H100: {"forward": list(forward), "forward and backward": list(both)}},
        # Launched one by one, a short sequence is as slow as the host that launches it, and a long one alone waits for its first kernel as
        # it does nowhere in a model, where the layer before still runs.
        graph=frozenset(("forward", "forward and backward")) if T <= 8192 else frozenset(), as_called=T <= 16384, device_time=T > 8192,
        least=5 if T < 65536 else 3,  # full attention over 131072 tokens takes half a second
    )  # fmt: skip


def _faster(gate: float, target: float) -> list[Gate]:
    return [Gate(gate, target, SDPA)]


LINEAR = Gate(1 / 4.25, 1 / 4.25, QUARTER)

# Those with gates first, then what the figure shows, and last what compiles: a run that is cut short has the others.
CONTESTS = (
    _branch(32768, Gate(0.9, 0.9, unit="ms"), Gate(3.2, 3.2, unit="ms")),
    _mixer("Qwen3-0.6B", 131072, [*_faster(8.0, 9.5), LINEAR], [*_faster(7.0, 8.5), LINEAR], quarter=True),
    _mixer("Qwen3-0.6B", 4096, _faster(0.6, 0.6), _faster(0.6, 0.6)),
    _mixer("Qwen3-0.6B", 32768, _faster(2.2, 2.2), _faster(2.0, 2.0)),
    *(_mixer("Qwen3-0.6B", T) for T in (65536, 16384, 8192)),
    *(_mixer(model, T) for model in ("Qwen3-1.7B", "SmolLM2-135M") for T in (4096, 8192, 16384, 32768, 65536, 131072)),
    _mixer("Qwen3-0.6B", 32768, both_peers=True),
)
