"""`ttt_mlp_step`: steps equal one pass, rows keep their own counters, inactive rows keep their bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmem_ops import MemoryState, ttt_mlp, ttt_mlp_step
from tests.ops.ttt_mlp.cases import NORMS, TOKENS, WEIGHTS, assert_equal_to, inputs, outputs, some_state, tokens

both = pytest.mark.parametrize("impl", ["reference", "chunk"])


def step(x, state, start=0, stop=None, **options):
    return ttt_mlp_step(*(x[name][:, start:stop] for name in TOKENS), state, **options)


def initial(x, chunk_size, **options):
    return MemoryState.initial(*(x[name] for name in WEIGHTS), batch=x["q"].shape[0], chunk_size=chunk_size, dtype=x["q"].dtype, **options)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 6),
    st.sampled_from(NORMS),
    st.sampled_from([None, 0.15]),
    st.booleans(),
    st.sampled_from(["reference", "chunk"]),
)
def test_steps_equal_one_pass(lengths, chunk_size, norm, grad_clip, residual, impl):
    x = inputs(length=sum(lengths), grad=False)
    options = {"norm": norm, "grad_clip": grad_clip, "residual": residual}
    whole = outputs(ttt_mlp(**x, chunk_size=chunk_size, output_final_state=True, **options))
    state, parts, start = initial(x, chunk_size, **options), [], 0
    for length in lengths:
        parts.append(step(x, state, start, start + length, impl=impl))
        start += length
    assert_equal_to({"o": torch.cat(parts, 1)} | state.tensors(), whole)


@given(
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
    st.integers(1, 12),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.sampled_from(NORMS),
    st.sampled_from(["reference", "chunk"]),
)
def test_steps_from_mixed_counters_with_inactive_rows(counts, length, active, norm, impl):
    x = inputs(batch=3, length=length, grad=False)
    state = some_state(x, 3, 5, counts, norm=norm, grad_clip=0.15).detach()
    before = state.clone()
    want = ttt_mlp(**x, chunk_size=5, norm=norm, grad_clip=0.15, initial_state=before, output_final_state=True)
    o = step(x, state, active=torch.tensor(active), impl=impl)
    for n in range(3):
        if active[n]:
            pairs = {"o": o[n]} | {name: t[n] for name, t in state.tensors().items()}
            assert_equal_to(pairs, {"o": want.o[n]} | {name: t[n] for name, t in want.state.tensors().items()})
        else:
            assert not o[n].any()
            assert all(torch.equal(t[n], getattr(before, name)[n]) for name, t in state.tensors().items())


@both
def test_what_an_inactive_row_holds_reaches_nobody(impl):
    x = inputs(batch=3, length=7, dtype=torch.float32, grad=False)
    active = torch.tensor([True, False, True])
    clean, dirty = initial(x, 4), initial(x, 4)
    want = step(x, clean, active=active, impl=impl)
    poisoned = {name: t.clone() for name, t in x.items()}
    for name in TOKENS:
        poisoned[name][1] = float("nan")
    got = step(poisoned, dirty, active=active, impl=impl)
    assert torch.equal(got, want) and not got[1].any()
    assert all(torch.equal(t, getattr(clean, name)) for name, t in dirty.tensors().items())


@both
def test_the_token_that_completes_a_chunk_reads_the_weights_from_before(impl):
    x = inputs(length=4, grad=False)
    state = initial(x, 4)
    step(x, state, 0, 3, impl=impl)
    assert torch.equal(state.w_up, x["w_up"].expand_as(state.w_up))
    o = step(x, state, 3, 4, impl=impl)
    torch.testing.assert_close(o, ttt_mlp(**tokens(x, 3, 4), chunk_size=4).o, rtol=1e-12, atol=1e-13)
    assert not torch.equal(state.w_up, x["w_up"].expand_as(state.w_up))
    assert state.count.tolist() == [0, 0] and not state.g_up.any() and not state.mu_sum.any()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_steps_follow_one_pass(dtype, impl):
    x = inputs(length=40, d=16, h=32, dtype=dtype, eta=0.02, grad=False)
    state = initial(x, 8, residual=False)
    o = torch.cat([step(x, state, t, t + 1, impl=impl) for t in range(40)], 1)
    assert o.dtype == dtype and state.w_up.dtype == torch.float32
    exact = {name: t.double() for name, t in x.items()}
    want = ttt_mlp(**exact, chunk_size=8, residual=False, impl="reference").o
    low = ttt_mlp(**x, chunk_size=8, residual=False, impl="reference").o
    error, allowed = ((y.double() - want).abs().max().item() for y in (o, low))
    # A step's sums over single tokens round their operands as the chunk's do, in another order.
    assert error <= 2 * (allowed + torch.finfo(dtype).eps * want.abs().max().item())


@both
def test_a_long_step_over_many_chunks(impl):
    x = inputs(length=256, grad=False, batch=2)
    whole = outputs(ttt_mlp(**x, chunk_size=3, output_final_state=True))
    state = initial(x, 3)
    assert_equal_to({"o": step(x, state, impl=impl)} | state.tensors(), whole)


def test_steps_have_no_autograd_and_no_data_dependent_python():
    x = inputs(length=7)
    state = initial(x, 4).detach()
    assert not step(x, state).requires_grad
    # The meta device has no values: any read of a counter by the host would raise.
    on_meta = {name: t.to("meta") for name, t in x.items()}
    for impl in ("reference", "chunk"):
        state = initial(x, 4).detach().to("meta")
        assert step(on_meta, state, active=torch.ones(2, dtype=torch.bool, device="meta"), impl=impl).shape == x["q"].shape
