"""Contests of the layers: `MemoryBranch`, and the whole token mixer against the same layer with full attention."""

import functools

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


def _directions(layers: dict[str, tuple[torch.nn.Module, Tensor]]) -> dict[str, dict[str, Call]]:
    """forward without autograd; forward and backward with the gradients of the input and of every parameter."""
    calls: dict[str, dict[str, Call]] = {"forward": {}, "forward and backward": {}}
    for name, (layer, x) in layers.items():
        up, leaves = torch.randn_like(x), [x, *layer.parameters()]

        def forward(layer: torch.nn.Module = layer, x: Tensor = x) -> None:
            with torch.no_grad():
                layer(x)

        def both(layer: torch.nn.Module = layer, x: Tensor = x, leaves: list[Tensor] = leaves, up: Tensor = up) -> None:
            torch.autograd.grad(layer(x), leaves, up)

        calls["forward"][name], calls["forward and backward"][name] = forward, both
    return calls


def _input(T: int, d_model: int) -> Tensor:
    return torch.randn(1, T, d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def _branch(T: int, forward: Gate, both: Gate) -> Contest:
    d_model = 1024

    def build() -> dict[str, dict[str, Call]]:
        return _directions({OURS: (_awake(MemoryBranch(d_model, CONFIG, device="cuda")), _input(T, d_model))})

    width = CONFIG.heads * CONFIG.head_dim
    flops = 2 * T * d_model * (4 * width + 5 * CONFIG.heads) + 18 * T * width * CONFIG.hidden
    moved = 2 * T * 2 * d_model
    return Contest(
        "memory_branch", f"Qwen3-0.6B-T{T}", build, work={"forward": (flops, moved), "forward and backward": (3 * flops, 3 * moved)},
        gates={H100: {"forward": [forward], "forward and backward": [both]}}, as_called=True,
    )  # fmt: skip


def _mixer(model: str, T: int, forward: list[Gate], both: list[Gate], quarter: bool = False) -> Contest:
    d_model, heads, heads_kv, head_dim = MODELS[model]
    config = CONFIG if model != "SmolLM2-135M" else CONFIG.replace(heads=3)

    def build() -> dict[str, dict[str, Call]]:
        qk_norm = model.startswith("Qwen3")
        mixer = TokenMixer(
            d_model, heads=heads, heads_kv=heads_kv, head_dim=head_dim, config=config, qk_norm=qk_norm, device="cuda", dtype=torch.bfloat16
        )
        x = _input(T, d_model)
        layers = {OURS: (_awake(mixer), x), SDPA: (FullAttention(mixer, sdpa), x)}
        if T <= 32768:
            layers[FLEX] = (FullAttention(mixer, flex), x)
        if quarter:
            layers[QUARTER] = (mixer, _input(T // 4, d_model))
        return _directions(layers)

    width = config.heads * config.head_dim
    projections = 2 * T * d_model * (2 * (heads + heads_kv) * head_dim + 4 * width + 5 * config.heads)
    flops = projections + 4 * heads * head_dim * visible_pairs(T, T, config.window, config.sinks) + 18 * T * width * config.hidden
    moved = 2 * T * 2 * d_model
    return Contest(
        "token_mixer", f"{model}-T{T}", functools.partial(build),
        work={"forward": (flops, moved), "forward and backward": (3 * flops, 3 * moved)},
        gates={H100: {"forward": forward, "forward and backward": both}},
    )  # fmt: skip


def _faster(gate: float, target: float) -> list[Gate]:
    return [Gate(gate, target, SDPA)]


LINEAR = Gate(1 / 4.25, 1 / 4.25, QUARTER)

CONTESTS = (
    _branch(32768, Gate(0.9, 0.9, unit="ms"), Gate(3.2, 3.2, unit="ms")),
    _mixer("Qwen3-0.6B", 4096, _faster(0.6, 0.6), _faster(0.6, 0.6)),
    _mixer("Qwen3-0.6B", 32768, _faster(2.2, 2.2), _faster(2.0, 2.0)),
    _mixer("Qwen3-0.6B", 131072, [*_faster(8.0, 9.5), LINEAR], [*_faster(7.0, 8.5), LINEAR], quarter=True),
    _mixer("Qwen3-1.7B", 32768, [], []),
    _mixer("Qwen3-1.7B", 131072, [], []),
    _mixer("SmolLM2-135M", 32768, [], []),
    _mixer("SmolLM2-135M", 131072, [], []),
)
