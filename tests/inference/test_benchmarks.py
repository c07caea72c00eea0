"""What the benchmarks of inference compare: the peer computes full attention, bytes are those of the cost formulas, gates see a miss."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from allmem_ops.cost import cache_bytes, memory_state_bytes
from allmem_ops.hf import AllMemCache, convert, full_attention
from allmem_ops.inference.packed import PackedStep
from benchmarks.gpu import inference, inference_report, step_profile
from benchmarks.gpu.contest import OURS
from benchmarks.gpu.report import written
from benchmarks.peers.static_cache import FullAttentionStep, StaticCache, sdpa
from tests.hf.tiny import awaken, tiny_config, tiny_model, tokens


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_the_peer_is_full_attention_over_a_static_cache(family):
    model, ids = awaken(convert(tiny_model(family), tiny_config())), tokens(2, 30)
    step, cache, found = FullAttentionStep(model, sdpa), StaticCache(model, 2, 30), []
    for t, token in enumerate(ids.split(1, 1)):
        cache.positions.fill_(t)
        cache.context = t + 1
        found.append(step(token, torch.ones(2, dtype=torch.bool), cache))
    with full_attention(model):
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.stack(found, 1), expected, atol=2e-4, rtol=0)
    assert cache.nbytes == 3 * 2 * 2 * 30 * 3 * 16 * 4


@pytest.mark.parametrize("name", sorted(inference.SHAPES))
def test_the_states_bytes_by_part_are_those_of_the_formulas(name):
    """At full size, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(inference.SHAPES[name], dtype=torch.bfloat16)
    cache = AllMemCache(convert(model, inference.CONFIG), 1)
    shape = inference.shape_of(name)
    window, memory = (sum(getattr(layer, part).nbytes for layer in cache.layers) for part in ("window", "memory"))
    assert window == cache_bytes(shape, 1_000_000, "swa")
    assert memory == shape.memory_layers * memory_state_bytes(shape)
    assert cache.nbytes == cache_bytes(shape, 1, "allmem") == cache_bytes(shape, 10**6, "allmem")


@pytest.mark.parametrize("name", sorted(inference.SHAPES))
def test_the_least_bytes_of_a_step_are_those_of_the_tensors_it_reads(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(inference.SHAPES[name], dtype=torch.bfloat16)
    convert(model, inference.CONFIG)
    packed = PackedStep(model)
    weights = packed.nbytes + model.get_output_embeddings().weight.nbytes
    weights += sum(layer.module.mlp.down_proj.weight.nbytes + layer.attention.o_proj.weight.nbytes for layer in packed.layers)
    for layer in packed.layers:  # zeros that fill up to a multiple of 8 rows
        rows = [p.out_features for p in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj, layer.branch.in_proj)]
        weights -= layer.inputs[0][sum(rows) :].nbytes
    cache = AllMemCache(model, 3)
    state = sum(layer.window.nbytes + sum(t.nbytes for t in layer.memory.memory.rounded) for layer in cache.layers)
    assert inference.step_bytes(name, 3) == weights + state


def test_a_profile_is_shared_out_among_the_parts():
    kernels = [
        step_profile.Kernel(*k)
        for k in (
            ("nvjet_a", 0.0, 5.0),
            ("swa_step_split_kernel", 5.0, 10.0),
            ("ttt_mlp_step_token_kernel", 6.0, 4.0),
            ("swa_step_merge_kernel", 12.0, 6.0),
            ("step_linear_kernel", 18.0, 3.0),
            ("nvjet_vocabulary", 21.0, 100.0),
            ("reduce", 121.0, 2.0),
        )
    ]
    least = step_profile.least_bytes("Qwen3-0.6B", 3)
    assert sum(least.values()) == inference.step_bytes("Qwen3-0.6B", 3)
    found = step_profile.by_part(kernels, least)
    assert {part: (p["kernels"], p["sum_us"], p["busy_us"]) for part, p in found.items()} == {
        step_profile.PRODUCTS: (2, 8.0, 8.0),
        step_profile.ATTENTION: (2, 16.0, 13.0),
        step_profile.MEMORY: (1, 4.0, 4.0),
        step_profile.VOCABULARY: (1, 100.0, 100.0),
        step_profile.REST: (1, 2.0, 2.0),
    }
    assert step_profile.by_name(kernels)[0] == {"name": "nvjet_vocabulary", "launches": 1, "sum_us": 100.0}


def test_contests_call_the_step_of_each(monkeypatch):
    """On a CPU with a tiny shape: every contestant runs, and ours is where it is said to be."""
    shape = tiny_model("qwen3").config
    monkeypatch.setitem(inference.SHAPES, "tiny", shape)
    small = inference.build_model(shape, tiny_config(), "cpu", torch.float32)
    monkeypatch.setattr(inference, "_model", lambda name: small)
    monkeypatch.setattr(inference, "flex", sdpa)
    monkeypatch.setattr(inference, "LONG", 40)
    for batch, other in ((1, inference.LIBRARY), (2, inference.KERNELS)):
        calls = inference._steps("tiny", batch, 40, True, True)["step"]
        assert set(calls) == {OURS, other, inference.AT_8K, inference.SDPA, inference.FLEX}
        for call in calls.values():
            call()
            call()


def test_a_stream_is_measured_and_judged():
    shape = tiny_model("qwen3").config
    model = inference.build_model(shape, tiny_config(), "cpu", torch.float32)
    ids = inference.library_bytes(400)
    assert ids.shape == (1, 400) and ids.max() < 256 and len(ids.unique()) > 20
    found = inference.read_stream(model, ids % 97, 16)
    assert len(found["tokens_per_s_by_tenth"]) == 10 and found["tokens"] == 400
    assert found["cache_bytes"] == AllMemCache(model, 1).nbytes
    assert list(found["peak_bytes_by_tokens"]) == ["16", "32", "64", "128", "256"]
    stream = inference.Stream("Qwen3-0.6B", least=80_000.0)
    good = {
        "tokens_per_s": 90_000.0,
        "tokens_per_s_by_tenth": [90_000.0] * 9 + [87_000.0],
        "peak_bytes_first": 10**9,
        "peak_bytes_last": 10**9 + 10,
    }
    assert all(v["passed"] for v in inference.judge_stream(stream, good, "NVIDIA H100 80GB HBM3"))
    for change, gate in (
        ({"tokens_per_s": 79_000.0}, "tokens/s"),
        ({"tokens_per_s_by_tenth": [90_000.0] * 9 + [85_000.0]}, "last tenth over first tenth"),
        ({"peak_bytes_last": 10**9 + 2_000_000}, "high-water mark after the first segment, bytes more"),
    ):
        verdicts = inference.judge_stream(stream, good | change, "NVIDIA H100 80GB HBM3")
        assert [v["gate"] for v in verdicts if not v["passed"]] == [gate]
    assert len(inference.judge_stream(dataclasses.replace(stream, least=None), good, "NVIDIA H100")) == 2


def test_greedy_tokens_are_compared_with_one_pass(monkeypatch):
    model = inference.build_model(tiny_model("qwen3").config, tiny_config(), "cpu", torch.float32)
    found = inference.greedy_against_one_pass(model, tokens(1, 20), 30)
    assert found["largest_gap"] < 1e-4 * found["logits_rms"] and found["tokens"] == 30 and found["distinct_tokens"] > 3
    assert (found["eager_tokens"], found["eager_first_difference"], found["eager_gap"]) == (30, None, 0)
    model.generation_config.eos_token_id = None
    monkeypatch.setattr(inference.Decoder, "generate", lambda self, count: tokens(1, count, seed=3))
    wrong = inference.greedy_against_one_pass(model, tokens(1, 20), 30)
    assert wrong["first_divergence"] < 3 and wrong["divergences"] > 20
    assert wrong["eager_first_difference"] < 3 and wrong["eager_gap"] > 0


def test_the_report_is_drawn_from_the_results(tmp_path):
    """Every figure of a result stands in its table; the page holds the markers, and what the committed results say."""
    root = Path(__file__).parents[2]
    environment = {"device": "NVIDIA H100", "torch": "2.11", "commit": "abc"}
    verdict = {"direction": "step", "against": inference.SDPA, "unit": "x", "figure": 5.25, "gate": 4.0, "target": 4.0}
    step = {OURS: {"ms": 1.25, "percent_of_copy": 48.2}, inference.AT_8K: {"ms": 1.26}, inference.SDPA: {"ms": 6.5}}
    verdicts = [verdict | {"passed": True, "reached": True}]
    contest = {"name": "Qwen3-0.6B-B4-131072", "directions": {"step": step}, "verdicts": verdicts}
    stream = {"name": "stream-x", "weights": "random", "tokens_per_s": 90000.0, "tokens_per_s_by_tenth": [91000.0, 89000.0]}
    stream |= {
        "peak_bytes_first": 1234567,
        "peak_bytes_last": 1234568,
        "verdicts": [{"gate": "g", "figure": 1, "mark": 2, "passed": False}],
    }
    run = {"dtype": "torch.bfloat16", "tokens": 2000, "first_divergence": 17, "divergences": 3, "largest_gap": 0.5, "logits_rms": 2.0}
    run |= {"eager_tokens": 1500, "eager_first_difference": None}
    part = {"kernels": 112, "sum_us": 700.4, "busy_us": 690.2, "least_bytes": 3 * 10**8}
    profiled = {"name": "p", "ms": 1.5, "kernels": 300, "copy_kernels": 4, "parts": {"products": part}, "copy_bytes_per_s": 3e12}
    contents = {"decode": {"contests": [contest]}, "stream": {"streams": [stream]}, "equality": {"runs": [run]}}
    contents["step_profile"] = {"profiles": [profiled]}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"environment": environment}))
    text = inference_report.report(tmp_path)
    for figure in (
        "1.250",
        "1.260",
        "6.500",
        "48 %",
        "2.26 GB / 60.13 GB",
        "5.25 x full",
        "89,000",
        "1,234,568 bytes",
        "**missed**",
        "| 17 | 3 | 0.25 | 1500, none |",
        "| p: 1.500 ms, 300 kernels, 4 that copy | products | 112 | 700 us | 690 us | 300 MB | 100 us |",
        "| together | 565,901,056 | 130,050,600 |",
        "| 0.038 = 1/26.6 | 0.043 = 1/23.2 |",
    ):
        assert figure in text, figure
    page = (root / "docs" / "inference.md").read_text()
    text = inference_report.report(root / "benchmarks" / "results" / "h100")
    assert written(page, text, inference_report.BEGIN, inference_report.END) == page
