"""Values and gradients of `swa`: chunk against the definition, the definition against other formulas, and properties."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from allmem_ops import swa
from allmem_ops.ops.swa import chunk, registration
from allmem_ops.testing import assert_within_budget
from tests.ops.swa.cases import assert_same, cast, inputs, plain, results

CASES = {  # Tq, Tk, window, sinks; a block is 64 queries
    "one token": (1, 1, 3, 2),
    "one block": (63, 63, 7, 2),
    "past one block": (65, 65, 64, 4),
    "blocks and window apart": (111, 111, 50, 3),
    "window of one": (130, 130, 1, 0),
    "window of one and sinks": (130, 130, 1, 5),
    "window beyond T": (111, 111, 500, 9),
    "window is T": (128, 128, 128, 3),
    "many sinks": (200, 200, 33, 90),
    "sinks beyond T": (70, 70, 5, 300),
    "queries are the last": (65, 200, 70, 10),
    "one query": (1, 200, 70, 10),
    "queries inside the window": (20, 100, 90, 30),
}


@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_chunk_equals_reference(case, far):
    Tq, Tk, window, sinks = case
    x = inputs(Tq, Tk, B=2, HQ=6, HK=2, far=far)
    options = {"window": window, "sinks": sinks, "scale": 0.3}
    assert_same(results(x, "chunk", **options), results(x, "reference", **options))


@settings(max_examples=40)
@given(
    st.integers(1, 90),
    st.integers(0, 60),
    st.integers(1, 100),
    st.integers(0, 100),
    st.sampled_from([(1, 1), (3, 1), (4, 4), (6, 3)]),
    st.sampled_from([1, 5, 16]),
    st.booleans(),
)
def test_chunk_equals_reference_at_any_block_size(Tq, before, window, sinks, heads, size, far):
    x = inputs(Tq, Tq + before, HQ=heads[0], HK=heads[1], D=4, far=far)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk, "block_size", lambda _: size)
        got = results(x, "chunk", window=window, sinks=sinks)
    assert_same(got, results(x, "reference", window=window, sinks=sinks))


def test_reference_equals_the_plain_formula():
    x = inputs(40, 60, B=2, HQ=6, HK=2, far=True)
    assert_same(results(x, "reference", window=9, sinks=4), plain(x, 9, 4), 1e-12)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
def test_gradcheck(impl, far):
    x = inputs(9, 12, D=3, far=far)

    def f(*values):
        return swa(**dict(zip(x, values, strict=True)), window=4, sinks=3, return_lse=True, impl=impl)

    assert torch.autograd.gradcheck(f, tuple(x.values()))


def test_reference_gradgradcheck():
    x = inputs(5, D=2)
    assert torch.autograd.gradgradcheck(lambda q, k, v: swa(q, k, v, window=3, sinks=1, impl="reference"), tuple(x.values()))


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_window_of_T_equals_causal_attention(impl):
    x = inputs(111, B=2)
    q, k, v = (t.transpose(1, 2) for t in x.values())
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    for window in (111, 10**6):
        torch.testing.assert_close(swa(**x, window=window, impl=impl), want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(swa(**x, window=110, impl=impl), want, rtol=1e-12, atol=1e-12)


@settings(max_examples=15)
@given(st.sampled_from(["reference", "chunk"]), st.integers(1, 139), st.integers(1, 80), st.integers(0, 80), st.booleans())
def test_the_future_never_changes_the_past_bit_for_bit(impl, cut, window, sinks, far):
    x = inputs(140, dtype=torch.float32, D=16, far=far)
    y = {name: torch.cat([t[:, :cut], torch.randn_like(t[:, cut:])], 1) for name, t in x.items()}
    a, b = (swa(**z, window=window, sinks=sinks, return_lse=True, impl=impl) for z in (x, y))
    for before, after in zip(a, b, strict=True):
        assert torch.equal(before[:, :cut], after[:, :cut])
        assert not torch.equal(before[:, cut:], after[:, cut:])


@settings(max_examples=15)
@given(st.sampled_from(["reference", "chunk"]), st.integers(0, 139), st.integers(1, 80), st.integers(0, 80))
def test_keys_out_of_reach_have_zero_gradient(impl, i, window, sinks):
    x = inputs(140)
    o, lse = swa(**x, window=window, sinks=sinks, return_lse=True, impl=impl)
    dk, dv = torch.autograd.grad(o[:, i].sum() + lse[:, i].sum(), (x["k"], x["v"]))
    j = torch.arange(140)
    reach = (j <= i) & ((i - j < window) | (j < sinks))
    for grad in (dk, dv):
        touched = (grad != 0).flatten(2).any(-1)[0]
        assert torch.equal(touched, reach) or (grad is dk and reach.sum() == 1)  # one key: its probability is 1 whatever it is


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_q_sinks_counts_only_for_sinks_outside_the_window(impl):
    x = inputs(80, far=True)
    got = results(x, impl, window=20, sinks=5)["dq_sinks"]
    assert torch.equal((got != 0).flatten(2).any(-1)[0], torch.arange(80) >= 20)
    assert (results(x, impl, window=80, sinks=5)["dq_sinks"] == 0).all()
    assert (results(x, impl, window=20)["dq_sinks"] == 0).all()
    same = {**x, "q_sinks": x["q"]}
    torch.testing.assert_close(swa(**same, window=20, sinks=5, impl=impl), swa(x["q"], x["k"], x["v"], window=20, sinks=5, impl=impl))


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_gqa_equals_repeated_heads(impl):
    x = inputs(111, HQ=6, HK=2)
    k, v = (x[name].repeat_interleave(3, 2) for name in ("k", "v"))
    torch.testing.assert_close(
        swa(**x, window=20, sinks=3, impl=impl), swa(x["q"], k, v, window=20, sinks=3, impl=impl), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("cuts", [[0, 1, 1, 66, 140], [0, 0, 140, 140], [0, 63, 64, 140]], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed_equals_separate(impl, cuts, index):
    x = inputs(140, far=True)
    options = {"window": 11, "sinks": 4}
    o, lse = swa(**x, **options, cu_seqlens=torch.tensor(cuts, dtype=index), return_lse=True, impl=impl)
    parts = [swa(**{n: t[:, a:b] for n, t in x.items()}, **options, return_lse=True, impl=impl) for a, b in pairwise(cuts)]
    loss = [y.sin().sum() for y in (o, lse)]
    apart = [torch.cat(y, 1) for y in zip(*parts, strict=True)]
    for got, want in zip((o, lse), apart, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(sum(loss), list(x.values()))
    for got, want in zip(grads, torch.autograd.grad(sum(y.sin().sum() for y in apart), list(x.values())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_no_tokens_give_empty_results(impl):
    for Tq, Tk in ((0, 0), (0, 5)):
        x = inputs(Tq, Tk, far=True)
        got = results(x, impl, window=3, sinks=1)
        assert got["o"].shape == (1, 0, 4, 8)
        assert got["lse"].shape == (1, 0, 4)
        assert (got["dk"] == 0).all()
        assert got["dk"].shape == x["k"].shape
    empty = swa(**inputs(0), window=3, cu_seqlens=torch.tensor([0, 0]), impl=impl)
    assert empty.shape == (1, 0, 4, 8)


def test_views_and_expanded_gradients_equal_contiguous_tensors():
    fused = torch.randn(2, 70, 8, 16, dtype=torch.float64)
    views = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    odd = [torch.randn(16, 4, 70, 2, dtype=torch.float64).permute(3, 2, 1, 0)[:, :, :h] for h in (4, 2, 2)]
    for tensors in (views, odd):
        strided = dict(zip("qkv", (t.detach().requires_grad_() for t in tensors), strict=True))
        assert not any(t.is_contiguous() for t in strided.values())
        dense = {name: t.detach().contiguous().requires_grad_() for name, t in strided.items()}
        a, b = (swa(**x, window=9, sinks=2) for x in (strided, dense))
        assert torch.equal(a, b)
        ga = torch.autograd.grad(a.sum(), list(strided.values()))  # sum() hands back an expanded gradient
        gb = torch.autograd.grad(b, list(dense.values()), torch.ones_like(b))
        for x, y in zip(ga, gb, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("shape", [(1, 40, 60), (63, 63, 60), (65, 111, 96), (111, 111, 96)], ids=str)
def test_error_budget(dtype, impl, shape):
    Tq, Tk, D = shape
    x = inputs(Tq, Tk, B=2, HQ=6, HK=2, D=D, dtype=dtype, far=True)
    got = results(x, impl, window=20, sinks=4)
    low = plain(x, 20, 4)
    exact = results(cast(x, torch.float64), "reference", window=20, sinks=4)
    assert got["o"].dtype == dtype
    assert got["lse"].dtype == torch.float32
    for name in exact:
        assert_within_budget(name, got[name], low[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_token_attends_itself(dtype):
    """Plain PyTorch is exact here (its softmax gradient is 0 for one key); the bound is that of <do, v> - <do, o>, fp32 sums of D terms."""
    x = inputs(1, dtype=dtype, D=60)
    got, exact = results(x, "chunk", window=3), results(cast(x, torch.float64), "reference", window=3)
    assert torch.equal(got["o"], x["v"].repeat_interleave(2, 2))
    for name in ("lse", "dq", "dk", "dv"):
        size = exact[name].abs().max().item()
        torch.testing.assert_close(got[name].double(), exact[name], rtol=0, atol=(torch.finfo(got[name].dtype).eps + 60 * 2**-24) * size)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_autocast_changes_nothing(impl):
    x = inputs(70, dtype=torch.float32)
    want = results(x, impl, window=9, sinks=2)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(x, impl, window=9, sinks=2)
    names = (
        want if impl == "chunk" else ("o", "lse")
    )  # the reference's gradients are those of ordinary autograd, which here runs under autocast
    assert all(torch.equal(got[name], want[name]) for name in names)


def test_large_scores_stay_finite():
    x = inputs(70, dtype=torch.float32, D=16)
    x = {name: (t * 100).detach().requires_grad_() for name, t in x.items()}
    for impl in ("reference", "chunk"):
        assert all(torch.isfinite(t).all() for t in results(x, impl, window=9, sinks=2).values())


def test_two_runs_are_bitwise_equal():
    x = inputs(140, dtype=torch.float32, far=True)
    a, b = (results(x, "chunk", window=30, sinks=4) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_inputs_stay_as_they_are_and_a_second_backward_agrees():
    x = inputs(70, far=True)
    before = {name: t.detach().clone() for name, t in x.items()}
    o = swa(**x, window=9, sinks=2)
    first, second = (torch.autograd.grad(o.sum(), list(x.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(x[name].detach(), before[name]) for name in x)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("T", [2000, 8000])
def test_no_tensor_is_larger_than_the_inputs_or_one_block_of_scores(T):
    window, sinks, size = 100, 5, 64
    x = {name: t.detach() for name, t in inputs(T, HQ=2, HK=1, dtype=torch.float32).items()}
    args = (x["q"], x["k"], x["v"], None, None)
    with LargestTensor() as largest:
        o, lse = chunk.swa_chunk_forward(*args, window, sinks, 1.0)
        chunk.swa_chunk_backward(o, lse, *args, o, lse, window, sinks, 1.0)
    assert largest.numel <= max(x["q"].numel(), 2 * size * (size + window - 1))


# Faults put in on purpose: each must fail the comparison that the tests above rest on.
def _forward(change):
    def faulty(q, k, v, q_sinks, cu_seqlens, window, sinks, scale):
        args = {"q": q, "k": k, "v": v, "q_sinks": q_sinks, "cu_seqlens": cu_seqlens, "window": window, "sinks": sinks, "scale": scale}
        return chunk.swa_chunk_forward(**(args | change(args)))

    return "swa_chunk_forward", faulty


def _backward(change_in=lambda do, dlse: (do, dlse), change_out=lambda *grads: grads):
    def faulty(do, dlse, *rest):
        return change_out(*chunk.swa_chunk_backward(*change_in(do, dlse), *rest))

    return "swa_chunk_backward", faulty


FAULTS = {
    "window one too large": _forward(lambda a: {"window": a["window"] + 1}),
    "window one too small": _forward(lambda a: {"window": a["window"] - 1}),
    "one sink too few": _forward(lambda a: {"sinks": a["sinks"] - 1}),
    "q in place of q_sinks": _forward(lambda a: {"q_sinks": None}),
    "q_sinks everywhere": _forward(lambda a: {"q": a["q_sinks"]}),
    "scale of another head dim": _forward(lambda a: {"scale": a["scale"] * 1.01}),
    "key heads swapped": _forward(lambda a: {"k": a["k"].flip(2)}),
    "output zeroed": ("swa_chunk_forward", lambda *a: (torch.zeros_like(a[0]), chunk.swa_chunk_forward(*a)[1])),
    "lse in base 2": ("swa_chunk_forward", lambda *a: (chunk.swa_chunk_forward(*a)[0], chunk.swa_chunk_forward(*a)[1] / 0.6931)),
    "gradient of lse dropped": _backward(lambda do, dlse: (do, torch.zeros_like(dlse))),
    "gradient of lse negated": _backward(lambda do, dlse: (do, -dlse)),
    "dk zeroed": _backward(change_out=lambda dq, dk, dv, ds: (dq, torch.zeros_like(dk), dv, ds)),
    "dv of one token lost": _backward(change_out=lambda dq, dk, dv, ds: (dq, dk, dv.index_fill(1, torch.tensor([77]), 0), ds)),
    "dq and dq_sinks joined": _backward(change_out=lambda dq, dk, dv, ds: (dq + ds, dk, dv, torch.zeros_like(ds))),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_fails_the_comparison(fault, monkeypatch):
    x = inputs(140, far=True)
    want = results(x, "reference", window=20, sinks=3)
    assert_same(results(x, "chunk", window=20, sinks=3), want)
    monkeypatch.setattr(registration, *fault)
    with pytest.raises(AssertionError):
        assert_same(results(x, "chunk", window=20, sinks=3), want)


EDGES = {"a token sees the next one": ("after", 1), "a key stays in the window one token too long": ("upto", -1)}


@pytest.mark.parametrize("triangle, shift", EDGES.values(), ids=EDGES.keys())
def test_a_shifted_mask_fails_the_comparison(triangle, shift, monkeypatch):
    x = inputs(140)
    want = results(x, "reference", window=20, sinks=3)

    class Shifted(chunk._Triangles):
        def __init__(self, *args):
            super().__init__(*args)
            row = torch.arange(len(self.after))
            setattr(self, triangle, row > row[:, None] + shift if triangle == "after" else row <= row[:, None] + shift)

    monkeypatch.setattr(chunk, "_Triangles", Shifted)
    with pytest.raises(AssertionError):
        assert_same(results(x, "chunk", window=20, sinks=3), want)


@pytest.mark.parametrize("name", ["o", "lse", "dq", "dk", "dv", "dq_sinks"])
def test_a_zeroed_tensor_fails_the_budget(name):
    x = inputs(65, dtype=torch.bfloat16, D=16, far=True)
    low, exact = plain(x, 20, 4), results(cast(x, torch.float64), "reference", window=20, sinks=4)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(name, torch.zeros_like(low[name]), low[name], exact[name])
