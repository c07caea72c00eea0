"""Where should a memory start? What attention beyond the window adds to a pretrained model, and how much of it a memory learns to give.

    python -m benchmarks.start_of_memory --data DATA [--parts far regression] [--device cuda]     DATA: of benchmarks.distil_data

Two parts, both on SmolLM2-135M with a window of 512 and 64 sinks, rows of the standard library that training does not read:

far         nothing is trained: a row read with attention of several kinds in all layers or in five of them; the share of the window's
            loss and KL that each takes back.
              unturned   a token beyond the window is scored without RoPE
              turned     ... as if it stood 512 tokens back: content alone counts
              added      ... as the full model does, but what it brings is added to the window's output, whose own share is not reduced
regression  one branch alone is trained on a few rows to predict what attention beyond the window adds to its layer's output; R^2 on
            held-out rows, positions beyond the window; then the same with its writes switched off.

Results go to OUTPUT/start_of_memory.json, a part or a variant at a time.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from allmem_ops import AllMemConfig, MemoryBranch
from allmem_ops.layers import memory as memory_layer
from allmem_ops.layers.start import rotate_rows
from benchmarks.distil_run import held_out_rows
from benchmarks.measure import environment
from benchmarks.peers.exact_memory import exact_memory
from benchmarks.training_speed import load_smollm2

ROOT = Path(__file__).resolve().parents[1]
WINDOW, SINKS, CHUNK = 512, 64, 256
STEPS, LR = 42, 2e-3

FIRST = {"projection_init": "random", "feature_init": "independent", "w_init_scale": 1.0, "eta_init": 1e-2, "residual": True}
# "exact", "adapter", "centre" and "turn" are the run's own, the rest are fields of AllMemConfig
ATTENTION = {"qk_init": "independent", "conv_init": "token", "projection_init": "attention", "turn": 2048, "centre": True}
FEATURES = {"feature_init": "equal", "w_init_scale": 8.0, "eta_init": 1e-3, "residual": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "zero-sum, tied": {"conv_init": "zero_sum", "qk_init": "tied"},
    "adapter": {"conv_init": "zero_sum", "qk_init": "tied", "adapter": True},
    "shifted": {"conv_init": "token_zero_sum", "qk_init": "shifted"},
    "attention": ATTENTION | FEATURES,
    "attention, residual": ATTENTION | FEATURES | {"residual": True},
    "attention, queries not turned": ATTENTION | FEATURES | {"turn": 0},
    **{f"attention, turned by {n}": ATTENTION | FEATURES | {"turn": n} for n in (512, 1024, 4096)},
    "attention, gate a channel": ATTENTION | FEATURES | {"gate": "channel"},
    "attention, scale 16": ATTENTION | FEATURES | {"w_init_scale": 16.0, "eta_init": 3e-4},
    "attention, not centred": ATTENTION | FEATURES | {"centre": False},
    "attention, independent features": ATTENTION | FEATURES | {"feature_init": "independent"},
    "attention, independent features of scale 1, eta 0.1": ATTENTION | {"eta_init": 0.1},
    "attention, eta 0.003": ATTENTION | FEATURES | {"eta_init": 3e-3},
    "attention, 9 heads": ATTENTION | FEATURES | {"heads": 9},
    "attention, hidden 512": ATTENTION | FEATURES | {"hidden_dim": 512},
    "attention, exact softmax in the memory's place": ATTENTION | {"residual": False, "exact": True},
}


class Reading:
    """The model with attention of a chosen kind in each layer, by masks: for one row of a few thousand tokens."""

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.kinds = model, {}
        at = torch.arange(length, device=model.device)
        self.causal = at[:, None] >= at
        self.near = self.causal & ((at[:, None] - at < WINDOW) | (at < SINKS))
        self.heard: dict[int, tuple[Tensor, Tensor]] = {}
        self.listen: tuple[int, ...] = ()
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.forward = partial(self.attend, layer.self_attn, index)

    def attend(
        self, module: nn.Module, index: int, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> tuple[Tensor, None]:
        x, (cos, sin), D = hidden_states, position_embeddings, module.head_dim
        plain_q, plain_k, v = (p(x).view(1, x.shape[1], -1, D).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
        q, k = apply_rotary_pos_emb(plain_q, plain_k, cos, sin)
        if index in self.listen:
            found = [self._mix(q, k, v, mask) for mask in (self.causal, self.near)]
            self.heard[index] = x[0], module.o_proj(found[0] - found[1])[0]
        kind = self.kinds.get(index, "window")
        if kind in ("full", "window"):
            o = self._mix(q, k, v, self.causal if kind == "full" else self.near)
        else:
            turned = apply_rotary_pos_emb(plain_q, plain_q, cos[:, WINDOW : WINDOW + 1], sin[:, WINDOW : WINDOW + 1])[0]
            o = self._far(kind, q, k, v, {"turned": turned, "unturned": plain_q, "added": q}[kind], k if kind == "added" else plain_k)
        return module.o_proj(o), None

    @staticmethod
    def _mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)

    def _far(self, kind: str, q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor) -> Tensor:
        outputs, each = [], q.shape[1] // k.shape[1]
        for h in range(q.shape[1]):
            near, far = (a[0, h] @ b[0, h // each].T * q.shape[-1] ** -0.5 for a, b in ((q, k), (far_q, far_k)))
            p = torch.where(self.near, near, far).masked_fill(~self.causal, -torch.inf).softmax(-1)
            if kind == "added":
                p = near.masked_fill(~self.near, -torch.inf).softmax(-1) + p * ~self.near
            outputs.append(p @ v[0, h // each])
        return torch.cat(outputs, -1)[None]

    def logits(self, ids: Tensor, kinds: dict[int, str]) -> Tensor:
        self.kinds = kinds
        return self.model(ids[None], use_cache=False).logits[0, WINDOW:-1].float().log_softmax(-1)


@torch.no_grad()
def far(reading: Reading, ids: Tensor) -> dict[str, Any]:
    """Loss and KL of each kind of attention beyond the window, and the share of the window's that is taken back."""
    layers, targets = reading.model.config.num_hidden_layers, ids[WINDOW + 1 :, None]
    everywhere = {kind: dict.fromkeys(range(layers), kind) for kind in ("full", "window", "turned", "unturned", "added")}
    fives = {f"full in layers {a} to {a + 4}": dict.fromkeys(range(a, a + 5), "full") for a in range(0, layers, 5)}
    found: dict[str, Any] = {}
    reference = None
    for name, kinds in (everywhere | fives).items():
        logits = reading.logits(ids, kinds)
        reference = logits if reference is None else reference
        entry = {"loss": -logits.gather(1, targets).mean().item(), "kl": (reference.exp() * (reference - logits)).sum(-1).mean().item()}
        found[name] = entry
        if len(found) > 2:
            full, window = found["full"], found["window"]
            entry["recovery"] = (window["loss"] - entry["loss"]) / (window["loss"] - full["loss"])
            entry["kl recovery"] = 1 - entry["kl"] / window["kl"]
        print(f"{name:24}" + "  ".join(f"{key} {value:.3f}" for key, value in entry.items()), flush=True)
    return found


@torch.no_grad()
def collect(reading: Reading, rows: Tensor, layers: tuple[int, ...]) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """By layer, for each row: what attention receives in the full model, and what it adds there beyond the window."""
    found: dict[int, list] = {index: [] for index in layers}
    reading.listen = layers
    for ids in rows:
        reading.kinds = dict.fromkeys(range(max(layers) + 1), "full")
        reading.model.model(ids[None], use_cache=False)
        for index, (x, added) in reading.heard.items():
            found[index].append((x.clone(), added.clone()))
    reading.listen = ()
    return found


def regression(attention: nn.Module, inv_freq: Tensor, data: list[tuple[Tensor, Tensor]], held_out: int, changes: dict[str, Any]) -> dict:
    """R^2 of one branch trained on all but the last `held_out` rows, on those; with and without its writes."""
    changes = dict(changes)
    exact, adapter, turn, centre = (changes.pop(name, False) for name in ("exact", "adapter", "turn", "centre"))
    torch.manual_seed(0)
    config = AllMemConfig(window=WINDOW, chunk_size=CHUNK, qk_init="tied", conv_init="zero_sum", projection_init="random").replace(
        **changes
    )
    branch = MemoryBranch(data[0][0].shape[1], config, heads=3, device=data[0][0].device)
    weights = [getattr(attention, f"{name}_proj").weight.detach().float() for name in "qkvo"]
    if turn:
        weights[0] = rotate_rows(weights[0], inv_freq, turn)
    branch.start_from(weights, head_dim=attention.head_dim)
    train, test = data[:-held_out], data[-held_out:]
    if centre:
        mean = F.normalize(torch.cat([x for x, _ in train]).mean(0), dim=0)
        rows = branch.in_proj.weight.data[: branch.splits[0]]
        rows -= torch.outer(rows @ mean, mean)
    branch.writes = not adapter
    memory_layer.ttt_mlp, kept = (exact_memory if exact else memory_layer.ttt_mlp), memory_layer.ttt_mlp
    scale = torch.cat([y[WINDOW:] for _, y in train]).square().mean().sqrt()
    others = [p for name, p in branch.named_parameters() if name != "alpha"]
    groups = [{"params": others, "lr": LR}, {"params": [branch.alpha], "lr": LR * config.alpha_lr_scale}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 4, (STEPS - step) / 13))

    def misses(x: Tensor, y: Tensor) -> Tensor:
        return (branch(x[None])[0] * branch.alpha - y / scale)[WINDOW:]

    @torch.no_grad()
    def r2() -> float:
        missed = torch.cat([misses(x, y) for x, y in test]).square().mean()
        return (1 - missed / torch.cat([y[WINDOW:] / scale for _, y in test]).square().mean()).item()

    for step in range(STEPS):
        loss = misses(*train[step % len(train)]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(branch.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    found = {"R2": r2()}
    branch.writes = False
    found["R2, writes switched off"] = r2()
    memory_layer.ttt_mlp = kept
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="GGUF file, or a folder of save_pretrained; default: what the demo finds")
    parser.add_argument("--parts", nargs="+", choices=("far", "regression"), default=("far", "regression"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 20])
    parser.add_argument("--tokens", type=int, default=3072, help="of a row")
    parser.add_argument("--rows", type=int, default=4, help="that the regression trains on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cpu")
    options = parser.parse_args()
    model = load_smollm2(options.weights, torch.float32, options.device).eval()
    reading = Reading(model, options.tokens)
    test = held_out_rows(options.data / "heldout.npz", options.tokens, 4)[::2].to(options.device)  # two files
    content: dict[str, Any] = {"environment": environment(options.device), "settings": {k: str(v) for k, v in vars(options).items()}}
    options.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        (options.output / "start_of_memory.json").write_text(json.dumps(content, indent=1))

    if "far" in options.parts:
        content["far"] = far(reading, test[0])
        save()
    if "regression" in options.parts:
        ids = np.load(options.data / "train.npy", mmap_mode="r").reshape(-1)
        starts = np.random.default_rng(0).choice(len(ids) // options.tokens, options.rows, replace=False) * options.tokens
        train = torch.from_numpy(np.stack([ids[at : at + options.tokens] for at in starts]).astype(np.int64)).to(options.device)
        data = collect(reading, torch.cat([train, test]), tuple(options.layers))
        content["regression"] = {}
        for name in options.variants:
            clock, found = time.perf_counter(), {}
            for index in options.layers:
                attention = model.model.layers[index].self_attn
                found[str(index)] = regression(attention, model.model.rotary_emb.inv_freq, data[index], len(test), VARIANTS[name])
            content["regression"][name] = found
            save()
            figures = "  ".join(f"{e['R2']:.3f} ({e['R2, writes switched off']:.3f})" for e in found.values())
            print(f"{name:52} {figures}   {time.perf_counter() - clock:.0f} s", flush=True)


if __name__ == "__main__":
    main()
