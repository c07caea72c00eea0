"""`WindowCache` and `swa_step`: any split, any step and any mix of positions equal one pass."""

import io
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from allmem_ops import WindowCache, swa, swa_step
from allmem_ops.ops.swa import cache as cache_module
from allmem_ops.testing import assert_within_budget
from tests.ops.swa.cases import cast, inputs, plain

HK, D = 2, 8


def empty(batch, window, sinks, dtype=torch.float64):
    return WindowCache.empty(batch, HK, D, window=window, sinks=sinks, dtype=dtype, device="cpu")


def tokens(T, batch=2, dtype=torch.float64):
    return {name: t.detach() for name, t in inputs(T, B=batch, HQ=4, HK=HK, D=D, dtype=dtype, far=True).items()}


def at(x, index):
    """Row b's token index[b] of every tensor, as [B, 1, H, D]."""
    return {name: t[torch.arange(len(index)), index][:, None] for name, t in x.items()}


def segments(x, cuts, window, sinks, impl):
    cache, outs = empty(2, window, sinks), []
    for a, b in pairwise(cuts):
        q, k, v, far = (x[name][:, a:b] for name in ("q", "k", "v", "q_sinks"))
        kp, vp = cache.keys_values()
        outs.append(swa(q, torch.cat([kp, k], 1), torch.cat([vp, v], 1), window=window, sinks=sinks, q_sinks=far, impl=impl))
        cache.append(k, v)
    return torch.cat(outs, 1)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 40), max_size=4),
    st.integers(1, 50),
    st.integers(0, 50),
    st.sampled_from(["reference", "chunk"]),
)
@example([20], 3, 0, "chunk")  # the window is smaller than the segment
@example([2, 5], 8, 9, "chunk")  # the prefix is shorter than the sinks
@example([10, 10, 11], 1, 1, "chunk")  # an empty segment, a segment of one token
@example([10, 21], 8, 2, "chunk")  # exactly full, then past it
def test_split_anywhere_equals_one_pass(cuts, window, sinks, impl):
    x = tokens(40)
    got = segments(x, [0, *sorted(cuts), 40], window, sinks, impl)
    torch.testing.assert_close(got, swa(**x, window=window, sinks=sinks, impl="reference"), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window, sinks", [(7, 3), (1, 0), (1, 4), (5, 9), (40, 2), (4, 0)])
def test_append_first_is_exact_for_one_token_or_while_nothing_was_dropped(window, sinks):
    x = tokens(20)
    whole = swa(**x, window=window, sinks=sinks)
    for length in (1, 4):
        cache = empty(2, window, sinks)
        for a in range(0, 20, length):
            cache.append(x["k"][:, a : a + length], x["v"][:, a : a + length])
            if length == 1 or a + length <= window + sinks:
                k, v = cache.keys_values()
                got = swa(x["q"][:, a : a + length], k, v, window=window, sinks=sinks, q_sinks=x["q_sinks"][:, a : a + length])
                torch.testing.assert_close(got, whole[:, a : a + length], rtol=1e-11, atol=1e-11)


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(0, 12), st.lists(st.integers(0, 30), max_size=5))
def test_appending_in_pieces_equals_appending_at_once(window, sinks, cuts):
    x = tokens(30)
    whole, pieces = empty(2, window, sinks), empty(2, window, sinks)
    whole.append(x["k"], x["v"])
    cuts = [0, *sorted(cuts), 30]
    for a, b in pairwise(cuts):
        pieces.append(x["k"][:, a:b], x["v"][:, a:b])
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, pieces.tensors()[name]), name
    k, v = whole.keys_values()
    kept = sorted({*range(min(sinks, 30)), *range(max(sinks, 30 - window), 30)})
    assert torch.equal(k, x["k"][:, kept])
    assert torch.equal(v, x["v"][:, kept])


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("window, sinks", [(7, 3), (1, 0), (1, 2), (5, 9), (60, 2), (4, 60), (12, 0)])
def test_steps_at_different_positions_equal_one_pass(impl, window, sinks):
    T, lag = 40, torch.tensor([0, 4, 17])
    x = tokens(T, batch=3)
    whole = swa(**x, window=window, sinks=sinks, impl="reference")
    cache = empty(3, window, sinks)
    for t in range(T + int(lag.max())):
        index, active = t - lag, (t >= lag) & (t - lag < T)
        row = at(x, index.clamp(0, T - 1))
        before = cache.clone()
        got = swa_step(**row, cache=cache, active=active, impl=impl)
        want = torch.where(active[:, None, None, None], at({"o": whole}, index.clamp(0, T - 1))["o"], 0)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        for name, tensor in cache.tensors().items():
            assert torch.equal(tensor[~active], before.tensors()[name][~active]), name
    assert cache.positions.tolist() == [T] * 3


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_steps_go_on_from_prompts_of_different_lengths(impl):
    x, window, sinks = tokens(30, batch=2), 6, 3
    cache, row = empty(2, window, sinks), empty(1, window, sinks)
    lengths = torch.tensor([9, 2])
    for b in range(2):
        row.reset()
        row.append(x["k"][b : b + 1, : lengths[b]], x["v"][b : b + 1, : lengths[b]])
        cache.copy_([b], row, [0])
    with pytest.raises(ValueError, match=r"`positions` must be equal .* got \[9, 2\]. Use index_select"):
        cache.keys_values()
    whole = swa(**x, window=window, sinks=sinks, impl="reference")
    for t in range(20):
        got = swa_step(**at(x, lengths + t), cache=cache, impl=impl)
        torch.testing.assert_close(got, at({"o": whole}, lengths + t)["o"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_steps_in_low_precision(dtype, impl):
    x, cache = tokens(24, dtype=dtype), empty(2, 7, 3, dtype)
    got = torch.cat([swa_step(**{n: t[:, i : i + 1] for n, t in x.items()}, cache=cache, impl=impl) for i in range(24)], 1)
    assert got.dtype == dtype
    exact = swa(**{n: t.double() for n, t in x.items()}, window=7, sinks=3, impl="reference")
    assert_within_budget("o", got, plain(cast(x, dtype), 7, 3)["o"], exact)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_inactive_rows_stay_bit_for_bit_whatever_they_are_given(impl):
    x, cache = tokens(10, batch=3), empty(3, 4, 2)
    cache.append(x["k"], x["v"])
    cache.ring_k[1, 0] = float("nan")
    before = cache.clone()
    bad = {name: torch.full_like(t[:, :1], float("nan")) for name, t in x.items()}
    out = swa_step(**bad, cache=cache, active=torch.tensor([False, False, False]), impl=impl)
    assert torch.equal(out, torch.zeros_like(out))
    for name, tensor in cache.tensors().items():
        assert torch.equal(tensor.view(torch.int64), before.tensors()[name].view(torch.int64)), name


def test_slots_never_written_cannot_be_seen():
    x = tokens(3)
    for impl in ("reference", "chunk"):
        cache = empty(2, 8, 5)
        for tensor in (cache.sink_k, cache.sink_v, cache.ring_k, cache.ring_v):
            tensor.fill_(1e6)
        got = torch.cat([swa_step(**{n: t[:, i : i + 1] for n, t in x.items()}, cache=cache, impl=impl) for i in range(3)], 1)
        torch.testing.assert_close(got, swa(**x, window=8, sinks=5), rtol=1e-11, atol=1e-11)


def test_step_takes_no_part_in_autograd_and_the_cache_bytes_are_constant():
    x, cache = inputs(300, HQ=4, HK=HK, D=D), empty(1, 16, 4)
    nbytes = cache.nbytes
    assert nbytes == 2 * (16 + 4) * HK * D * 8 + 8
    cache.append(x["k"][:, :299], x["v"][:, :299])
    out = swa_step(*(t[:, 299:] for t in x.values()), cache)
    assert not out.requires_grad
    assert not any(t.requires_grad for t in cache.tensors().values())
    assert cache.nbytes == nbytes


def test_step_compiles_whole_and_does_not_recompile_as_positions_grow():
    x, cache, eager = tokens(12), empty(2, 4, 2), empty(2, 4, 2)
    torch._dynamo.reset()
    step = torch.compile(swa_step, fullgraph=True, backend="aot_eager")
    active = torch.tensor([True, False])
    for i in range(12):
        row = {n: t[:, i : i + 1] for n, t in x.items()}
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = step(**row, cache=cache, active=active)
        torch.testing.assert_close(got, swa_step(**row, cache=eager, active=active))
    assert all(torch.equal(t, eager.tensors()[name]) for name, t in cache.tensors().items())


def filled(batch=3, positions=(4, 9, 15)):
    cache = empty(batch, 5, 2)
    for b, n in enumerate(positions):
        row = empty(1, 5, 2)
        row.append(torch.randn(1, n, HK, D, dtype=torch.float64), torch.randn(1, n, HK, D, dtype=torch.float64))
        cache.copy_([b], row, [0])
    return cache


def test_rows_are_selected_copied_and_reset():
    cache = filled()
    picked = cache.index_select(torch.tensor([2, 0, 0]))
    assert picked.positions.tolist() == [15, 4, 4]
    assert (picked.window, picked.sinks) == (5, 2)
    picked.ring_k.zero_()
    assert cache.ring_k.abs().sum() > 0
    swapped = cache.clone().copy_([0, 2], cache, [2, 0])
    for name, tensor in cache.tensors().items():
        assert torch.equal(swapped.tensors()[name], tensor[[2, 1, 0]]), name
    within = cache.clone()
    within.copy_([0, 2], within, [2, 0])
    assert torch.equal(within.ring_v, swapped.ring_v)
    part = cache.clone()
    part.reset([1])
    assert part.positions.tolist() == [4, 0, 15]
    assert (part.ring_k[1] == 0).all()
    assert torch.equal(part.ring_k[::2], cache.ring_k[::2])
    part.reset()
    assert all((t == 0).all() for t in part.tensors().values())


def test_clone_is_independent_and_detach_and_to_keep_everything():
    cache = filled()
    assert cache.detach().ring_k.data_ptr() == cache.ring_k.data_ptr()
    assert cache.to("cpu").options() == cache.options()
    copy = cache.clone()
    cache.append(torch.randn(3, 1, HK, D, dtype=torch.float64), torch.randn(3, 1, HK, D, dtype=torch.float64))
    assert copy.positions.tolist() == [4, 9, 15]
    assert cache.positions.tolist() == [5, 10, 16]


def test_state_dict_goes_through_a_file():
    cache, file = filled(), io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    loaded = WindowCache.from_state_dict(torch.load(file, weights_only=True))
    assert loaded.options() == cache.options()
    for name, tensor in cache.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor), name
    again = WindowCache.from_state_dict(cache.state_dict())
    cache.reset()
    assert again.positions.tolist() == [4, 9, 15]


BAD_STATES = {
    "missing key": (lambda s: s.pop("ring_k"), r"`state` must have the keys of WindowCache; got a mapping without ring_k"),
    "foreign key": (lambda s: s.update(extra=1), r"`state` must have only the keys of WindowCache; got extra"),
    "not a tensor": (lambda s: s.update(ring_k=3), r"`ring_k` must be a torch.Tensor; got int"),
    "window of another size": (
        lambda s: s.update(window=6),
        r"`ring_k` must have shape \[B, window, HK, D\] with window=6; got \[3, 5, 2, 8\]",
    ),
    "window not an int": (lambda s: s.update(window=5.0), r"`window` must be an int of at least 1"),
    "sinks a tensor": (lambda s: s.update(sinks=torch.tensor(2)), r"`sinks` must be a plain value; got Tensor"),
    "one buffer in float32": (
        lambda s: s.update(ring_v=s["ring_v"].float()),
        r"`ring_v` must have dtype float64 \(the dtype of `sink_k`\); got float32",
    ),
    "positions in int32": (lambda s: s.update(positions=s["positions"].int()), r"`positions` must have dtype int64; got int32"),
    "negative position": (lambda s: s.update(positions=s["positions"] - 9), r"`positions` must not be negative; got \[-5, 0, 6\]"),
    "one row too few": (lambda s: s.update(positions=s["positions"][1:]), r"`positions` must have shape \[B\] with B=3; got \[2\]"),
}


@pytest.mark.parametrize("spoil, match", BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_bad_state_dict_is_refused_with_the_reason(spoil, match):
    state = dict(filled().state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=match):
        WindowCache.from_state_dict(state)


class Called(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_all_rows_are_copied_without_an_index():
    # An index made on the host is a blocking copy to a GPU, in every layer of every segment that is read.
    cache, into = filled(), filled()
    into.reset()
    with Called() as called:
        into.copy_(range(3), cache, range(3))
    assert called.names == {"aten.copy_.default"}
    for name, tensor in cache.tensors().items():
        assert torch.equal(into.tensors()[name], tensor), name
    cache.ring_k.zero_()
    assert into.ring_k.abs().sum() > 0
    wider = empty(4, cache.window, cache.sinks)
    wider.copy_(range(3), into, range(3))
    assert torch.equal(wider.ring_v[:3], into.ring_v)
    assert not wider.ring_v[3].any()
    with pytest.raises(ValueError, match=r"`rows` must lie in \[0, 3\); got \[0, 1, 2, 3\]"):
        into.copy_(range(4), wider, range(4))


def test_bad_rows_and_foreign_states_are_refused():
    cache = filled()
    with pytest.raises(ValueError, match=r"`state` must be a mapping"):
        WindowCache.from_state_dict([1])
    with pytest.raises(ValueError, match=r"`rows` must lie in \[0, 3\); got \[3\]"):
        cache.index_select([3])
    with pytest.raises(ValueError, match=r"`rows` must hold ints; got \[True\]"):
        cache.reset([True])
    with pytest.raises(ValueError, match=r"`rows` must have dtype int32 or int64; got bool"):
        cache.index_select(torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match=r"`other_rows` must have shape \[N\] with N=1; got \[2\]"):
        cache.copy_([0], cache, [1, 2])
    with pytest.raises(ValueError, match=r"`other` must have the options .*'window': 5"):
        cache.copy_([0], empty(1, 6, 2), [0])
    with pytest.raises(ValueError, match=r"`other` must be a WindowCache; got dict"):
        cache.copy_([0], {}, [0])
    with pytest.raises(ValueError, match=r"`other.sink_k` must have dtype float64; got float32"):
        cache.copy_([0], empty(1, 5, 2, torch.float32), [0])


@pytest.mark.parametrize("fault", ["ring one slot short", "sinks overwritten", "nothing written"])
def test_a_fault_fails_the_split_comparison(fault, monkeypatch):
    put = cache_module._put
    faulty = {
        "ring one slot short": lambda b, x, slots, valid: put(b, x, slots % max(b.shape[1] - 1, 1), valid),
        "sinks overwritten": lambda b, x, slots, valid: put(b, x, slots, torch.ones_like(valid)),
        "nothing written": lambda b, x, slots, valid: None,
    }[fault]
    x = tokens(30)
    want = swa(**x, window=5, sinks=3)
    torch.testing.assert_close(segments(x, [0, 2, 11, 12, 30], 5, 3, "chunk"), want)
    monkeypatch.setattr(cache_module, "_put", faulty)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(segments(x, [0, 2, 11, 12, 30], 5, 3, "chunk"), want)


@pytest.mark.parametrize("before", [0, 2, 5, 11, 30])
def test_keys_values_with_a_segment_behind_them(before):
    """At a position that the caller knows, and with the segment's own tokens set behind what is held."""
    k, v = torch.randn(2, 2, before + 7, 2, 4)
    cache = WindowCache.empty(2, 2, 4, window=6, sinks=3, dtype=torch.float32, device="cpu")
    cache.append(k[:, :before], v[:, :before])
    more = k[:, before:], v[:, before:]
    for held, joined, x in zip(cache.keys_values(), cache.keys_values(before, then=more), more, strict=True):
        assert torch.equal(joined, torch.cat([held, x], 1))
    for held, x in zip(cache.keys_values(), (k, v), strict=True):
        first = max(before - 6, 3)
        assert torch.equal(held, torch.cat([x[:, : min(before, 3)], x[:, first:before]], 1))
