"""The decode step's kernels against float64, on a GPU or in the interpreter: by the error budget, at odd sizes, with faults put in."""

import pytest
import torch
from torch.nn import functional as F

from allmem_ops import AllMemConfig
from allmem_ops.hf import AllMemCache, convert
from allmem_ops.hf.convert import memory_branches
from allmem_ops.inference import launch, packed
from allmem_ops.inference.packed import PackedStep, gated, rms_norm, rotated_heads
from allmem_ops.layers.memory import MemoryBranch
from allmem_ops.testing import assert_within_budget
from tests.hf.tiny import awaken, tiny_config, tiny_model, tokens

CUDA = torch.cuda.is_available()
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if CUDA else [])]


def computed(x, weight, bias, norm, form, also, into):
    """The same in plain PyTorch, at the operands' precision."""
    y = x
    if form == "norm":
        y = rms_norm(x, norm, 1e-6)
    elif form == "gated":
        y = gated(x, F.silu)
    out = F.linear(y, weight, bias)
    if also is not None:
        out = out + F.linear(*also)
    return out if into is None else into + out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "norm", "gated"])
@pytest.mark.parametrize(
    ("B", "N", "K", "K2", "bias", "into"),
    [(1, 24, 64, 0, False, False), (2, 19, 48, 20, False, True), (3, 8, 33, 16, True, True), (1, 5, 16, 0, True, False)],
)
def test_linear(device, dtype, form, B, N, K, K2, bias, into):
    if CUDA:
        N, K, K2 = 37 * N, 24 * K, 24 * K2
    full = {
        "x": torch.randn(B, 2 * K + 3, dtype=torch.float64)[:, : 2 * K if form == "gated" else K],
        "weight": torch.randn(N, K, dtype=torch.float64) / K**0.5,
        "bias": torch.randn(N, dtype=torch.float64) if bias else None,
        "norm": 1 + 0.1 * torch.randn(K, dtype=torch.float64),
        "also": (torch.randn(B, K2, dtype=torch.float64), torch.randn(N, K2, dtype=torch.float64) / K2**0.5) if K2 else None,
        "into": torch.randn(B, N, dtype=torch.float64) if into else None,
    }

    def at(dtype, value):
        if isinstance(value, tuple):
            return tuple(at(dtype, v) for v in value)
        return None if value is None else value.to(device, dtype)

    low = {name: at(dtype, value) for name, value in full.items()}
    exact = computed(**{name: at(torch.float64, value) for name, value in low.items()}, form=form)
    plain = computed(**low, form=form)
    options = {"norm": (low["norm"], 1e-6) if form == "norm" else None, "gated": form == "gated", "also": low["also"]}
    x = torch.full((B, low["x"].shape[1] + 5), torch.nan, dtype=dtype, device=device)
    x[:, :-5] = low["x"]
    got = launch.linear(x[:, :-5], low["weight"], low["bias"], **options, into=None if not into else low["into"].clone())
    assert_within_budget("linear", got, plain, exact)
    with pytest.raises(AssertionError):
        assert_within_budget("zeros", torch.zeros_like(got), plain, exact)
    if into:
        kept = low["into"].clone()
        assert launch.linear(x[:, :-5], low["weight"], low["bias"], **options, into=kept) is kept
        assert torch.equal(kept, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "HQ", "HK", "D", "normed", "clamps"), [(1, 4, 2, 16, True, True), (2, 3, 3, 24, False, True), (3, 2, 1, 10, True, False)]
)
def test_heads(device, dtype, B, HQ, HK, D, normed, clamps):
    columns = (HQ + 2 * HK) * D + 7
    full = torch.randn(B, columns, dtype=torch.float64)
    weights = 1 + 0.1 * torch.randn(2, D, dtype=torch.float64)
    angles = torch.rand(2, B, 1, D // 2, dtype=torch.float64).repeat(1, 1, 1, 2) * 6
    tables = [(a.cos(), a.sin()) for a in angles]

    def run(function, dtype):
        norms = (*weights.to(device, dtype), 1e-6) if normed else None
        at, clamped = (tuple(t.to(device, dtype) for t in table) for table in tables)
        return function(full.to(device, dtype).to(dtype), norms, (HQ, HK), D, at, clamped if clamps else None)

    full, weights = full.to(dtype).double(), weights.to(dtype).double()
    tables = [tuple(t.to(dtype).double() for t in table) for table in tables]
    exact, plain, got = run(rotated_heads, torch.float64), run(rotated_heads, dtype), run(launch.heads, dtype)
    for name, g, p, e in zip(("q", "k", "q_sinks"), got, plain, exact, strict=True):
        if e is None:
            assert g is None
            continue
        assert_within_budget(name, g, p, e)
        with pytest.raises(AssertionError):
            assert_within_budget(name, torch.roll(g, 1, -1), p, e)
    assert (got[2] is not None) == clamps


def test_two_runs_are_bitwise_equal(device):
    x, w = torch.randn(2, 64, dtype=torch.float16, device=device), torch.randn(40, 64, dtype=torch.float16, device=device)
    norm = torch.ones(64, dtype=torch.float16, device=device), 1e-6
    assert torch.equal(launch.linear(x, w, norm=norm), launch.linear(x, w, norm=norm))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_on_the_kernels_is_the_plain_one(device, monkeypatch, family, batch):
    """The whole packed step, float16: layers with biases, with norms of the heads, without a memory."""
    config = tiny_config(head_dim=16, impl="auto" if CUDA else "chunk", memory_layers=(0,))
    model = awaken(convert(tiny_model(family, num_hidden_layers=2), config))
    model = model.to(device).half()
    for branch in memory_branches(model):
        branch.float()
    ids, found = tokens(batch, 12).to(device), {}
    for name, parts in (("plain", packed._Plain), ("kernels", packed._Kernels), ("exact", packed._Plain)):
        step = PackedStep(model.double() if name == "exact" else model)
        monkeypatch.setattr(step, "_parts", lambda x, parts=parts: parts())
        cache, active = AllMemCache(model, batch), torch.ones(batch, dtype=torch.bool, device=device)
        found[name] = torch.stack([step(token, active, cache) for token in ids.split(1, 1)], 1)
    assert_within_budget("logits", found["kernels"], found["plain"], found["exact"])


def test_the_memory_beside_attention_is_the_plain_step(device, monkeypatch):
    """One chain of launches, with attention, memory and fold by kernels, over the end of a chunk: logits and the whole state, float32."""
    config = tiny_config(head_dim=16, hidden_dim=16, chunk_size=3, impl="triton")
    model = awaken(convert(tiny_model("qwen3", num_hidden_layers=1), config)).to(device)
    ids, active, found = tokens(2, 4).to(device), torch.tensor([True, False], device=device), []
    for parts in (packed._Plain, packed._Kernels):
        step, cache = PackedStep(model), AllMemCache(model, 2)
        monkeypatch.setattr(step, "_parts", lambda x, parts=parts: parts())
        logits = [step(token, active | (i > 1), cache) for i, token in enumerate(ids.split(1, 1))]
        layer = cache.layers[0]
        states = (layer.window, layer.memory.memory, layer.memory.conv)
        found.append({"logits": torch.stack(logits)} | {name: t for state in states for name, t in state.tensors().items()})
    plain, chain = found
    assert set(plain) == set(chain) and plain["count"].tolist() == [1, 2]
    for name, tensor in plain.items():
        torch.testing.assert_close(chain[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((dtype, {}) for dtype in DTYPES),
        (torch.float32, {"gate": "channel", "conv_size": 1, "qk_norm": "l2", "qk_activation": "none", "readout_norm": False}),
        (torch.float32, {"gate": "none", "conv_size": 2, "qk_norm": "rms", "residual": not AllMemConfig().residual}),
    ],
)
@torch.no_grad()
def test_memory_is_the_three_kernels_it_stands_for(device, dtype, options):
    """Readout and every tensor of the state over chunk edges, with a row that is not active at times; a branch without writes."""
    config = AllMemConfig(
        **{"window": 16, "sinks": 2, "chunk_size": 4, "head_dim": 16, "hidden_dim": 16, "heads": 2, "impl": "triton", **options}
    )
    branch = MemoryBranch(32, config, device=device)
    for p in branch.parameters():
        p.add_(0.1 * torch.randn_like(p))
    states = [branch.initial_state(3, dtype) for _ in range(2)]
    for step in range(6):  # the chunk's end is at 4
        branch.writes = step != 3
        # columns behind those of the memory, as `PackedStep` has them
        x = torch.randn(3, branch.in_proj.out_features + 5, device=device).to(dtype)
        active = torch.tensor([True, step % 3 != 1, step > 2], device=device)
        expected = branch.step_readout(x[:, None], states[0], active)[:, 0]
        got, fold = launch.memory(x, branch, states[1], active)
        fold()
        # In half precision a key may be rounded to its neighbour, by which a gradient differs.
        close = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 5e-3}
        torch.testing.assert_close(got, expected, **close)
        for part in ("memory", "conv"):
            one, other = (getattr(state, part).tensors() for state in states)
            for name, tensor in one.items():
                torch.testing.assert_close(other[name], tensor, **close, msg=lambda text, name=name: f"{name}: {text}")
    assert got.abs().max() > 0.01 and not torch.equal(states[1].memory.w_gate[0], states[1].memory.w_gate[2])
