"""Checkpoints: a resumed run is the unbroken one, files stay small, and what does not fit is refused without a change."""

import json
import shutil

import pytest
import torch

from allmem_ops.evaluation.linear import use_linear_memory
from allmem_ops.hf import load_memory, memory_parameters, reconfigure
from allmem_ops.training import Distillation, Recipe, latest_checkpoint, load_checkpoint, save_checkpoint
from tests.training.tiny import batches, make_model

RECIPE = Recipe(steps=8, lr=5e-3, warmup=2, decay=3, window=(6, 20), sinks=(0, 3), chunk_size=(3, 20))


def steps(run, data):
    return [run.step(ids).read(0.0) for ids in data]


@pytest.fixture
def saved(tmp_path):
    run = Distillation(make_model(), RECIPE)
    before = steps(run, batches(8)[:3])
    return save_checkpoint(run, tmp_path, extra={"note": "third"}, part_bytes=20_000), before


def fresh():
    """Another process: the same base weights, a memory that is not the trained one."""
    model = make_model()
    with torch.no_grad():
        for p in memory_parameters(model).values():
            p.fill_(7.0)
    return Distillation(model, RECIPE)


def test_resumed_run_is_the_unbroken_one_bit_for_bit(saved):
    whole = steps(Distillation(make_model(), RECIPE), batches(8))
    checkpoint, before = saved
    run = fresh()
    assert load_checkpoint(run, checkpoint) == {"note": "third"} and run.index == 3
    after = steps(run, batches(8)[3:])
    assert [(s.index, s.kl, s.grad_norm, s.draw) for s in before + after] == [(s.index, s.kl, s.grad_norm, s.draw) for s in whole]


def test_a_lost_moment_would_show(saved):
    whole = steps(Distillation(make_model(), RECIPE), batches(8)[:5])
    run = fresh()
    load_checkpoint(run, saved[0])
    state = {name: t * 0 if name.startswith("exp_avg_sq") else t for name, t in run.optimizer_state().items()}
    run.load_optimizer_state(state, 3)
    assert [s.kl for s in steps(run, batches(8)[3:5])] != [s.kl for s in whole[3:]]


def test_a_checkpoint_before_the_first_step(tmp_path):
    run = Distillation(make_model(), RECIPE)
    checkpoint = save_checkpoint(run, tmp_path)
    again = fresh()
    load_checkpoint(again, checkpoint)
    assert [s.kl for s in steps(again, batches(2))] == [s.kl for s in steps(run, batches(2))]


def test_files_are_small_and_the_memory_is_load_memorys(saved):
    checkpoint, _ = saved
    parts = sorted(checkpoint.glob("optimizer-*.safetensors"))
    assert len(parts) > 2 and all(p.stat().st_size < 30_000 for p in parts)
    model = load_memory(make_model(seed=0), checkpoint)
    assert reconfigure(model).window == 8  # its own, not the last draw


def test_the_last_whole_checkpoint_counts_and_older_ones_go(saved, tmp_path):
    checkpoint, _ = saved
    assert latest_checkpoint(tmp_path) == checkpoint and latest_checkpoint(tmp_path / "none") is None
    run = fresh()
    load_checkpoint(run, checkpoint)
    steps(run, batches(1))
    newer = save_checkpoint(run, tmp_path)
    assert latest_checkpoint(tmp_path) == newer and not checkpoint.exists()
    (tmp_path / "step-0000009").mkdir()  # a write that broke off
    assert latest_checkpoint(tmp_path) == newer


def test_what_does_not_fit_is_refused_without_a_change(saved, tmp_path):
    checkpoint, _ = saved
    run = fresh()

    def refused(message, **damage):
        copy = tmp_path / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint, copy)
        for name, content in damage.items():
            path = copy / name.replace("__", ".").replace("_0", "-0")
            path.unlink() if content is None else path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(run, copy)
        assert run.index == 0 and all((p == 7.0).all() for p in memory_parameters(run.model).values())

    description = json.loads((checkpoint / "run.json").read_text())
    refused("`checkpoint` must hold an undamaged run.json", run__json="{")
    refused("`checkpoint` must hold an undamaged run.json", run__json=None)
    refused("`checkpoint` must be of format 1; got 2", run__json=json.dumps(description | {"format": 2}))
    refused("`checkpoint` must hold its optimizer's files undamaged", optimizer_01__safetensors="x")
    refused(r"`tensors` must be the \d+ of this model's optimizer; got \d+ that differ", run__json=json.dumps(description | {"parts": 1}))
    recipe = description["recipe"] | {"lr": 1.0}
    refused(
        r"`run` must have the recipe of the checkpoint \({'lr': 1.0}\); got {'lr': 0.005}",
        run__json=json.dumps(description | {"recipe": recipe}),
    )
    refused("`directory` must hold memory.safetensors and memory.json", memory__json=None)


def test_another_config_is_refused(saved):
    run = Distillation(make_model(), RECIPE)
    reconfigure(run.model, sinks=2)
    other = Distillation(run.model, RECIPE)
    with pytest.raises(ValueError, match=r"`run` must have the AllMemConfig of the checkpoint \({'sinks': 1}\); got {'sinks': 2}"):
        load_checkpoint(other, saved[0])


def test_another_memory_in_its_place_goes_on_too(tmp_path):
    def linear():
        torch.manual_seed(3)
        return Distillation(use_linear_memory(make_model()), RECIPE)

    whole = steps(linear(), batches(4))
    first = linear()
    before = steps(first, batches(4)[:2])
    checkpoint = save_checkpoint(first, tmp_path)
    again = linear()
    load_checkpoint(again, checkpoint)
    assert [s.kl for s in before + steps(again, batches(4)[2:])] == [s.kl for s in whole]
    with pytest.raises(ValueError, match="of this model's optimizer; got"):
        load_checkpoint(fresh(), checkpoint)
