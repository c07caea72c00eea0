"""What does a memory hold at initialisation? Its keys, features, writes and retrieval on a language model's own activations.

    python -m benchmarks.diagnose_memory [--layers L ...] [--tokens T] [--output DIR]

One held-out row of the standard library through SmolLM2-135M with a window; the branch of a layer gets what its attention receives. One
chunk (half the row) is written, the other half reads. Figures of a variant, means over its heads:

    cos q, k, v, phi  mean cosine of two tokens of the written chunk (0: in all directions, 1: parallel), phi = SiLU(Wgate k) * (Wup k)
    cos q-k           mean cosine of a token's own query and key
    rank k            effective rank of the keys, (sum s^2)^2 / sum s^4 of their singular values
    written           |written part| / |readout| at the later tokens' queries, written part = readout with writes - without
    constant          share of the written part that is the same for all queries, |mean|^2 / mean |.|^2
    key, query N      mean rank of v_i, among the values of N written tokens, by similarity to what is read at k_i, at q_i: 1 is the best,
                      0.5 is chance. The mean over tokens is taken off both sides first: a constant tells no token from another

The momentum plays no part: before the second write there is none.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from allmem_ops import AllMemConfig, MemoryBranch, memory_input, ttt_mlp
from allmem_ops.demo import smollm2
from allmem_ops.demo.corpus import standard_library, whole_rows
from allmem_ops.hf import convert
from benchmarks.measure import environment

ROOT = Path(__file__).resolve().parents[1]
HEADS, WINDOW, SINKS = 3, 256, 16
RETRIEVED = 64  # tokens among which one is to be found; the other case is the whole chunk

SPEC = {"conv_init": "uniform", "qk_init": "independent", "qk_activation": "silu", "eta_init": 1e-2, "w_init_scale": 1.0}
TIED, ZERO_SUM = {"qk_init": "tied"}, {"conv_init": "zero_sum"}
VARIANTS: dict[str, dict] = {
    "spec": {},
    "tied": TIED,
    "zero-sum": ZERO_SUM,
    "zero-sum, tied": ZERO_SUM | TIED,
    "no SiLU": {"qk_activation": "none"},
    "no SiLU, tied": {"qk_activation": "none"} | TIED,
    "q, k centred, tied": {"centred": True} | TIED,
    "no SiLU, q, k centred, tied": {"centred": True, "qk_activation": "none"} | TIED,
    "norm rms, tied, eta 1e-3": {"qk_norm": "rms", "eta_init": 1e-3} | TIED,
    "scale 2, tied": {"w_init_scale": 2.0} | TIED,
    "scale 4, tied": {"w_init_scale": 4.0} | TIED,
    "hidden 64, tied": {"hidden_dim": 64} | TIED,
    "hidden 256, tied": {"hidden_dim": 256} | TIED,
    "no residual, tied": {"residual": False} | TIED,
    **{f"eta {eta:g}": {"eta_init": eta} for eta in (1e-3, 3e-2, 1e-1, 1.0)},
    **{f"zero-sum, tied, eta {eta:g}": {"eta_init": eta} | ZERO_SUM | TIED for eta in (1e-1, 1.0, 10.0)},
    "zero-sum, tied, scale 4": {"w_init_scale": 4.0} | ZERO_SUM | TIED,
    "zero-sum, tied, scale 4, eta 1e-1": {"w_init_scale": 4.0, "eta_init": 1e-1} | ZERO_SUM | TIED,
}


def inputs_of(branch: MemoryBranch, x: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of x; `centred`: q and k less their means over the row before they are normalised, as an ideal learned bias would do."""
    if not centred:
        return branch._read_input(x)[:3]
    config, projected = branch.config, F.linear(x, branch.in_proj.weight)
    options = {"heads": branch.heads, "l2": False, "qk_activation": config.qk_activation}
    q, k, v, *_ = memory_input(projected, branch.conv_weight, branch.head_bias, **options)

    def normalised(y: Tensor, weight: Tensor | None) -> Tensor:
        y = y - y.mean(1, keepdim=True)
        if weight is not None:
            y = F.rms_norm(y, y.shape[-1:], weight, config.norm_eps)
        return y * torch.rsqrt(y.square().sum(-1, keepdim=True) + config.l2_eps) if config.qk_norm in ("rms+l2", "l2") else y

    return normalised(q, branch.q_norm), normalised(k, branch.k_norm), v


def activations(layers: list[int], tokens: int) -> dict[int, Tensor]:
    """What the attention of each layer receives, [1, tokens, d_model]."""
    weights = smollm2.find_weights()
    corpus, tokenizer = standard_library(), smollm2.load_tokenizer(weights)
    model = convert(smollm2.load_model(weights), AllMemConfig(window=WINDOW, sinks=SINKS))
    row = whole_rows(corpus, corpus.held_out, tokenizer, length=tokens, rows=1)
    found = {}

    def keep(_module: Module, _args: tuple, kwargs: dict[str, Any], _output: object, *, index: int) -> None:
        found[index] = kwargs["hidden_states"]

    for index in layers:
        model.model.layers[index].self_attn.register_forward_hook(partial(keep, index=index), with_kwargs=True)
    model.model(row, use_cache=False)
    return found


def cosine(x: Tensor) -> float:
    """Mean cosine of two different rows of [n, H, d], by head, then the mean over heads."""
    x, n = F.normalize(x, dim=-1), x.shape[0]
    return ((x.sum(0).square().sum(-1) - n) / (n * (n - 1))).mean().item()


def effective_rank(x: Tensor) -> float:
    power = torch.linalg.svdvals(x.transpose(0, 1)).square()
    return (power.sum(-1).square() / power.square().sum(-1)).mean().item()


def own_rank(read: Tensor, v: Tensor) -> float:
    """How far up v_i stands among all v_j by cosine to read_i, from 0 to 1; [n, H, d]."""
    read, v = (F.normalize(x - x.mean(0), dim=-1).transpose(0, 1) for x in (read, v))
    scores = read @ v.transpose(1, 2)
    below = (scores < scores.diagonal(dim1=1, dim2=2)[..., None]).sum(-1)
    return (below / (v.shape[1] - 1)).mean().item()


def diagnose(x: Tensor, changes: dict, seed: int) -> dict[str, float]:
    """The figures of one variant on x [1, T, d_model]."""
    changes = dict(changes)
    torch.manual_seed(seed)
    half = x.shape[1] // 2
    centred = changes.pop("centred", False)
    config = AllMemConfig(chunk_size=half, **SPEC).replace(**changes)
    branch = MemoryBranch(x.shape[-1], config, heads=HEADS)
    q, k, v = inputs_of(branch, x, centred)
    features = F.silu(torch.einsum("thd,hfd->thf", k[0], branch.w_gate)) * torch.einsum("thd,hfd->thf", k[0], branch.w_up)
    eta, mu = torch.full((*q.shape[:3], 3), config.eta_init), torch.full(q.shape[:3], config.mu_init)
    weights = branch.w_gate, branch.w_up, branch.w_down

    def read(queries: Tensor, written: int, eta: Tensor) -> Tensor:
        """The readout at `queries` after one chunk of the first `written` tokens."""
        m = queries.shape[1]
        q2, k2, v2, eta2, mu2 = (torch.cat([y[:, :written], z[:, :m]], 1) for y, z in ((q, queries), (k, k), (v, v), (eta, eta), (mu, mu)))
        options = {**branch._memory_options(), "chunk_size": written}
        return ttt_mlp(q2, k2, v2, *weights, eta2, mu2, **options).o[0, written:]

    without = read(q[:, half:], half, torch.zeros_like(eta))
    part = read(q[:, half:], half, eta) - without
    own = {
        f"{name} {n}": own_rank(read(y[:, :n], n, eta) - read(y[:, :n], n, torch.zeros_like(eta)), v[0, :n])
        for n in (RETRIEVED, half)
        for name, y in (("key", k), ("query", q))
    }
    return {
        "cos q": cosine(q[0, :half]),
        "cos k": cosine(k[0, :half]),
        "cos v": cosine(v[0, :half]),
        "cos phi": cosine(features[:half]),
        "cos q-k": F.cosine_similarity(q[0], k[0], dim=-1).mean().item(),
        "rank k": effective_rank(k[0, :half]),
        "|phi|": features.norm(dim=-1).mean().item(),
        "|v|": v[0].norm(dim=-1).mean().item(),
        "written": (part.square().mean() / (without + part).square().mean()).sqrt().item(),
        "constant": (part.mean(0).square().sum(-1) / part.square().sum(-1).mean(0)).mean().item(),
        **own,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[7, 18, 27])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cpu")
    options = parser.parse_args()
    content = {"environment": environment("cpu"), "tokens": options.tokens, "seeds": options.seeds, "layers": {}}
    for layer, x in activations(options.layers, options.tokens).items():
        table = content["layers"][layer] = {}
        for name, changes in VARIANTS.items():
            runs = [diagnose(x, changes, seed) for seed in range(options.seeds)]
            table[name] = {figure: sum(run[figure] for run in runs) / len(runs) for figure in runs[0]}
        print(f"\nlayer {layer:<29}" + "".join(f"{figure:>10}" for figure in table["spec"]))
        for name, figures in table.items():
            print(f"{name:35}" + "".join(f"{value:10.3g}" for value in figures.values()), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "diagnose_memory.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
