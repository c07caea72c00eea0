"""Losses read in segments, chunks and passes are those of one plain call with all logits."""

import pytest
import torch

from allmem_ops.evaluation.arms import ALLMEM, ARMS, FULL, NO_WRITES, WINDOW, ntk_arm
from allmem_ops.evaluation.scoring import cross_entropies, read, row_scores, teacher_hidden, text_losses
from allmem_ops.hf import AllMemCache
from tests.hf.tiny import tokens


@torch.no_grad()
def log_probabilities(model, arm, rows):
    with arm.enter(model):
        return model(rows, use_cache=False).logits.log_softmax(-1)


def plain_losses(model, arm, rows):
    return -log_probabilities(model, arm, rows)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]


@pytest.mark.parametrize("key", ARMS)
@pytest.mark.parametrize("segment", [1, 13, 50, 51, 300])
def test_text_losses_equal_one_call(live, key, segment):
    rows = tokens(3, 51)
    found = text_losses(live, ARMS[key], rows, segment=segment, rows_per_pass=2)
    torch.testing.assert_close(found, plain_losses(live, ARMS[key], rows), rtol=1e-4, atol=1e-4)


def test_the_arms_differ(live):
    rows = tokens(1, 60)
    losses = [text_losses(live, ARMS[key], rows).mean().item() for key in (FULL, WINDOW, ALLMEM, NO_WRITES)]
    assert len(set(losses)) == 4


def test_ntk_scores_a_token_in_the_shortest_reading_that_holds_it(live):
    rows, arm = tokens(2, 400), ntk_arm()
    found = text_losses(live, arm, rows, ends=(192, 384, 1000))
    for start, end in ((0, 192), (192, 384), (384, 400)):
        whole = log_probabilities(live, arm, rows[:, :end])
        targets = rows[:, start + 1 : end + 1]
        expected = -whole[:, start : start + targets.shape[1]].gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(found[:, start : start + targets.shape[1]], expected, rtol=1e-4, atol=1e-4)
    assert found.shape == (2, 399)


def test_rows_are_scored_against_the_teacher(live):
    rows = tokens(3, 60)
    teacher = teacher_hidden(live, rows, rows_per_pass=2)
    full = log_probabilities(live, ARMS[FULL], rows)
    for key in ARMS:
        loss, kl = row_scores(live, ARMS[key], rows, teacher, first_position=12, chunk_size=7, rows_per_pass=2)
        student = log_probabilities(live, ARMS[key], rows)
        torch.testing.assert_close(loss, plain_losses(live, ARMS[key], rows)[:, 12:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kl, (full.exp() * (full - student)).sum(-1)[:, 12:-1], rtol=1e-3, atol=1e-5)


def test_logits_exist_for_a_chunk_only(monkeypatch):
    seen = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr("allmem_ops.evaluation.scoring.matmul", lambda a, b: seen.append(len(a)) or matmul(a, b))
    hidden, head, targets = torch.randn(2, 9, 4), torch.randn(11, 4), torch.randint(0, 11, (2, 9))
    found = cross_entropies(hidden, head, targets, chunk_size=5)
    expected = torch.nn.functional.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(found.flatten(), expected)
    assert seen == [5, 5, 5, 3]


def test_a_long_text_goes_through_one_cache_of_constant_size(live, monkeypatch):
    made = []
    init = AllMemCache.__init__
    monkeypatch.setattr(AllMemCache, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    sizes = [made[0].nbytes for _ in read(live, ARMS[ALLMEM], tokens(1, 100), segment=32)]
    assert len(made) == 1 and len(sizes) == 4 and len(set(sizes)) == 1 and made[0].get_seq_length() == 100
