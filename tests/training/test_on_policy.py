"""The student's answers: whole, masked, seeded, its own; and training on them."""

import pytest
import torch

from allmem_ops.hf import full_attention, memory_parameters
from allmem_ops.training import Distillation, Recipe, TokenRows, answer_prompts
from tests.training.tiny import VOCAB, make_model

PROMPTS = [torch.arange(3, 3 + n) for n in (4, 9, 4, 6)]


@pytest.fixture(scope="module")
def model():
    made = make_model()
    made.generation_config.eos_token_id = 5
    return made


def test_rows_are_prompt_answer_and_padding_in_order(model):
    answers = answer_prompts(model, PROMPTS, max_new_tokens=12, seed=1)
    for prompt, ids, mask, length in zip(PROMPTS, *answers, strict=True):
        n, length = prompt.numel(), int(length)
        assert torch.equal(ids[:n], prompt) and (ids[length:] == 0).all() and n < length <= n + 12
        assert mask.nonzero()[:, 0].tolist() == list(range(n - 1, length - 1))
        ended = (ids[n:length] == 5).nonzero()[:, 0].tolist()
        assert ended in ([], [length - n - 1]) and (ended or length == n + 12)
    assert any((ids[p.numel() : n] == 5).any() for p, ids, n in zip(PROMPTS, answers.ids, answers.lengths.tolist(), strict=True))


def test_answers_depend_on_the_seed_and_leave_the_callers_random_state(model):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (answer_prompts(model, PROMPTS, max_new_tokens=8, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)


def test_greedy_answers_are_the_students_not_the_teachers(model):
    greedy = answer_prompts(model, [torch.arange(6, 40)], max_new_tokens=12, temperature=0.0).ids[0]
    with torch.no_grad():
        student = model(greedy[None], use_cache=False).logits.argmax(-1)[0]
        with full_attention(model):
            teacher = model(greedy[None], use_cache=False).logits.argmax(-1)[0]
    assert torch.equal(student[33:-1], greedy[34:]) and not torch.equal(teacher[33:-1], greedy[34:])


def test_training_on_the_answers(model, tmp_path):
    answers = answer_prompts(model, PROMPTS, max_new_tokens=30, seed=1)
    rows = TokenRows.load(answers.save(tmp_path / "answers.npz"))
    batch = rows.batch(0, 4)
    assert sorted(map(tuple, batch.ids.tolist())) == sorted(map(tuple, answers.ids.tolist()))
    assert int(batch.mask.sum()) == int((answers.lengths - torch.tensor([4, 9, 4, 6])).sum())
    before = {name: p.detach().clone() for name, p in memory_parameters(model).items()}
    run = Distillation(model, Recipe(steps=6, lr=1e-2))
    kls = [run.step(rows.batch(step, 4)).read(0.0).kl for step in range(6)]
    assert kls[-1] < kls[0] and batch.ids.max() < VOCAB
    with torch.no_grad():
        for name, p in memory_parameters(model).items():
            p.copy_(before[name])


def test_errors(model, tmp_path):
    with pytest.raises(ValueError, match="`prompts` must hold at least one prompt"):
        answer_prompts(model, [], max_new_tokens=1)
    with pytest.raises(ValueError, match="`prompts` must have at least one token each"):
        answer_prompts(model, [torch.empty(0, dtype=torch.int64)], max_new_tokens=1)
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1"):
        answer_prompts(model, PROMPTS, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"`path` must end in \.npz"):
        answer_prompts(model, PROMPTS[:1], max_new_tokens=1).save(tmp_path / "answers.npy")
