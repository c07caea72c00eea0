"""On a GPU, with the kernels: a step waits for nothing, a resumed run is the unbroken one, and both implementations learn alike."""

import dataclasses

import pytest
import torch

from allmem_ops.hf import full_attention, memory_parameters
from allmem_ops.training import Batch, Distillation, Recipe, final_hidden, load_checkpoint, save_checkpoint
from tests.training.tiny import batches, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="what the device and the host do beside one another needs a GPU")

RECIPE = Recipe(steps=12, lr=5e-3, warmup=2, decay=3, window=(40, 90), sinks=(0, 8), chunk_size=(20, 90))
LENGTH = 300


def run(recipe=RECIPE, **options):
    model = make_model().cuda()
    memory = {id(p) for p in memory_parameters(model).values()}
    for p in model.parameters():
        if id(p) not in memory:
            p.data = p.data.bfloat16()
    return Distillation(model, recipe, **options)


def data(count):
    return [ids.cuda() for ids in batches(count, length=LENGTH)]


def test_a_step_waits_for_nothing():
    engine, rows = run(), data(3)
    engine.step(rows[0]).read(0.0)  # compiles, and makes the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [engine.step(ids) for ids in rows[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(step.read(0.0).skipped for step in launched)


@torch.no_grad()
def test_the_teacher_by_the_kernels_is_the_model_with_full_attention():
    engine, ids = run(), data(1)[0]
    found = engine.module.teacher(ids)
    with full_attention(engine.model):
        want = final_hidden(engine.model, ids)
        exact = final_hidden(engine.model.float(), ids)
    error, own = (torch.linalg.vector_norm(x.float() - exact) for x in (found, want))
    assert own > 0 and error <= 1.2 * own


@pytest.mark.parametrize("masked", [False, True])
def test_graphs_give_the_losses_of_launched_steps_bit_for_bit(masked):
    recipe = dataclasses.replace(RECIPE, distinct_draws=3)
    rows = data(7)
    if masked:
        rows = [Batch(ids, ids % 3 > 0) for ids in rows]
    found = []
    for graph in (False, True):
        engine = run(recipe, cuda_graph=graph)
        steps = [engine.step(batch).read(0.0) for batch in rows]
        found.append(([(s.kl, s.grad_norm, s.draw, s.skipped) for s in steps], [p.detach().clone() for p in engine.parameters]))
    (plain, before), (replayed, after) = found
    assert replayed == plain and len({s[0] for s in plain}) == 7
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_graphs_skip_and_resume_as_launched_steps_do(tmp_path):
    recipe = dataclasses.replace(RECIPE, distinct_draws=3)
    rows = data(8)
    engine = run(recipe, cuda_graph=True)
    whole = [engine.step(ids).read(0.0) for ids in rows]
    first = run(recipe, cuda_graph=True)
    before = [first.step(ids).read(0.0) for ids in rows[:4]]
    again = run(recipe, cuda_graph=True)
    load_checkpoint(again, save_checkpoint(first, tmp_path))
    after = [again.step(ids).read(0.0) for ids in rows[4:]]
    assert [(s.kl, s.grad_norm) for s in before + after] == [(s.kl, s.grad_norm) for s in whole]
    kept = [p.detach().clone() for p in again.parameters]
    alpha = next(p for n, p in memory_parameters(again.model).items() if n.endswith("alpha"))
    alpha.data.fill_(float("inf"))
    assert again.step(rows[0]).read(0.0).skipped
    assert all(torch.equal(p, k) for p, k in zip(again.parameters, kept, strict=True) if p is not alpha)
    with pytest.raises(ValueError, match=r"`inputs\[0\]` must"):
        again.step(rows[0][:1])


def test_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path):
    rows = data(8)
    engine = run()
    whole = [engine.step(ids).read(0.0) for ids in rows]
    first = run()
    before = [first.step(ids).read(0.0) for ids in rows[:4]]
    again = run()
    load_checkpoint(again, save_checkpoint(first, tmp_path))
    after = [again.step(ids).read(0.0) for ids in rows[4:]]
    assert [(s.kl, s.grad_norm) for s in before + after] == [(s.kl, s.grad_norm) for s in whole]


def test_a_step_that_is_not_finite_is_skipped_on_the_device():
    engine, rows = run(), data(3)
    steps = []
    for index, ids in enumerate(rows):
        if index == 1:
            name, p = next((n, p) for n, p in memory_parameters(engine.model).items() if n.endswith("alpha"))
            kept = p.detach().clone()
            p.data.fill_(float("inf"))
        steps.append(engine.step(ids).read(0.0))
        if index == 1:
            assert torch.isinf(p).all(), f"{name} has moved"
            p.data.copy_(kept)
    assert [s.skipped for s in steps] == [False, True, False]
    assert all(torch.isfinite(p).all() for p in engine.parameters)
