"""The cost model against FLOPs counted on real forward passes, against bytes of real states, and against the paper."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from allmem_ops import AllMemConfig, MemoryBranch, WindowCache, swa, ttt_mlp
from allmem_ops.cost import (
    MixerShape,
    attention_flops,
    cache_bytes,
    decode_flops,
    memory_flops,
    memory_parameters,
    memory_state_bytes,
    prefill_flops,
    projection_flops,
)
from allmem_ops.ops.swa.geometry import visible_pairs

QWEN3_06B = SimpleNamespace(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128, num_hidden_layers=28)
QWEN3_17B = SimpleNamespace(hidden_size=2048, num_attention_heads=16, num_key_value_heads=8, head_dim=128, num_hidden_layers=28)
SMOLLM2_135M = SimpleNamespace(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30)
PAPER = AllMemConfig(window=4096, sinks=128, chunk_size=2048)
SMALL = MixerShape(
    d_model=48,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    layers=3,
    window=16,
    sinks=4,
    chunk_size=8,
    memory_heads=2,
    memory_dim=8,
    memory_hidden=16,
    memory_layers=2,
)


def _counted(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _memory_inputs(shape: MixerShape, tokens: int) -> tuple[torch.Tensor, ...]:
    heads, d, h = shape.memory_heads, shape.memory_dim, shape.memory_hidden
    q, k, v = torch.randn(3, 1, tokens, heads, d).unbind(0)
    weights = [torch.randn(heads, *size) for size in ((h, d), (h, d), (d, h))]
    return q, k, v, *weights, torch.rand(1, tokens, heads, 3), torch.rand(1, tokens, heads)


# ---- the paper


@pytest.mark.parametrize(("model", "exact", "steady"), [(QWEN3_06B, 10.5, 10.4), (QWEN3_17B, 8.2, 8.1)], ids=["0.6B", "1.7B"])
def test_compute_at_128k_is_about_a_ninth(model: SimpleNamespace, exact: float, steady: float):
    shape = MixerShape.from_config(model, PAPER)
    full = prefill_flops(shape, 131072, "full")
    assert round(full / prefill_flops(shape, 131072, "allmem"), 1) == exact
    assert round(full / decode_flops(shape, 131072, "allmem"), 1) == steady


@pytest.mark.parametrize(("model", "millions"), [(QWEN3_06B, 66), (QWEN3_17B, 126)], ids=["0.6B", "1.7B"])
def test_parameters_are_the_papers(model: SimpleNamespace, millions: int):
    assert round(memory_parameters(MixerShape.from_config(model, PAPER)) / 1e6) in (millions, millions - 1)


def test_parameters_of_smollm2():
    assert round(memory_parameters(MixerShape.from_config(SMOLLM2_135M, PAPER)) / 1e6, 1) == 15.8


@pytest.mark.parametrize(
    "changes", [{}, {"gate": "channel"}, {"gate": "none", "qk_norm": "l2"}, {"readout_norm": False, "conv_size": 1}, {"hidden_dim": 20}]
)
def test_parameters_equal_those_of_the_layer(changes: dict):
    config = PAPER.replace(head_dim=8, **changes)
    model = SimpleNamespace(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    branch = MemoryBranch(48, config, heads=2)
    assert memory_parameters(MixerShape.from_config(model, config)) == sum(p.numel() for p in branch.parameters())


# ---- counted FLOPs


def test_projections_equal_the_counted_ones():
    s, tokens = SMALL, 5
    sizes = [(s.d_model, s.n_heads * s.head_dim), *[(s.d_model, s.n_kv_heads * s.head_dim)] * 2, (s.n_heads * s.head_dim, s.d_model)]
    layers = [nn.Linear(*size, bias=False) for size in sizes]
    assert _counted(lambda: [layer(torch.randn(tokens, layer.in_features)) for layer in layers]) == tokens * projection_flops(s)


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_attention_equals_the_counted_flops(tokens: int):
    s = SMALL
    q, k, v = (torch.randn(1, tokens, heads, s.head_dim) for heads in (s.n_heads, s.n_kv_heads, s.n_kv_heads))
    # The reference computes every pair of its dense mask, the chunk operator reports the visible ones.
    dense = _counted(lambda: swa(q, k, v, window=s.window, sinks=s.sinks, impl="reference"))
    assert dense == attention_flops(s, tokens * tokens)
    banded = _counted(lambda: swa(q, k, v, window=s.window, sinks=s.sinks, impl="chunk"))
    assert banded == attention_flops(s, visible_pairs(tokens, tokens, s.window, s.sinks))


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_memory_equals_the_counted_flops(impl: str):
    s, tokens = SMALL, 4 * SMALL.chunk_size
    counted = _counted(lambda: ttt_mlp(*_memory_inputs(s, tokens), chunk_size=s.chunk_size, impl=impl))
    assert counted == tokens * s.memory_heads * 18 * s.memory_dim * s.memory_hidden


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_the_branch_equals_the_counted_flops(impl: str):
    s, tokens = SMALL, 4 * SMALL.chunk_size
    config = AllMemConfig(window=s.window, sinks=s.sinks, chunk_size=s.chunk_size, heads=s.memory_heads, head_dim=s.memory_dim, impl=impl)
    branch, x = MemoryBranch(s.d_model, config), torch.randn(1, tokens, s.d_model)
    counted = _counted(lambda: branch(x))
    # The convolution is 0.5 % of the branch here; the counter sees it only where it runs as a convolution.
    conv = 2 * s.conv_size * 3 * s.memory_heads * s.memory_dim
    assert counted in (tokens * memory_flops(s), tokens * (memory_flops(s) - conv))


# ---- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_equal_those_of_real_states(dtype: torch.dtype):
    config = AllMemConfig(window=16, sinks=4, chunk_size=8, heads=2, head_dim=8)
    model = SimpleNamespace(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=10, num_hidden_layers=3)
    shape = MixerShape.from_config(model, config.replace(memory_layers=(0, 2)), element_size=dtype.itemsize)
    window = WindowCache.empty(1, 2, 10, window=16, sinks=4, dtype=dtype, device="cpu")
    state = MemoryBranch(48, config).initial_state(1, dtype)
    assert memory_state_bytes(shape) == state.nbytes
    for length in (1, 10_000):
        assert cache_bytes(shape, length, "swa") == 3 * window.nbytes
        assert cache_bytes(shape, length, "allmem") == 3 * window.nbytes + 2 * state.nbytes
        assert cache_bytes(shape, length, "full") == 3 * 2 * length * 2 * 10 * dtype.itemsize


# ---- the sums


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 9))
def test_prefill_is_the_mean_of_its_tokens(length: int, window: int, sinks: int):
    shape = replace(SMALL, window=window, sinks=sinks)
    for mixer in ("full", "swa", "allmem"):
        tokens = [decode_flops(shape, n, mixer) for n in range(1, length + 1)]
        assert prefill_flops(shape, length, mixer) == pytest.approx(sum(tokens) / length, rel=1e-12)


def test_allmem_adds_the_memory_in_the_layers_that_have_one():
    for cost in (prefill_flops, decode_flops):
        assert cost(SMALL, 100, "allmem") - cost(SMALL, 100, "swa") == pytest.approx(2 * memory_flops(SMALL))
    assert cache_bytes(SMALL, 100, "allmem") - cache_bytes(SMALL, 100, "swa") == 2 * memory_state_bytes(SMALL)


def test_full_attention_is_the_window_that_covers_everything():
    wide = replace(SMALL, window=100, sinks=0)
    assert prefill_flops(wide, 100, "full") == prefill_flops(wide, 100, "swa")
    assert prefill_flops(wide, 101, "full") > prefill_flops(wide, 101, "swa")


# ---- arguments


def test_bad_arguments_name_themselves():
    for name, value, message in [
        ("window", 0, "`window` must be at least 1; got 0"),
        ("layers", 2.0, "`layers` must be an int"),
        ("n_kv_heads", 3, "`n_heads` must be a multiple of n_kv_heads=3; got 4"),
        ("memory_layers", 4, "`memory_layers` must be at most layers=3; got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **{name: value})
    with pytest.raises(ValueError, match="`mixer` must be one of 'full', 'swa', 'allmem'; got 'mamba'"):
        prefill_flops(SMALL, 10, "mamba")
    with pytest.raises(ValueError, match="`length` must be at least 1"):
        decode_flops(SMALL, 0, "swa")
    with pytest.raises(ValueError, match="`model_config` must have the attribute num_attention_heads; got SimpleNamespace"):
        MixerShape.from_config(SimpleNamespace(hidden_size=8), PAPER)
