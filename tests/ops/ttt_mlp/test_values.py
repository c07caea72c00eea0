"""The chunk path against the definition, and the definition against autograd, in float64."""

import pytest
import torch

from allmem_ops import ttt_mlp
from allmem_ops.ops.ttt_mlp import layout, reference
from tests.ops.ttt_mlp.cases import NORMS, WEIGHTS, assert_equal_to, everything, inputs, some_state

# Lengths around the chunk's edge: T < c, T = 1, T = c, T = n c, n c + 1, c = 1, c = 16 and not a multiple of it.
LENGTHS = [(3, 4), (1, 4), (4, 4), (12, 4), (13, 4), (5, 1), (1, 1), (33, 16), (20, 7)]


@pytest.mark.parametrize("length, chunk_size", LENGTHS)
@pytest.mark.parametrize("grad_clip", [None, 0.15])
@pytest.mark.parametrize("norm", NORMS)
def test_chunk_equals_reference(norm, grad_clip, length, chunk_size):
    x = inputs(length=length)
    options = {"chunk_size": chunk_size, "norm": norm, "grad_clip": grad_clip}
    for residual in (True, False):
        assert_equal_to(everything(x, "chunk", residual=residual, **options), everything(x, "reference", residual=residual, **options))


@pytest.mark.parametrize("count", [0, 3, [0, 3]])
@pytest.mark.parametrize("grad_clip", [None, 0.15])
@pytest.mark.parametrize("norm", NORMS)
def test_chunk_equals_reference_from_a_state(norm, grad_clip, count):
    for length in (1, 2, 5, 14):
        x = inputs(length=length)
        options = {"chunk_size": 5, "norm": norm, "grad_clip": grad_clip}
        state = some_state(x, 2, count=count, **options)
        assert_equal_to(everything(x, "chunk", state, **options), everything(x, "reference", state, **options))


@pytest.mark.parametrize("norm", NORMS)
def test_chunk_equals_reference_packed_from_a_state(norm):
    x = inputs(batch=1, length=23)
    options = {"chunk_size": 4, "norm": norm, "grad_clip": 0.15, "cu_seqlens": torch.tensor([0, 0, 9, 10, 10, 23])}
    state = some_state(x, 5, 4, [2, 0, 3, 1, 3], norm=norm, grad_clip=0.15)
    assert_equal_to(everything(x, "chunk", state, **options), everything(x, "reference", state, **options))


@pytest.mark.parametrize("norm", NORMS)
def test_what_runs_side_by_side_does_not_change_the_result(norm, monkeypatch):
    x = inputs(batch=3, length=23)
    options = {"chunk_size": 2, "norm": norm, "grad_clip": 0.15}
    want = everything(x, "reference", **options)
    seen = set()
    for elements in (1, 400, 700, 2500):
        monkeypatch.setitem(layout.WORK_ELEMENTS, "cpu", elements)
        seen.add(layout.side_by_side(3, 2, 6, 4, 2, "cpu"))
        assert_equal_to(everything(x, "chunk", **options), want)
    assert seen == {(1, 1), (2, 1), (3, 1), (3, 4)}


@pytest.mark.parametrize("only_o", [True, False])
def test_gradients_without_the_final_states(only_o):
    x = inputs()
    assert_equal_to(everything(x, "chunk", only_o=only_o, chunk_size=4), everything(x, "reference", only_o=only_o, chunk_size=4))


def test_gradients_from_the_final_state_alone():
    x = inputs()
    found = []
    for impl in ("chunk", "reference"):
        state = ttt_mlp(**x, chunk_size=4, output_final_state=True, impl=impl).state
        names = [name for name in x if name != "q"]
        found.append(dict(zip(names, torch.autograd.grad(state.m_up.square().sum(), [x[name] for name in names]), strict=True)))
    assert_equal_to(*found)


def test_inner_gradient_is_autograds():
    x = inputs(batch=1, length=7)
    k, v, eta = (x[name][0].transpose(0, 1).detach() for name in ("k", "v", "eta"))
    w = [x[name].detach().requires_grad_() for name in WEIGHTS]
    written = reference.write_gradient(w, k, v, eta)
    for i, weight in enumerate(w):
        loss = -(eta[..., i] * (reference.read(w, k, residual=True) * v).sum(-1)).sum()
        torch.testing.assert_close(written[i], torch.autograd.grad(loss, weight)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("grad_clip", [None, 0.2])
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm, grad_clip, impl):
    x = inputs(batch=1, length=5, heads=1, d=2, h=3, eta=0.5)

    def call(*tensors):
        result = ttt_mlp(
            **dict(zip(x, tensors, strict=True)), chunk_size=2, norm=norm, grad_clip=grad_clip, output_final_state=True, impl=impl
        )
        return (result.o, *(getattr(result.state, name) for name in ("w_gate", "w_up", "w_down", "m_gate", "m_up", "m_down")))

    assert torch.autograd.gradcheck(call, tuple(x.values()))
