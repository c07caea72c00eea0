"""A saved memory fits the base model and the config that it was trained with, or is refused whole."""

import json

import pytest
import torch
from safetensors import safe_open

from allmem_ops import AllMemConfig
from allmem_ops.hf import convert, load_memory, memory_parameters, save_memory
from tests.hf.tiny import awaken, tiny_config, tiny_model, tokens


def logits(model):
    with torch.no_grad():
        return model(tokens(1, 30)).logits


def test_round_trip_into_a_base_and_into_a_converted_model(live, tmp_path):
    path = save_memory(live, tmp_path / "a" / "memory")
    assert sorted(p.name for p in path.iterdir()) == ["memory.json", "memory.safetensors"]
    with safe_open(path / "memory.safetensors", "pt") as file:
        assert set(file.keys()) == set(memory_parameters(live))
    assert AllMemConfig.from_dict(json.loads((path / "memory.json").read_text())["config"]) == live.model.allmem.config
    expected = logits(live)
    assert torch.equal(logits(load_memory(tiny_model(), path)), expected)
    again = convert(tiny_model(), tiny_config())
    assert not torch.equal(logits(again), expected)
    assert torch.equal(logits(load_memory(again, str(path))), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_accepted(live, tmp_path, dtype):
    path = save_memory(live, tmp_path)
    model = load_memory(tiny_model().to(dtype), path)
    assert torch.equal(memory_parameters(model)["model.layers.0.self_attn.memory.alpha"], live.model.layers[0].self_attn.memory.alpha)


def test_saving_twice_overwrites(live, tmp_path):
    save_memory(convert(tiny_model(), tiny_config()), tmp_path)
    save_memory(live, tmp_path)
    assert torch.equal(logits(load_memory(tiny_model(), tmp_path)), logits(live))


def refused(model, path, match):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=match):
        load_memory(model, path)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_another_base_model_is_refused(live, tmp_path):
    path = save_memory(live, tmp_path)
    refused(tiny_model("mistral"), path, "with model_type='llama'; got 'mistral'")
    refused(tiny_model(hidden_size=96), path, "with hidden_size=48; got 96")
    other = tiny_model()
    torch.nn.init.normal_(other.model.layers[1].self_attn.q_proj.weight)
    refused(other, path, "must have the base weights .* other values in layer 1's q_proj")


def test_another_config_is_refused(live, tmp_path):
    path = save_memory(live, tmp_path)
    refused(
        awaken(convert(tiny_model(), tiny_config(window=9, norm="none"))), path, r"saved memory \({'window': 12, 'norm': 'pre_write'}\)"
    )


def test_damaged_files_are_refused(live, tmp_path):
    path = save_memory(live, tmp_path)
    tensors, description = (path / "memory.safetensors").read_bytes(), (path / "memory.json").read_text()
    for tenth in range(10):
        (path / "memory.safetensors").write_bytes(tensors[: len(tensors) * tenth // 10])
        refused(tiny_model(), path, "undamaged memory.safetensors")
    (path / "memory.safetensors").write_bytes(tensors)
    for text, match in (
        (description[:-20], "undamaged memory.json"),
        ("[]", "undamaged memory.json"),
        (json.dumps({**json.loads(description), "format": 2}), "format 1; got 2"),
        (json.dumps({**json.loads(description), "config": {"windows": 3}}), "must hold fields of AllMemConfig"),
        (json.dumps({**json.loads(description), "config": {"window": 0}}), "`window` must be at least 1"),
    ):
        (path / "memory.json").write_text(text)
        refused(tiny_model(), path, match)
    (path / "memory.json").write_text(json.dumps({**json.loads(description), "config": {**json.loads(description)["config"], "heads": 2}}))
    refused(tiny_model(), path, r"must hold the memory's \d+ tensors; got \d+ that differ")
    (path / "memory.json").unlink()
    refused(tiny_model(), path, "no memory.json in")
    with pytest.raises(ValueError, match="`model` must be a converted model"):
        save_memory(tiny_model(), path)
