"""Can the memory learn to recall? Associative recall far outside the window, with writes on and off, for variants of the memory.

    python -m benchmarks.recall [--variants NAME ...] [--common C] [--steps N] [--seeds S ...] [--output DIR]

A sequence stores key/value pairs, passes a stretch of filler longer than window and chunk, and then asks for every key once. Values are
drawn anew in each sequence, so only what was written into the memory can tell them: without writes the accuracy stays at chance.

--common adds one vector, C times as long as a token's own, to all embeddings and freezes them: in a language model all hidden states share
a direction (cosine of two tokens 0.37 to 0.59 in SmolLM2, which is C = 0.8 to 1.2), and the memory must do with them as they are.
Results are added to the file; a run of the same variant, C and seed is replaced.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allmem_ops import AllMemConfig, MemoryBranch, swa
from benchmarks.measure import environment

PAIRS, VALUES, FILLERS, GAP = 8, 16, 16, 16
WINDOW, CHUNK = 8, 16
D_MODEL, LAYERS, HEADS, HEAD_DIM = 64, 2, 2, 32
KEYS = 32
VOCABULARY = KEYS + VALUES + FILLERS
CHANCE = 1 / VALUES
ROOT = Path(__file__).resolve().parents[1]

SPEC = {"conv_init": "uniform", "qk_init": "independent", "qk_activation": "silu", "eta_init": 1e-2, "w_init_scale": 1.0, "mu_init": 0.5}
TIED, ZERO_SUM, PLAIN = {"qk_init": "tied"}, {"conv_init": "zero_sum"}, {"qk_activation": "none"}
# name: changes of the specification's config; "writes" is the run's own
VARIANTS: dict[str, dict] = {
    "writes off": {"writes": False},
    "writes off, zero-sum, tied": {"writes": False} | ZERO_SUM | TIED,
    "spec": {},
    **{f"eta {eta:g}": {"eta_init": eta} for eta in (1e-3, 3e-2, 1e-1, 3e-1, 1.0)},
    "tied": TIED,
    **{f"tied, eta {eta:g}": {"eta_init": eta} | TIED for eta in (1e-3, 3e-2, 1e-1, 3e-1, 1.0)},
    "no SiLU": PLAIN,
    "no SiLU, tied": PLAIN | TIED,
    "no SiLU, tied, eta 0.1": {"eta_init": 1e-1} | PLAIN | TIED,
    "no residual, tied": {"residual": False} | TIED,
    "no residual, tied, eta 0.1": {"residual": False, "eta_init": 1e-1} | TIED,
    "scale 2, tied": {"w_init_scale": 2.0} | TIED,
    "scale 4, tied": {"w_init_scale": 4.0} | TIED,
    "zero-sum": ZERO_SUM,
    "zero-sum, tied": ZERO_SUM | TIED,
    **{f"zero-sum, tied, eta {eta:g}": {"eta_init": eta} | ZERO_SUM | TIED for eta in (1e-1, 1.0)},
    "zero-sum, tied, scale 4": {"w_init_scale": 4.0} | ZERO_SUM | TIED,
    "mu 0.1, tied, eta 0.1": {"mu_init": 0.1, "eta_init": 1e-1} | TIED,
    "mu 0.9, tied, eta 0.1": {"mu_init": 0.9, "eta_init": 1e-1} | TIED,
    "norm rms, tied, eta 0.001": {"qk_norm": "rms", "eta_init": 1e-3} | TIED,
}


class Block(nn.Module):
    """Sliding-window attention with the memory beside it, then an MLP: a decoder layer after the paper, without rotation."""

    def __init__(self, config: AllMemConfig) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(D_MODEL), nn.RMSNorm(D_MODEL)
        self.qkv, self.out = nn.Linear(D_MODEL, 3 * D_MODEL, bias=False), nn.Linear(D_MODEL, D_MODEL, bias=False)
        self.memory = MemoryBranch(D_MODEL, config)
        self.mlp = nn.Sequential(nn.Linear(D_MODEL, 2 * D_MODEL), nn.SiLU(), nn.Linear(2 * D_MODEL, D_MODEL))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)
        x = x + self.memory(y, self.out(swa(q, k, v, window=WINDOW).flatten(2)))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """Token ids to logits of the next token."""

    def __init__(self, config: AllMemConfig, writes: bool, common: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D_MODEL)
        if common:
            self.embed.weight.data += common * torch.randn(D_MODEL)
            self.embed.weight.requires_grad_(False)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(D_MODEL), nn.Linear(D_MODEL, VOCABULARY, bias=False)
        for block in self.blocks:
            block.memory.writes = writes

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids))))


def sequences(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids [batch, T] and the targets [batch, PAIRS] at the queries, which stand at every second of the last 2 * PAIRS positions."""
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (batch, PAIRS), generator=generator)
    filler = KEYS + VALUES + torch.randint(FILLERS, (batch, GAP), generator=generator)
    order = torch.rand(batch, PAIRS, generator=generator).argsort(1)
    stored = torch.stack([keys, values], -1).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    return torch.cat([stored, filler, asked], 1), values.gather(1, order)


def train(changes: dict, *, common: float, steps: int, batch: int, lr: float, seed: int) -> dict:
    """One run: accuracy at the queries of fresh sequences, every 50 steps."""
    changes = dict(changes)
    writes = changes.pop("writes", True)
    torch.manual_seed(seed)
    config = AllMemConfig(chunk_size=CHUNK, heads=HEADS, head_dim=HEAD_DIM, **SPEC).replace(**changes)
    model = Model(config, writes, common)
    alphas = [p for name, p in model.named_parameters() if name.endswith("alpha")]
    others = [p for name, p in model.named_parameters() if not name.endswith("alpha")]
    optimiser = torch.optim.AdamW(
        [{"params": others, "lr": lr}, {"params": alphas, "lr": lr * config.alpha_lr_scale}], weight_decay=0.0, betas=(0.9, 0.95)
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 20))
    generator = torch.Generator().manual_seed(seed)
    fresh = sequences(256, torch.Generator().manual_seed(10_000))
    curve, diverged, clock = [], False, time.perf_counter()
    for step in range(1, steps + 1):
        ids, targets = sequences(batch, generator)
        loss = F.cross_entropy(model(ids)[:, -2 * PAIRS :: 2].flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            diverged = True
            break
        optimiser.step()
        warmup.step()
        if step % 50 == 0 or step == steps:
            curve.append([step, loss.item(), accuracy(model, *fresh)])
    ms = (time.perf_counter() - clock) / step * 1e3
    eta = [F.softplus(b.memory.head_bias[: 3 * HEADS]).mean().item() for b in model.blocks]
    return {"curve": curve, "diverged": diverged, "ms_per_step": ms, "eta_after": eta, "last_step": step}


@torch.no_grad()
def accuracy(model: Model, ids: Tensor, targets: Tensor) -> float:
    return (model(ids)[:, -2 * PAIRS :: 2].argmax(-1) == targets).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--common", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cpu")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "recall.json"
    content = json.loads(path.read_text()) if path.exists() else {"chance": CHANCE, "window": WINDOW, "chunk": CHUNK, "runs": []}
    amount = {"common": options.common, "steps": options.steps, "batch": options.batch, "lr": options.lr}
    print(f"accuracy at the queries every 50 steps, chance {CHANCE:.3f}, common {options.common:g}")
    for name in options.variants:
        for seed in options.seeds:
            facts = {"variant": name, "seed": seed, **amount}
            run = {**facts, "environment": environment("cpu"), **train(VARIANTS[name], seed=seed, **amount)}
            content["runs"] = [r for r in content["runs"] if any(r[key] != value for key, value in facts.items())] + [run]
            path.write_text(json.dumps(content, indent=1))
            points = " ".join(f"{a:.3f}" for _, _, a in run["curve"])
            note = f"diverged at step {run['last_step']}" if run["diverged"] else f"eta {', '.join(f'{e:.2g}' for e in run['eta_after'])}"
            print(f"{name:28} seed {seed}: {points}  {note}; {run['ms_per_step']:.0f} ms a step", flush=True)


if __name__ == "__main__":
    main()
