"""Without a mask: the same hidden states bit for bit, and nothing looked at on the device."""

import pytest
import torch
from transformers import masking_utils

from allmem_ops.hf import convert, full_attention
from allmem_ops.hf.unmasked import unmasked
from tests.hf.tiny import FAMILY_NAMES, awaken, tiny_config, tiny_model, tokens


@pytest.fixture
def looked(monkeypatch):
    """How often transformers compared positions on the device."""
    calls, plain = [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *a, **k: calls.append(1) or plain(*a, **k))
    return calls


def hidden(model, ids):
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_student_and_teacher_are_the_same_and_nothing_is_looked_at(family, looked):
    model, ids = awaken(convert(tiny_model(family), tiny_config())), tokens(2, 40)
    student = hidden(model, ids)
    with full_attention(model):
        teacher = hidden(model, ids)
    assert looked
    looked.clear()
    with unmasked(model):
        assert torch.equal(hidden(model, ids), student)
    with full_attention(model), unmasked(model):
        assert torch.equal(hidden(model, ids), teacher)
    assert not looked
    assert torch.equal(hidden(model, ids), student)  # and outside it is as it was
    assert looked


def test_a_teacher_with_windows_of_its_own_keeps_its_mask():
    model, ids = convert(tiny_model("mistral", sliding_window=5), tiny_config()), tokens(1, 40)
    with full_attention(model):
        teacher = hidden(model, ids)
        with unmasked(model):
            assert torch.equal(hidden(model, ids), teacher)
        model.config.sliding_window = None
        assert not torch.equal(hidden(model, ids), teacher)
