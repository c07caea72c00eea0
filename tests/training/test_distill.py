"""The fine-tuning loop on a tiny model: what trains, what stays, what is skipped, and that the KL falls."""

import pytest
import torch

from allmem_ops.hf import full_attention, memory_parameters
from allmem_ops.training import engine, fine_tune
from tests.training.tiny import batches, make_model


def test_first_step_sees_the_plain_kl():
    model = make_model()
    ids = batches(1)[0]
    with torch.no_grad():
        with full_attention(model):
            teacher = model(ids, use_cache=False).logits.log_softmax(-1)
        student = model(ids, use_cache=False).logits.log_softmax(-1)
    rows = (teacher.exp() * (teacher - student)).sum(-1)
    assert fine_tune(model, [ids], steps=1).steps[0].kl == pytest.approx(rows.mean().item(), rel=1e-4)
    late = fine_tune(make_model(), [ids], steps=1, first_position=8, chunk_size=7).steps[0].kl
    assert late == pytest.approx(rows[:, 8:].mean().item(), rel=1e-4)
    assert abs(late - rows.mean().item()) > 1e-3


def test_only_the_memory_trains_and_the_kl_falls():
    model = make_model()
    memory = memory_parameters(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []
    result = fine_tune(model, batches(1) * 24, steps=24, lr=5e-3, warmup=4, decay=10, on_step=seen.append)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(memory)
    assert all(p.grad is None for p in model.parameters())
    assert result.steps == seen and [s.index for s in seen] == list(range(24)) and result.skipped == 0
    assert seen[-1].kl < 0.8 * seen[0].kl
    assert seen[0].lr == pytest.approx(5e-3 / 4) and seen[10].lr == 5e-3 and seen[-1].lr < 5e-4


def test_two_runs_are_equal():
    first, second = (fine_tune(make_model(), batches(4), steps=4, lr=1e-3) for _ in range(2))
    assert [s.kl for s in first.steps] == [s.kl for s in second.steps]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(monkeypatch, poison):
    model = make_model()
    real = engine.forward_kl
    calls, snapshots = [], []

    def poisoned(student, *args, **kwargs):
        loss = real(student, *args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            if poison == "loss":
                return loss * float("nan")
            student.register_hook(lambda grad: grad * float("inf"))
        return loss

    monkeypatch.setattr(engine, "forward_kl", poisoned)

    def snapshot(_):
        snapshots.append([p.detach().clone() for p in memory_parameters(model).values()])

    result = fine_tune(model, batches(3), steps=3, lr=1e-3, on_step=snapshot)
    assert [s.skipped for s in result.steps] == [False, True, False] and result.skipped == 1
    assert all(map(torch.equal, snapshots[0], snapshots[1]))
    assert not all(map(torch.equal, snapshots[1], snapshots[2]))
    assert all(torch.isfinite(p).all() for p in snapshots[2])


def test_bf16_weights_keep_an_fp32_memory():
    model = make_model()
    for name, p in model.named_parameters():
        if name not in memory_parameters(model):
            p.data = p.data.bfloat16()
    result = fine_tune(model, batches(3), steps=3, lr=1e-3)
    assert result.skipped == 0 and all(p.dtype == torch.float32 for p in memory_parameters(model).values())
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_errors():
    model = make_model()
    with pytest.raises(ValueError, match="`batches` must yield at least steps=3 batches; got 1"):
        fine_tune(model, batches(1), steps=3)
    with pytest.raises(ValueError, match="`first_position` must be below T=40; got 40"):
        fine_tune(model, batches(1), steps=1, first_position=40)
    with pytest.raises(ValueError, match="`steps` must be at least 1; got 0"):
        fine_tune(model, batches(1), steps=0)
    model.lm_head.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"`model` must have nothing but its memory's parameters to train; got \['lm_head.weight'\]"):
        fine_tune(model, batches(1), steps=1)
