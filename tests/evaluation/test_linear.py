"""The linear memory: its arithmetic against the recurrence, as a layer of a converted model, and its checkpoint."""

import pytest
import torch

from allmem_ops import AllMemConfig, MemoryBranch
from allmem_ops.evaluation.arms import ALLMEM, ARMS, linear_arm
from allmem_ops.evaluation.linear import LinearBranch, gated_delta_rule, linear_branches, load_linear, use_linear_memory
from allmem_ops.evaluation.scoring import text_losses
from allmem_ops.hf import convert, memory_mode, memory_parameters, save_memory, trainable_parameters
from allmem_ops.training import fine_tune
from tests.hf.tiny import awaken, tiny_config, tiny_model, tokens


def recurrence(q, k, v, log_decay, beta, state):
    """One token at a time, state [B, H, K, V]."""
    outputs = []
    for t in range(q.shape[1]):
        state = log_decay[:, t].exp()[..., None, None] * state
        stored = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - stored))
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def inputs(T, dtype=torch.float64):
    B, H, K, V = 2, 3, 8, 12
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1) for _ in range(2))
    v = torch.randn(B, T, H, V, dtype=dtype)
    return q, k, v, -torch.rand(B, T, H, dtype=dtype) * 0.3, torch.rand(B, T, H, dtype=dtype), torch.randn(B, H, K, V, dtype=dtype)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 150])
def test_chunks_equal_the_recurrence(T):
    *rest, state = inputs(T)
    expected, after = recurrence(*rest, state)
    o, S = gated_delta_rule(*rest, state, impl="chunk")
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(S, after, rtol=1e-9, atol=1e-9)


def test_chunks_have_the_recurrences_gradients():
    leaves = [x.requires_grad_() for x in inputs(70)]
    weight = torch.randn(2, 70, 3, 12, dtype=torch.float64)
    expected = torch.autograd.grad((recurrence(*leaves)[0] * weight).sum(), leaves)
    found = torch.autograd.grad((gated_delta_rule(*leaves, impl="chunk")[0] * weight).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fla-core's kernels need a GPU")
def test_fla_equals_chunk():
    pytest.importorskip("fla", reason="fla-core is not installed")
    q, k, v, decay, beta, state = (x.cuda().float() for x in inputs(150))
    expected, after = gated_delta_rule(q, k, v, decay, beta, state, impl="chunk")
    o, S = gated_delta_rule(q, k, v, decay, beta, state, impl="fla")
    assert (o - expected).abs().max() < 0.02 * expected.abs().max() and (S - after).abs().max() < 0.02 * after.abs().max()


def test_missing_fla_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fla.ops.gated_delta_rule", None)
    with pytest.raises(ImportError, match="need fla-core: pip install fla-core"):
        gated_delta_rule(*inputs(3), impl="fla")


def test_it_has_as_many_parameters_as_the_memory():
    config = AllMemConfig()
    own, linear = MemoryBranch(576, config, heads=3, device="meta"), LinearBranch(576, config, heads=3)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(linear) == pytest.approx(count(own), rel=0.02)


@pytest.fixture
def linear_model():
    return awaken(use_linear_memory(convert(tiny_model(), tiny_config())))


def test_segments_equal_one_pass(linear_model):
    rows = tokens(2, 90)
    whole = text_losses(linear_model, ARMS[ALLMEM], rows, rows_per_pass=2)
    for segment in (1, 7, 32):
        torch.testing.assert_close(
            text_losses(linear_model, ARMS[ALLMEM], rows, segment=segment, rows_per_pass=2), whole, rtol=1e-4, atol=1e-4
        )


def test_writes_reach_past_the_window(linear_model):
    rows = tokens(1, 60)
    other = rows.clone()
    other[0, 10] += 1
    with torch.no_grad():
        a, b = (linear_model(x, use_cache=False).logits[0, -1] for x in (rows, other))
        with memory_mode(linear_model, "no_writes"):
            c, d = (linear_model(x, use_cache=False).logits[0, -1] for x in (rows, other))
    assert (a - b).abs().max() > 1e-6
    assert torch.equal(c, d)


def test_it_trains_by_the_same_recipe_and_comes_back_from_its_checkpoint(linear_model, tmp_path):
    rows = tokens(2, 40)
    assert {id(p) for g in trainable_parameters(linear_model) for p in g["params"]} == {
        id(p) for p in memory_parameters(linear_model).values()
    }
    before = {name: p.clone() for name, p in memory_parameters(linear_model).items()}
    fine_tune(linear_model, [rows] * 2, steps=2, lr=1e-3)
    assert all(not torch.equal(p, before[name]) for name, p in memory_parameters(linear_model).items())
    save_memory(linear_model, tmp_path)
    base = convert(tiny_model(), tiny_config())
    expected = text_losses(linear_model, ARMS[ALLMEM], rows)
    plain = text_losses(base, ARMS[ALLMEM], rows)
    assert torch.equal(text_losses(base, linear_arm(load_linear(base, tmp_path)), rows), expected)
    assert torch.equal(text_losses(base, ARMS[ALLMEM], rows), plain)


def test_a_checkpoint_of_another_memory_is_refused(tmp_path):
    base = convert(tiny_model(), tiny_config())
    save_memory(base, tmp_path)
    with pytest.raises(ValueError, match="must hold a linear memory"):
        load_linear(base, tmp_path)
    with pytest.raises(ValueError, match="one a layer with a memory"), linear_arm(linear_branches(base)[:1]).enter(base):
        pass


@torch.no_grad()
@pytest.mark.parametrize("active", [[True, False, True], [False] * 3, [True] * 3])
def test_an_inactive_row_stays_as_it_is(active):
    branch = LinearBranch(32, AllMemConfig(heads=2, head_dim=8))
    branch.alpha.fill_(0.5)
    x, attn, active = torch.randn(3, 5, 32), torch.randn(3, 5, 32), torch.tensor(active)
    state = branch.initial_state(3)
    branch(torch.randn(3, 9, 32), state=state)
    before, every = state.clone(), state.clone()
    expected = branch(x, attn, state=every)
    found = branch(x, attn, state=state, active=active)
    torch.testing.assert_close(found, torch.where(active[:, None, None], expected, attn))
    for name, after in (("memory", every.memory.S), ("conv", every.conv.inputs)):
        own, old = (getattr(getattr(s, name), "S" if name == "memory" else "inputs") for s in (state, before))
        torch.testing.assert_close(own, torch.where(active.view(-1, *[1] * (own.dim() - 1)), after, old))


def test_generation_equals_one_pass(linear_model):
    ids = tokens(2, 20)
    out = linear_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = linear_model(out, use_cache=False).logits
    assert torch.equal(out[:, 20:], logits[:, 19:-1].argmax(-1))


def test_padding_is_refused(linear_model):
    with pytest.raises(NotImplementedError, match="whole rows only"):
        linear_model(tokens(2, 10), attention_mask=torch.tensor([[0] * 3 + [1] * 7, [1] * 10]), use_cache=False)
