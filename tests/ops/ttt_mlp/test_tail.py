"""Tokens that a state holds back: every path folds them as if they had been written at once."""

from dataclasses import replace

import pytest
import torch

from allmem_ops import MemoryState, ttt_mlp, ttt_mlp_step
from allmem_ops.ops.ttt_mlp.tail import TAIL_TOKENS
from tests.ops.ttt_mlp.cases import NORMS, TOKENS, WEIGHTS, assert_equal_to, inputs, outputs, some_state, tokens

both = pytest.mark.parametrize("impl", ["reference", "chunk"])
LENGTHS = (0, 3, 5)


def held_back(x, state, lengths=LENGTHS):
    """`state`, which holds at least no token of `x` yet, and the first lengths[n] tokens of row n in its tail; NaN behind them."""
    tail = torch.tensor(lengths)
    fields = {name: torch.full_like(getattr(state, name), float("nan")) for name in ("tail_k", "tail_v", "tail_eta")}
    mu_sum = state.mu_sum.clone()
    for n, length in enumerate(lengths):
        for name in ("k", "v", "eta"):
            fields[f"tail_{name}"][n, :, :length] = x[name][n, :length].transpose(0, 1)
        mu_sum[n] += x["mu"][n, :length].sum(0)
    made = replace(state, **fields, mu_sum=mu_sum, tail=tail, count=state.count + tail, position=state.position + tail)
    made.check()
    return made


def case(norm="pre_write", **options):
    """Tokens, a state in mid-chunk that holds some of them back, and the state that one pass over those gives, row by row."""
    x = inputs(batch=3, length=16, grad=False)
    state = some_state(x, 3, 12, [2, 0, 6], norm=norm, **options).detach()
    passed = state.clone()
    for n, length in enumerate(LENGTHS):
        row = {name: t[n : n + 1] if name in TOKENS else t for name, t in tokens(x, 0, length).items()}
        if length:
            end = ttt_mlp(**row, chunk_size=12, norm=norm, initial_state=state.index_select([n]), output_final_state=True, **options).state
            passed.copy_([n], end, [0])
    return x, held_back(x, state), passed


def values(state):
    return {name: t for name, t in state.tensors().items() if not name.startswith("tail")}


@pytest.mark.parametrize("norm", NORMS)
def test_folded_is_the_state_of_one_pass(norm):
    _, state, passed = case(norm)
    before = state.clone()
    assert_equal_to(values(state.folded()), values(passed))
    assert not state.folded().tail.any()
    assert all(torch.equal(t.nan_to_num(7), getattr(before, name).nan_to_num(7)) for name, t in state.tensors().items())
    assert passed.folded() is passed


@both
@pytest.mark.parametrize("norm", NORMS)
def test_one_pass_goes_on_from_a_tail(norm, impl):
    x, state, passed = case(norm, grad_clip=0.3)
    options = {"chunk_size": 12, "norm": norm, "grad_clip": 0.3, "output_final_state": True, "impl": impl}
    got, want = (outputs(ttt_mlp(**x, initial_state=s, **options)) for s in (state, passed))
    assert_equal_to(got, want)


@both
def test_steps_go_on_from_a_tail_and_leave_inactive_rows_alone(impl):
    x, state, passed = case()
    before, active = state.clone(), torch.tensor([True, False, True])
    got, want = (ttt_mlp_step(*(x[name] for name in TOKENS), s, active=active, impl=impl) for s in (state, passed))
    assert_equal_to({"o": got}, {"o": want})
    pairs = [(state, passed, 0), (state, before, 1), (state, passed, 2)]
    for a, b, n in pairs:
        assert_equal_to({name: t[n] for name, t in values(a).items()}, {name: t[n] for name, t in values(b).items()})
    for name, t in state.tensors().items():
        assert torch.equal(t[1].nan_to_num(7), getattr(before, name)[1].nan_to_num(7)), name
    assert state.tail.tolist() == [0, LENGTHS[1], 0]


def test_gradients_do_not_cross_a_tail():
    x, state, passed = case()
    leaf = state.w_up.requires_grad_()
    other = passed.w_up.requires_grad_()
    found = [torch.autograd.grad(ttt_mlp(**x, chunk_size=12, initial_state=s).o.sum(), t)[0] for s, t in ((state, leaf), (passed, other))]
    torch.testing.assert_close(*found)


def test_reset_selection_and_saving_keep_or_drop_the_tail(tmp_path):
    x, state, _ = case()
    assert state.index_select([2, 1]).tail.tolist() == [5, 3]
    torch.save(state.state_dict(), tmp_path / "state.pt")
    loaded = MemoryState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(loaded.tail_v.nan_to_num(7), state.tail_v.nan_to_num(7)) and loaded.tail.tolist() == list(LENGTHS)
    state.reset([2])
    assert state.tail.tolist() == [0, 3, 0] and not state.tail_k[2].any() and not state.tail_eta[2].any()
    assert_equal_to(values(state.index_select([2])), values(MemoryState.initial(*(x[n] for n in WEIGHTS), batch=1, chunk_size=12)))


@pytest.mark.parametrize("tail", [[0, 4, 0], [0, -1, 0], [0, TAIL_TOKENS, 0]])
def test_an_illegal_tail_is_refused(tail):
    _, state, _ = case()
    counts = torch.tensor([100, 3 if tail[1] == 4 else 100, 100])
    with pytest.raises(ValueError, match="`tail` must lie in"):
        replace(state, chunk_size=200, count=counts, tail=torch.tensor(tail)).check()
