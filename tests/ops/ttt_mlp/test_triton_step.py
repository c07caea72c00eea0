"""The decode kernels of `ttt_mlp`: against the fp64 reference, whatever way a sequence is cut into steps.

The kernels keep the newest tokens in the state's tail: states are compared folded.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allmem_ops import MemoryState, ttt_mlp, ttt_mlp_step
from allmem_ops.ops.ttt_mlp.tail import TAIL_TOKENS
from allmem_ops.testing import assert_within_budget
from tests.ops.ttt_mlp.cases import LEARNT, NORMS, TOKENS, WEIGHTS, inputs, some_state

launch_step = pytest.importorskip("allmem_ops.ops.ttt_mlp.launch_step")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
SUMS = (*LEARNT, "g_gate", "g_up", "g_down", "mu_sum")
gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def tokens_at(x, start, stop):
    return [x[name][:, start:stop] for name in TOKENS]


def case(batch=1, length=1, heads=1, d=16, h=32, dtype=torch.float32, **options):
    return {name: t.to(DEVICE) for name, t in inputs(batch, length, heads, d, h, dtype, grad=False, **options).items()}


def state_of(x, chunk_size, counts=None, **options):
    """A state in mid-sequence, or with `counts` None before the first token."""
    weights = {name: x[name] for name in WEIGHTS}
    batch = x["q"].shape[0]
    if counts is None:
        return MemoryState.initial(*weights.values(), batch=batch, chunk_size=chunk_size, dtype=x["q"].dtype, **options)
    made = some_state({name: t.cpu() for name, t in (weights | {"q": x["q"]}).items()}, batch, chunk_size, counts, **options)
    return made.detach().to(DEVICE)


def double(state):
    fields = {name: t.double() if t.is_floating_point() else t.clone() for name, t in (state.tensors() | state.shared()).items()}
    return MemoryState(**fields, **(state.options() | {"dtype": "float64"}))


def values(state):
    return {name: t for name, t in state.folded().tensors().items() if not name.startswith("tail")}


def run(x, state, lengths, active, impl):
    """o of the steps one after another, and the state after them."""
    outputs, start = [], 0
    for length in lengths:
        outputs.append(ttt_mlp_step(*tokens_at(x, start, start + length), state, active=active, impl=impl))
        start += length
    return {"o": torch.cat(outputs, 1)} | values(state)


def compare(x, state, lengths, active=None):
    """The kernels within the budget of the chunk path, both against the fp64 reference; counters exactly."""
    wide = {name: t.double() for name, t in x.items()}
    exact = run(wide, double(state), lengths, active, "reference")
    low = run(x, state.clone(), lengths, active, "chunk")
    got = run(x, state, lengths, active, "triton")
    for name in ("count", "position"):
        assert torch.equal(got[name], exact[name]), name
    residual = {"o": x["q"].double() if state.residual else 0}
    if active is not None and state.residual:
        residual["o"] = torch.where(active[:, None, None, None], residual["o"], 0)
    for name in ("o", *SUMS):
        less = residual.get(name, 0)
        assert_within_budget(name, *(y[name] - less if name == "o" else y[name] for y in (got, low)), exact[name] - less)
    assert (state.tail < TAIL_TOKENS).all() and (state.tail <= state.count).all()
    for name, rounded in zip(WEIGHTS, state.rounded, strict=False):
        assert torch.equal(rounded, getattr(state, name).to(rounded.dtype)), name
    return got


# On a GPU every combination compiles two large kernels: each value once there.
_FORMS_GPU = [("pre_write", None, torch.bfloat16), ("pre_write", 0.15, torch.float16), ("post_write", 0.15, torch.bfloat16)]
_FORMS_GPU += [("none", None, torch.float32)]
_FORMS = [(norm, clip, dtype) for norm in NORMS for clip in (None, 0.15) for dtype in DTYPES]


@pytest.mark.parametrize("norm, grad_clip, dtype", _FORMS_GPU if CUDA else _FORMS)
def test_steps_over_chunk_edges_from_mixed_counters(norm, grad_clip, dtype):
    x = case(3, 5, dtype=dtype)
    state = state_of(x, 4, [2, 0, 3], norm=norm, grad_clip=grad_clip, residual=grad_clip is None)
    compare(x, state, [1, 1, 3])


@settings(max_examples=8)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 12), st.sampled_from(NORMS), st.integers(0, 2))
@example([40, 30], 100, "pre_write", 0)  # the tail fills inside a step
@example([1, 70, 1], 66, "post_write", 1)  # the tail fills, then the chunk
@example([12], 1, "none", 0)  # every token is a chunk
def test_any_cut_equals_the_reference(lengths, chunk_size, norm, count):
    x = case(1, sum(lengths), eta=0.02)
    compare(x, state_of(x, chunk_size, [min(count, chunk_size - 1)], norm=norm), lengths)


def test_single_tokens_through_a_full_tail_and_a_full_chunk():
    x = case(1, TAIL_TOKENS + 4, h=16, eta=0.02)
    compare(x, state_of(x, TAIL_TOKENS + 2), [1] * (TAIL_TOKENS + 4))


_WIDTHS_GPU = [(2, 32, 32, torch.float16), (1, 96, 272, torch.bfloat16), (2, 128, 512, torch.float32), (3, 64, 128, torch.float32)]
_WIDTHS = [(*sizes, dtype) for sizes in ((2, 16, 16), (1, 32, 48), (1, 96, 144)) for dtype in DTYPES]


@pytest.mark.parametrize("heads, d, h, dtype", _WIDTHS_GPU if CUDA else _WIDTHS)
def test_widths(heads, d, h, dtype):
    x = case(2, 21, heads, d, h, dtype, eta=0.02)
    compare(x, state_of(x, 18, [16, 0]), [1, 1, 19])


def test_inactive_rows_stay_bit_for_bit_and_reach_nobody():
    for length in (1, 6):
        x = case(3, length)
        active = torch.tensor([True, False, True], device=DEVICE)
        state = state_of(x, 4, [3, 2, 0])
        state.w_up[1, 0, 0, 0] = float("nan")
        clean, before = state.clone(), state.clone()
        want = ttt_mlp_step(*tokens_at(x, 0, length), clean, active=active, impl="triton")
        for name in TOKENS:
            x[name][1] = float("nan")
        got = ttt_mlp_step(*tokens_at(x, 0, length), state, active=active, impl="triton")
        assert torch.equal(got, want) and not got[1].any()
        for name, t in state.tensors().items():
            assert torch.equal(t[1].nan_to_num(7), getattr(before, name)[1].nan_to_num(7)), name
            assert torch.equal(t[::2], getattr(clean, name)[::2]), name


def test_the_token_that_completes_a_chunk_reads_the_weights_from_before():
    x = case(1, 4)
    state = state_of(x, 4)
    run(x, state, [1, 1, 1], None, "triton")
    assert torch.equal(state.w_up[0], x["w_up"])
    o = ttt_mlp_step(*tokens_at(x, 3, 4), state, impl="triton")
    torch.testing.assert_close(o, ttt_mlp(**x, chunk_size=4, impl="chunk").o[:, 3:])
    assert not torch.equal(state.w_up[0], x["w_up"])
    assert state.count.tolist() == [0] and state.tail.tolist() == [0] and not state.g_up.any() and not state.mu_sum.any()


def test_what_lies_behind_the_end_of_the_tail_does_not_count():
    x = case(1, 3)
    state = state_of(x, 3)
    for name in ("tail_k", "tail_v", "tail_eta"):
        getattr(state, name).fill_(float("nan"))
    compare(x, state, [1, 1, 1])


def test_one_pass_and_the_other_paths_go_on_from_a_tail_and_back():
    x = case(2, 12)
    whole = ttt_mlp(**x, chunk_size=5, output_final_state=True, impl="chunk")
    state, outs = state_of(x, 5), []
    for t, impl in enumerate(["triton", "triton", "chunk", "triton", "reference", "triton", "triton", "triton"]):
        outs.append(ttt_mlp_step(*tokens_at(x, t, t + 1), state, impl=impl))
    rest = {name: t[:, 8:] if name in TOKENS else t for name, t in x.items()}
    end = ttt_mlp(**rest, chunk_size=5, initial_state=state, output_final_state=True, impl="chunk")
    torch.testing.assert_close(torch.cat([*outs, end.o], 1), whole.o, rtol=1e-4, atol=1e-5)
    for name, t in values(end.state).items():
        torch.testing.assert_close(t, values(whole.state)[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_backward_through_a_state_that_has_moved_on_is_refused():
    x = case(1, 3)
    state = state_of(x, 5, [1])
    state.w_up.requires_grad_()
    product = (state.w_up * state.w_gate).sum()
    ttt_mlp_step(*tokens_at(x, 0, 1), state, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_strided_inputs_are_read_in_place():
    for length in (1, 4):
        x = case(2, length, 2)
        fused = torch.randn(length, 2, 16, 6, device=DEVICE)  # [T, B, d, H]: nothing is where it usually is
        x["q"], x["k"], x["v"] = (fused[..., i : i + 2].permute(1, 0, 3, 2) for i in (0, 2, 4))
        x["eta"] = torch.rand(3, 2, length, 2, device=DEVICE).permute(1, 2, 3, 0) * 0.05
        x["mu"] = torch.rand(1, 1, 2, device=DEVICE).expand(2, length, 2)
        compare(x, state_of(x, 3, [2, 1]), [length], active=torch.ones(1, dtype=torch.bool, device=DEVICE).expand(2))


def test_runs_are_bitwise_equal_and_rows_do_not_depend_on_their_neighbours():
    x = case(3, 6)
    state = state_of(x, 4, [1, 3, 0])

    def after(x, state):
        # What the kernels leave, the tail as it is: folding it here is a batched product of torch, whose rounding varies with the batch.
        return {"o": run(x, state, [1, 5], None, "triton")["o"]} | state.tensors()

    found = [after(x, state.clone()) for _ in range(2)]
    row = {name: t[1:2] if name in TOKENS else t for name, t in x.items()}
    alone = after(row, state.index_select([1]))
    for name, t in found[0].items():
        assert torch.equal(t, found[1][name]) and torch.equal(t[1:2], alone[name]), name


@pytest.mark.parametrize("norm, dtype", [(norm, dtype) for norm in NORMS for dtype in DTYPES[:2]])
def test_the_kernel_that_folds_a_tail(norm, dtype):
    x = case(3, 5, dtype=dtype)
    state = state_of(x, 9, [1, 6, 0], norm=norm)
    for t in range(4):  # the second row commits and begins anew
        ttt_mlp_step(*tokens_at(x, t, t + 1), state, active=torch.tensor([True, True, False], device=DEVICE), impl="triton")
    assert state.tail.tolist() == [4, 1, 0]
    for name in ("tail_k", "tail_v", "tail_eta"):
        getattr(state, name)[:, :, 4:] = float("nan")
    before = state.clone()
    got, low, exact = state.folded("triton"), state.folded("chunk"), double(state).folded("chunk")
    for name in ("g_gate", "g_up", "g_down"):
        y = getattr(got, name)
        assert_within_budget(name, y, getattr(low, name), getattr(exact, name))
        assert torch.equal(y[1:2], getattr(state.index_select([1]).folded("triton"), name))  # not so in torch's batched product
        assert torch.equal(y[2], getattr(state, name)[2])
    assert not got.tail.any() and got.w_up is state.w_up
    assert all(torch.equal(t.nan_to_num(7), getattr(before, name).nan_to_num(7)) for name, t in state.tensors().items())
    tensors = [tuple(getattr(state, f"{kind}_{matrix}") for matrix in ("gate", "up", "down")) for kind in "wng"]
    torch.library.opcheck(torch.ops.allmem_ops.ttt_mlp_folded_triton.default, (*tensors, tuple(state.held_back()), norm, 1e-5))


def faults():
    def zeroed(o, _):
        o.zero_()

    def not_counted(_, state):
        state[10] -= 1  # count

    def no_tail(_, state):
        state[14].zero_()  # eta of the tail

    def wrong_matrix(_, state):
        state[0].copy_(state[1])

    return [zeroed, not_counted, no_tail, wrong_matrix]


@pytest.mark.parametrize("fault", faults(), ids=lambda f: f.__name__)
def test_the_comparison_sees_a_fault(fault, monkeypatch):
    right = launch_step.ttt_mlp_step

    def wrong(*args):
        o = right(*args)
        fault(o, args[5])
        return o

    monkeypatch.setattr(launch_step, "ttt_mlp_step", wrong)
    x = case(1, 2)
    with pytest.raises(AssertionError):
        compare(x, state_of(x, 9, [3]), [1, 1])


@pytest.mark.parametrize("length", [1, 3])
def test_opcheck(length):
    x = case(2, length, 1)
    state = state_of(x, 3, [2, 0])
    c = state.carry()
    changed = [*c.w, *c.m, *c.g, c.mu_sum, c.count, state.position, *state.held_back()]
    active = torch.tensor([True, False], device=DEVICE)
    args = (*tokens_at(x, 0, length), changed, list(c.n), active, 3, "pre_write", True, 0.1, 1e-5)
    torch.library.opcheck(torch.ops.allmem_ops.ttt_mlp_step_triton.default, args)


def test_compiles_whole_and_does_not_recompile_as_counters_grow():
    x = case(2, 4)
    state = state_of(x, 3, [1, 0])
    eager = state.clone()
    torch._dynamo.reset()
    step = torch.compile(ttt_mlp_step, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    for t in range(4):
        with torch._dynamo.config.patch(error_on_recompile=t > 0):
            got = step(*tokens_at(x, t, t + 1), state, impl="triton")
        assert torch.equal(got, ttt_mlp_step(*tokens_at(x, t, t + 1), eager, impl="triton"))
    assert all(torch.equal(t, getattr(eager, name)) for name, t in state.tensors().items())


def test_what_the_kernels_do_not_take_is_one_clear_error():
    x = case(1, 1, d=24)
    with pytest.raises(ValueError, match="`q` must have d and h that the kernels take"):
        ttt_mlp_step(*tokens_at(x, 0, 1), state_of(x, 4), impl="triton")
    ttt_mlp_step(*tokens_at(x, 0, 1), state_of(x, 4))  # "auto" takes the chunk path
    x = case(1, 1)
    state = state_of(x, 4)
    state.g_up = state.g_up.mT.contiguous().mT
    with pytest.raises(ValueError, match=r"`state.g_up` must be contiguous"):
        ttt_mlp_step(*tokens_at(x, 0, 1), state, impl="triton")


@gpu
@pytest.mark.parametrize("batch", [1, 64, 130])
def test_full_size(batch):
    x = case(batch, 67, 8, 64, 128, torch.bfloat16, eta=0.02)
    counts = (torch.arange(batch) * 37 % 100).tolist()
    compare(x, state_of(x, 100, counts, grad_clip=1.0), [1, 1, 64, 1])


@gpu
def test_auto_takes_the_kernels_and_launches_two():
    x = case(2, 3, 2, 64, 128, torch.bfloat16)
    state = state_of(x, 100)
    for length in (1, 3):
        ttt_mlp_step(*tokens_at(x, 0, length), state)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ttt_mlp_step(*tokens_at(x, 0, length), state)
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        names = [n for n in names if "FillFunctor" not in n]  # the tests poison what is allocated
        assert len(names) == 2 and all(n.startswith("ttt_mlp_step_") for n in names), names


@gpu
@pytest.mark.parametrize("length", [1, 5])
def test_a_captured_step_goes_on_with_the_counters_and_reads_nothing_on_the_host(length):
    x = case(3, length, 2, 64, 128, torch.bfloat16)
    state = state_of(x, 7, [0, 3, 6])
    eager, active = state.clone(), torch.tensor([True, True, False], device=DEVICE)
    ttt_mlp_step(*tokens_at(x, 0, length), state.clone(), active=active)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ttt_mlp_step(*tokens_at(x, 0, length), state, active=active)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i in range(80):
        x["v"].copy_(torch.randn_like(x["v"]))
        active.copy_(torch.rand(3, device=DEVICE) < 0.8)
        graph.replay()
        assert torch.equal(out, ttt_mlp_step(*tokens_at(x, 0, length), eager, active=active)), i
    assert all(torch.equal(t, getattr(eager, name)) for name, t in state.tensors().items())
