"""Properties of `ttt_mlp` that hold for every input, drawn by hypothesis."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmem_ops import ttt_mlp
from tests.ops.ttt_mlp.cases import LEARNT, NORMS, TOKENS, WEIGHTS, assert_equal_to, gradients, inputs, outputs, tokens

norms = st.sampled_from(NORMS)
clips = st.sampled_from([None, 0.15])
impls = st.sampled_from(["reference", "chunk"])
chunk_sizes = st.integers(1, 6)


@given(st.lists(st.integers(0, 17), max_size=3), chunk_sizes, norms, clips, impls)
def test_split_equals_one_pass(cuts, chunk_size, norm, grad_clip, impl):
    x = inputs(length=17, grad=False)
    options = {"chunk_size": chunk_size, "norm": norm, "grad_clip": grad_clip, "output_final_state": True, "impl": impl}
    whole = outputs(ttt_mlp(**x, **options))
    state, parts, edges = None, [], [0, *sorted(cuts), 17]
    for start, stop in pairwise(edges):
        o, state = ttt_mlp(**tokens(x, start, stop), initial_state=state, **options)
        parts.append(o)
    assert_equal_to({"o": torch.cat(parts, 1)} | state.tensors(), whole)


@given(st.integers(0, 4), chunk_sizes, norms, clips, impls)
def test_split_at_a_chunk_edge_has_the_gradients_of_one_pass(chunks, chunk_size, norm, grad_clip, impl):
    x = inputs(length=4 * chunk_size + 3)
    options = {"chunk_size": chunk_size, "norm": norm, "grad_clip": grad_clip, "output_final_state": True, "impl": impl}
    whole = outputs(ttt_mlp(**x, **options))
    first = ttt_mlp(**tokens(x, 0, chunks * chunk_size), **options)
    second = ttt_mlp(**tokens(x, chunks * chunk_size, None), initial_state=first.state, **options)
    parts = {"o": torch.cat([first.o, second.o], 1)} | second.state.tensors()
    assert_equal_to(parts | gradients(parts, x), whole | gradients(whole, x))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), chunk_sizes, norms, clips, impls)
def test_packed_equals_separate(lengths, chunk_size, norm, grad_clip, impl):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    x = inputs(batch=1, length=int(ends[-1]))
    options = {"chunk_size": chunk_size, "norm": norm, "grad_clip": grad_clip, "output_final_state": True, "impl": impl}
    packed = outputs(ttt_mlp(**x, cu_seqlens=ends, **options))
    separate = [outputs(ttt_mlp(**tokens(x, a, b), **options)) for a, b in pairwise(ends)]
    joined = {name: torch.cat([s[name] for s in separate], 1 if name == "o" else 0) for name in packed}
    assert_equal_to(packed | gradients(packed, x), joined | gradients(joined, x))


@given(st.permutations(range(4)), norms, clips, impls)
def test_token_order_inside_a_chunk_does_not_change_the_state(order, norm, grad_clip, impl):
    x = inputs(length=12, grad=False)
    options = {"chunk_size": 4, "norm": norm, "grad_clip": grad_clip, "output_final_state": True, "impl": impl}
    index = torch.cat([torch.arange(4), 4 + torch.tensor(order), torch.arange(8, 12)])
    moved = x | {name: x[name][:, index] for name in ("k", "v", "eta", "mu")}
    assert_equal_to(outputs(ttt_mlp(**moved, **options)), outputs(ttt_mlp(**x, **options)))


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("norm", NORMS)
def test_causality_bit_for_bit(norm, impl):
    x = inputs(length=14, dtype=torch.float32, grad=False)
    call = {"chunk_size": 4, "norm": norm, "grad_clip": 0.15, "impl": impl}
    o = ttt_mlp(**x, **call).o
    for t in range(14):
        moved = {name: v.clone() for name, v in x.items()}
        for name in TOKENS:
            moved[name][:, t] += 0.5
        changed = ttt_mlp(**moved, **call).o
        assert torch.equal(changed[:, :t], o[:, :t])
        assert not torch.equal(changed[:, t], o[:, t])


@given(chunk_sizes, norms, impls)
def test_no_rate_and_no_momentum_keep_the_memory_up_to_its_norm(chunk_size, norm, impl):
    x = inputs(length=20, eta=0.0, grad=False)
    state = ttt_mlp(**x, chunk_size=chunk_size, norm=norm, impl=impl, output_final_state=True).state
    for name in WEIGHTS:
        # every write scales a row by N / (N + eps), and eps = 1e-5
        torch.testing.assert_close(getattr(state, name), x[name].expand_as(getattr(state, name)), rtol=20 * 2e-4, atol=0)
    for name in LEARNT[3:]:
        assert not getattr(state, name).any()


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_row_norms_after_normalisation_are_the_initial_ones(impl):
    x = inputs(length=20, eta=0.5, grad=False)
    state = ttt_mlp(**x, chunk_size=4, norm="post_write", eps=0.0, impl=impl, output_final_state=True).state
    for matrix in ("gate", "up", "down"):
        w = getattr(state, f"w_{matrix}")
        torch.testing.assert_close(w.norm(dim=-1), x[f"w_{matrix}"].norm(dim=-1).expand(w.shape[:-1]), rtol=1e-12, atol=0)
        torch.testing.assert_close(getattr(state, f"n_{matrix}"), w.norm(dim=-1), rtol=1e-12, atol=0)
        assert not torch.allclose(w, x[f"w_{matrix}"].expand_as(w), rtol=1e-3)
    # pre_write: what the write starts from, W - M
    state = ttt_mlp(**x, chunk_size=4, eps=0.0, impl=impl, output_final_state=True).state
    for matrix in ("gate", "up", "down"):
        start = getattr(state, f"w_{matrix}") - getattr(state, f"m_{matrix}")
        torch.testing.assert_close(start.norm(dim=-1), x[f"w_{matrix}"].norm(dim=-1).expand(start.shape[:-1]), rtol=1e-12, atol=0)
