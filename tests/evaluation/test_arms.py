"""Each arm is what its name says, and leaves the model as it was."""

import copy

import pytest
import torch

from allmem_ops.evaluation.arms import ADAPTER, ALLMEM, ARMS, LABELS, NTK, checkpoint_arm, memory_tensors, ntk_arm
from allmem_ops.hf import convert, full_attention, memory_mode, memory_parameters, save_memory
from allmem_ops.hf.checkpoint import read_memory
from tests.hf.tiny import FAMILY_NAMES, awaken, tiny_config, tiny_model, tokens


@torch.no_grad()
def logits(model, rows):
    return model(rows, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_ntk_is_transformers_own_dynamic_scaling(family):
    P = 32
    model = convert(tiny_model(family, max_position_embeddings=P), tiny_config())
    scaled = tiny_model(family, max_position_embeddings=P)
    config = copy.deepcopy(scaled.config)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    theirs = type(scaled)(config).eval()
    theirs.load_state_dict(scaled.state_dict())
    arm, plain = ntk_arm(2.0), logits(model, tokens(1, 90))
    for length in (20, 90, 48):  # whatever was read before
        rows = tokens(1, length)
        with arm.enter(model):
            torch.testing.assert_close(logits(model, rows), logits(theirs, rows))
        with full_attention(model):
            full = logits(model, rows)
        with arm.enter(model):
            assert torch.equal(logits(model, rows), full) == (length <= P)
        theirs = type(scaled)(config).eval()
        theirs.load_state_dict(scaled.state_dict())
    assert torch.equal(logits(model, tokens(1, 90)), plain)


def test_ntk_refuses_a_rope_that_is_scaled_already():
    model = convert(tiny_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), tiny_config())
    with pytest.raises(ValueError, match="plain RoPE"), ntk_arm().enter(model):
        pass


def test_the_adapter_is_the_other_checkpoint_with_its_writes_off(live, tmp_path):
    rows = tokens(2, 50)
    other = convert(tiny_model(), tiny_config(window=9, eta_init=0.3))
    awaken(other)
    with torch.no_grad():
        for p in memory_parameters(other).values():
            p.mul_(1.1)
    save_memory(other, tmp_path)
    with memory_mode(other, "no_writes"):
        other.model.allmem.config = live.model.allmem.config
        expected = logits(other, rows)
    before, own = logits(live, rows), {name: p.clone() for name, p in memory_parameters(live).items()}
    with checkpoint_arm(ADAPTER, read_memory(live, tmp_path)).enter(live):
        assert torch.equal(logits(live, rows), expected)
    assert torch.equal(logits(live, rows), before)
    assert all(torch.equal(p, own[name]) for name, p in memory_parameters(live).items())


def test_a_memory_of_another_form_is_refused(live, tmp_path):
    save_memory(convert(tiny_model(), tiny_config(hidden_dim=24)), tmp_path)
    with pytest.raises(ValueError, match=r"memory of the model's form.*hidden_dim"):
        read_memory(live, tmp_path)
    with pytest.raises(ValueError, match="names and shapes of the model's memory"), memory_tensors(live, {}):
        pass


def test_the_model_is_restored_after_an_error(live):
    rows = tokens(1, 40)
    before = logits(live, rows)
    for arm in (*ARMS.values(), ntk_arm(), checkpoint_arm(ALLMEM, {n: torch.zeros_like(p) for n, p in memory_parameters(live).items()})):
        with pytest.raises(KeyError), arm.enter(live):
            raise KeyError
        assert torch.equal(logits(live, rows), before)


def test_every_arm_has_a_label():
    assert {*ARMS, NTK} <= set(LABELS) and all(arm.label == LABELS[key] for key, arm in ARMS.items())
    assert ARMS[ALLMEM].named("seed 1").named("seed 2").label == "AllMem: seed 2"
