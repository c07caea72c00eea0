"""The engine: draws, masks, gradient checkpointing, and what it refuses."""

import pytest
import torch

from allmem_ops.hf import full_attention, memory_parameters, reconfigure
from allmem_ops.training import Batch, Distillation, Draw, Recipe, response_mask
from tests.training.tiny import batches, llama, make_model

RANGES = {"window": (6, 20), "sinks": (0, 3), "chunk_size": (3, 20)}
RECIPE = Recipe(steps=8, lr=5e-3, warmup=2, decay=3, **RANGES)


def run(model, recipe, data, **options):
    engine = Distillation(model, recipe, **options)
    return engine, [engine.step(ids).read(0.0) for ids in data]


def test_each_step_reads_with_its_own_draw():
    model, data = make_model(), batches(1)[0]
    engine = Distillation(model, RECIPE)
    seen = []
    for _ in range(4):
        step = engine.step(data).read(0.0)
        config = reconfigure(model)
        assert step.draw == RECIPE.draw(step.index) == Draw(config.window, config.sinks, config.chunk_size)
        seen.append(step.draw)
    assert len(set(seen)) == 4


def test_masked_loss_is_the_mean_over_what_counts():
    model, ids = make_model(), batches(1)[0]
    with torch.no_grad():
        with full_attention(model):
            teacher = model(ids, use_cache=False).logits.log_softmax(-1)
        rows = (teacher.exp() * (teacher - model(ids, use_cache=False).logits.log_softmax(-1))).sum(-1)
    mask = response_mask(torch.tensor([10, 4]), torch.tensor([30, 40]), 40)
    _, steps = run(model, Recipe(steps=1), [Batch(ids, mask)])
    assert steps[0].kl == pytest.approx(rows[mask].mean().item(), rel=1e-4)
    assert abs(steps[0].kl - rows.mean().item()) > 1e-3
    _, late = run(make_model(), Recipe(steps=1, first_position=12), [Batch(ids, mask)])
    assert late[0].kl == pytest.approx(rows[:, 12:][mask[:, 12:]].mean().item(), rel=1e-4)


def test_an_empty_mask_changes_nothing():
    model, ids = make_model(), batches(1)[0]
    before = {name: p.detach().clone() for name, p in memory_parameters(model).items()}
    _, steps = run(model, Recipe(steps=1, lr=1e-2), [Batch(ids, torch.zeros_like(ids, dtype=torch.bool))])
    assert steps[0].kl == 0.0 and not steps[0].skipped
    assert all(torch.equal(p, before[name]) for name, p in memory_parameters(model).items())


def test_gradient_checkpointing_gives_the_same_losses():
    data = batches(3)
    _, plain = run(make_model(), RECIPE, data)
    model = make_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, checkpointed = run(model, RECIPE, data)
    assert [s.kl for s in checkpointed] == pytest.approx([s.kl for s in plain], rel=1e-5)


def test_clipping_bounds_the_update():
    moved = {}
    for clip in (1e-3, 1e9):
        model = make_model()
        recipe = Recipe(steps=1, lr=1.0, betas=(0.0, 0.999), grad_clip=clip)
        engine, steps = run(model, recipe, batches(1))
        moments = [state["exp_avg"] for state in engine.optimizer.state.values()]
        moved[clip] = torch.nn.utils.get_total_norm(moments).item(), steps[0].grad_norm
    assert moved[1e-3][0] == pytest.approx(1e-3, rel=1e-3)
    assert moved[1e9][0] == pytest.approx(moved[1e9][1], rel=1e-4) and moved[1e9][1] == moved[1e-3][1] > 1e-3


def test_the_largest_tensor_of_a_step_is_a_chunk_of_logits():
    """One chunk of [tokens, vocab] at a time, forward and backward: never [T, vocab], of teacher or student."""
    from torch.utils._python_dispatch import TorchDispatchMode

    vocab, chunk = 4096, 16

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and vocab in x.shape and x.dim() and 32 not in x.shape:  # not the embedding [vocab, 32]
                    self.numel = max(self.numel, x.numel())
            return out

    from allmem_ops import AllMemConfig
    from allmem_ops.hf import convert

    model = convert(llama(vocab_size=vocab), AllMemConfig(window=8, sinks=1, chunk_size=8, head_dim=16))
    engine = Distillation(model, Recipe(steps=1, kl_chunk=chunk))
    with Largest() as largest:
        engine.step(batches(1, length=128)[0]).read(0.0)
    assert largest.numel == chunk * vocab


def test_a_frozen_part_of_the_memory_stays():
    model = make_model()
    parameters = memory_parameters(model)
    for name, p in parameters.items():
        p.requires_grad_(".w_" not in name)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    engine, _ = run(model, RECIPE, batches(2))
    changed = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    assert changed == {name for name in parameters if ".w_" not in name}
    state = engine.optimizer_state()
    assert not any(".w_" in name for name in state)
    again = Distillation(model, RECIPE)
    again.load_optimizer_state(state, 2)


def test_steps_have_the_distinct_draws():
    model, recipe = make_model(), Recipe(steps=6, distinct_draws=3, **RANGES)
    _, steps = run(model, recipe, batches(1) * 6)
    assert [s.draw for s in steps] == [recipe.draw(i) for i in range(6)]
    assert {s.draw for s in steps[:3]} == {s.draw for s in steps[3:]} == set(recipe.all_draws())


@pytest.mark.parametrize(
    ("fields", "message"),
    [(RANGES, "where every step draws window, sinks or chunk size anew"), (RANGES | {"distinct_draws": 4}, "on a CPU"), ({}, "on a CPU")],
)
def test_cuda_graph_is_refused_where_it_cannot_be(fields, message):
    with pytest.raises(ValueError, match=f"`cuda_graph` must be False {message}"):
        Distillation(make_model(), Recipe(steps=8, **fields), cuda_graph=True)
