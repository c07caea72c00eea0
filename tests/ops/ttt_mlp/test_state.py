"""`MemoryState`: rows, bytes, saving, options."""

from dataclasses import replace

import pytest
import torch

from allmem_ops import MemoryState, ttt_mlp, ttt_mlp_step
from tests.ops.ttt_mlp.cases import LEARNT, TOKENS, WEIGHTS, assert_equal_to, inputs, outputs, some_state


@pytest.fixture
def x():
    return inputs(batch=3, grad=False)


@pytest.fixture
def state(x):
    return some_state(x, 3, 4, [1, 0, 3], grad_clip=0.2).detach()


def go_on(state, x):
    return outputs(ttt_mlp(**x, chunk_size=4, grad_clip=0.2, initial_state=state, output_final_state=True))


def test_bytes_are_as_documented_and_constant(x, state):
    H, h, d = x["w_gate"].shape
    matrices, row = 3 * H * h * d, H * (2 * h + d) + H
    tail = H * 64 * (2 * d + 3)
    assert state.nbytes == 3 * (3 * matrices + row + tail) * 8 + 3 * 3 * 8
    before = state.nbytes
    for t in range(6):
        ttt_mlp_step(*(x[name][:, t : t + 1] for name in TOKENS), state)
        assert state.nbytes == before


def test_what_was_right_is_checked_again_once_it_is_something_else(state):
    state.check()
    right = state.g_up
    state.g_up = right[:, :1]
    with pytest.raises(ValueError, match="`g_up` must"):
        state.check()
    state.g_up = right
    state.check()
    state.chunk_size = 0
    with pytest.raises(ValueError, match="`chunk_size` must"):
        state.check()


def test_initial_state_is_no_state(x):
    made = MemoryState.initial(*(x[name] for name in WEIGHTS), batch=3, chunk_size=4)
    assert_equal_to(
        outputs(ttt_mlp(**x, chunk_size=4, initial_state=made, output_final_state=True)),
        outputs(ttt_mlp(**x, chunk_size=4, output_final_state=True)),
        0,
    )


def test_initial_state_passes_gradients_to_the_weights():
    x = inputs()
    made = MemoryState.initial(*(x[name] for name in WEIGHTS), batch=2, chunk_size=4)
    found = torch.autograd.grad(ttt_mlp(**x, chunk_size=4, initial_state=made).o.square().sum(), list(x.values()))
    want = torch.autograd.grad(ttt_mlp(**x, chunk_size=4).o.square().sum(), list(x.values()))
    assert_equal_to(dict(zip(x, found, strict=True)), dict(zip(x, want, strict=True)))


def test_index_select_forks_rows(x, state):
    forked = state.index_select([2, 0, 2])
    x = x | {name: x[name][:1].expand(3, *x[name].shape[1:]) for name in TOKENS}
    found = go_on(forked, x)
    for name, t in found.items():
        assert torch.equal(t[0], t[2]), name
        assert name.startswith(("n_", "tail")) or not torch.equal(t[0], t[1]), name


def test_copy_overwrites_rows_alone(x, state):
    other = MemoryState.initial(*(x[name] for name in WEIGHTS), batch=2, chunk_size=4, grad_clip=0.2)
    kept = state.clone()
    state.copy_([1], other, [0])
    for name, t in state.tensors().items():
        assert torch.equal(t[[0, 2]], getattr(kept, name)[[0, 2]]) and torch.equal(t[1], getattr(other, name)[0])


@pytest.mark.parametrize("rows", [None, [1], [2, 0]])
def test_reset_returns_to_the_initial_weights(x, state, rows):
    kept = state.clone()
    state.reset(rows)
    fresh = MemoryState.initial(*(x[name] for name in WEIGHTS), batch=3, chunk_size=4, grad_clip=0.2)
    for name, t in state.tensors().items():
        for n in range(3):
            assert torch.equal(t[n], getattr(fresh if rows is None or n in rows else kept, name)[n])


def test_reset_works_on_what_ttt_mlp_returns(x):
    state = ttt_mlp(**x, chunk_size=4, output_final_state=True).state
    state.reset()
    assert_equal_to(
        outputs(ttt_mlp(**x, chunk_size=4, initial_state=state, output_final_state=True)),
        outputs(ttt_mlp(**x, chunk_size=4, output_final_state=True)),
        0,
    )


def test_saved_and_restored(x, state, tmp_path):
    torch.save(state.state_dict(), tmp_path / "state.pt")
    restored = MemoryState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.options() == state.options()
    assert_equal_to(go_on(restored, x), go_on(state, x), 0)
    restored.reset([0])


def test_clones_and_outputs_share_no_storage(x, state):
    made = ttt_mlp(**x, chunk_size=4, grad_clip=0.2, initial_state=state, output_final_state=True).state
    fields = [t for s in (state, state.clone(), made) for t in s.tensors().values()]
    assert len({t.untyped_storage().data_ptr() for t in fields}) == len(fields)
    assert all(t.is_contiguous() for t in fields)


def test_a_state_of_the_reference_goes_on_in_the_chunk_path(x):
    first = {impl: ttt_mlp(**x, chunk_size=4, output_final_state=True, impl=impl).state for impl in ("reference", "chunk")}
    found = [outputs(ttt_mlp(**x, chunk_size=4, initial_state=s, output_final_state=True)) for s in first.values()]
    assert_equal_to(*found)


@pytest.mark.parametrize(
    "field, value",
    [
        ("count", torch.tensor([0, 4, 0])),
        ("count", torch.tensor([0, -1, 0])),
        ("count", torch.zeros(3)),
        ("w_up", torch.zeros(3, 2, 5, 4, dtype=torch.float64)),
        ("m_up", torch.zeros(3, 2, 6, 4)),
        ("n_down", torch.zeros(3, 2, 6, dtype=torch.float64)),
        ("initial_down", torch.zeros(2, 4, 6)),
        ("chunk_size", 0),
        ("norm", "rms"),
        ("residual", 1),
        ("grad_clip", -1.0),
        ("eps", -1e-5),
        ("dtype", "int8"),
    ],
)
def test_an_illegal_state_is_refused(state, field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        MemoryState.from_state_dict(state.state_dict() | {field: value})
    with pytest.raises(ValueError, match=f"`{field}`"):
        replace(state, **{field: value}).check()


def test_momentum_and_weights_keep_their_graph():
    x = inputs()
    state = ttt_mlp(**x, chunk_size=4, output_final_state=True).state
    for name, t in state.tensors().items():
        assert t.requires_grad == (name in LEARNT), name
    assert not any(t.requires_grad for t in state.detach().tensors().values())
    assert not any(t.requires_grad for t in state.shared().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounded_weights_follow_every_change(dtype):
    x = inputs(batch=3, length=6, dtype=dtype, grad=False)
    state = some_state(x, 3, 4, [1, 0, 3]).detach()

    def follow(s):
        assert len(s.rounded) == 3 and all(r.dtype == dtype for r in s.rounded)
        return all(torch.equal(r, w.to(dtype)) for r, w in zip(s.rounded, (s.w_gate, s.w_up, s.w_down), strict=True))

    assert follow(state) and follow(ttt_mlp(**x, chunk_size=4, initial_state=state, output_final_state=True).state)
    for impl in ("reference", "chunk"):
        ttt_mlp_step(*(x[name] for name in TOKENS), state, active=torch.tensor([True, False, True]), impl=impl)
        assert follow(state)
    other = MemoryState.initial(*(x[name] for name in WEIGHTS), batch=2, chunk_size=4, dtype=dtype)
    for made in (state.index_select([2, 0]), state.clone(), state.copy_([1], other, [0]), MemoryState.from_state_dict(state.state_dict())):
        assert follow(made)
    assert state.detach().rounded is state.rounded
    assert state.clone().rounded[0].data_ptr() != state.rounded[0].data_ptr()
    state.reset([0])
    assert follow(state)
    state.w_up.mul_(2)
    assert not follow(state)
    state.refresh()
    assert follow(state)
    # the weights in half precision are not part of the fields, and a float32 state needs none
    assert state.nbytes == sum(t.nbytes for t in state.tensors().values()) + state.w_gate.numel() * 3 * 2
    assert not MemoryState.initial(*(x[name] for name in WEIGHTS), batch=1).rounded
