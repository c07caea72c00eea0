"""Compiled norms and MLPs: the same losses, one form for all layers, no compilation anew for another draw."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from allmem_ops.training import Distillation, Recipe
from allmem_ops.training.compiled import compile_blocks, plain_blocks
from tests.training.tiny import batches, make_model

RECIPE = Recipe(steps=8, lr=5e-3, window=(6, 20), sinks=(0, 3), chunk_size=(3, 20))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses(model, data):
    run = Distillation(model, RECIPE)
    return [run.step(ids).read(0.0).kl for ids in data]


def test_same_losses_and_one_compiled_form_for_all_layers_and_draws():
    data = batches(4)
    counter = CompileCounter()
    model = compile_blocks(make_model(), backend=counter)
    assert losses(model, data[:1]) == pytest.approx(losses(make_model(), data[:1]), rel=1e-5)
    forms = counter.frame_count
    assert 2 <= forms <= 6  # norm and MLP, of student and teacher; the last norm stands alone
    losses(model, data)
    assert counter.frame_count == forms
    assert losses(plain_blocks(make_model()), data) == losses(make_model(), data)


def test_undone_means_not_compiled():
    counter = CompileCounter()
    model = plain_blocks(compile_blocks(make_model(), backend=counter))
    losses(model, batches(1))
    assert counter.frame_count == 0
