"""The backward kernels of `swa` against the definition's gradients, in the error of plain PyTorch at the same precision.

On a CPU the portable kernels run in Triton's interpreter, and the Hopper kernel by `testing.gluon_cpu`; on a GPU each runs where it is
pinned, with longer sequences as well.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allmem_ops import swa
from allmem_ops.ops.kernels import replay
from allmem_ops.ops.kernels.configs import Config
from allmem_ops.ops.swa import launch_bwd, launch_bwd_hopper
from allmem_ops.ops.swa.chunk import swa_chunk_backward, swa_chunk_forward
from allmem_ops.ops.swa.kernels import bwd, hopper_bwd
from allmem_ops.ops.swa.launch_bwd import swa_triton_backward
from allmem_ops.testing import assert_within_budget, gluon_cpu, relative_error

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter computes bfloat16 on raw bit patterns. On a GPU: what the Hopper kernel takes.
HALF = (torch.bfloat16, 128) if CUDA else (torch.float16, 16)
NAMES = ("dq", "dk", "dv", "dq_sinks")
gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
cpu = pytest.mark.skipif(CUDA, reason="a GPU runs the kernel itself")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Each test's first call works out what it launches: it may have set something that does not show in the arguments."""
    monkeypatch.setattr(replay, "_replays", {})


def make(Tq, Tk=None, *, B=1, HQ=2, HK=1, D=16, far=False, dtype=torch.float32):
    """q, k, v, q_sinks (or None)."""
    Tk = Tq if Tk is None else Tk
    shapes = [(B, Tq, HQ, D), (B, Tk, HK, D), (B, Tk, HK, D)] + [(B, Tq, HQ, D)] * far
    x = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    return x if far else [*x, None]


def saved(x, window, sinks, scale=0.3, cu_seqlens=None):
    """What a backward is given, in float64: do, dlse, q, k, v, q_sinks, cu_seqlens, o, lse, window, sinks, scale."""
    x = [None if t is None else t.double() for t in x]
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    o, lse = swa_chunk_forward(*x, cu_seqlens, window, sinks, scale)
    return [torch.randn_like(o), torch.randn_like(lse), *x, cu_seqlens, o, lse, window, sinks, scale]


def at(args, dtype):
    """The same as a kernel gets it: tensors in `dtype`, lse and its gradient in float32."""
    do, dlse, *x, cu_seqlens, o, lse, window, sinks, scale = args
    x = [None if t is None else t.to(dtype) for t in x]
    return [do.to(dtype), dlse.float(), *x, cu_seqlens, o.to(dtype), lse.float(), window, sinks, scale]


def check(x, window, sinks, **options):
    """The kernels' gradients, within the budget."""
    dtype = x[0].dtype
    args = saved(x, window, sinks, **options)
    args[0] = args[0].to(dtype).double()
    exact, low = swa_chunk_backward(*args), swa_chunk_backward(*at(args, dtype))
    for name, got, *values in zip(NAMES, swa_triton_backward(*at(args, dtype)), low, exact, strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        assert_within_budget(name, got, *values)


CASES = {  # Tq, Tk, window, sinks
    "one token": (1, 1, 3, 2),
    "one tile": (32, 32, 7, 2),
    "past one tile": (65, 65, 64, 4),
    "tiles and window apart": (111, 111, 50, 3),
    "window of one": (70, 70, 1, 0),
    "window of one and sinks": (70, 70, 1, 5),
    "window beyond T": (70, 70, 10**12, 9),
    "window is T": (96, 96, 96, 3),
    "many sinks": (150, 150, 33, 90),
    "sinks beyond T": (70, 70, 5, 10**12),
    "queries are the last": (40, 140, 70, 10),
    "one query": (1, 130, 70, 10),
    "queries inside the window": (20, 100, 90, 30),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
by_query = pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])


@by_query
@by_case
def test_float32_within_the_budget(case, far):
    Tq, Tk, window, sinks = case
    check(make(Tq, Tk, far=far), window, sinks)


@by_case
def test_half_within_the_budget(case):
    Tq, Tk, window, sinks = case
    check(make(Tq, Tk, far=Tq > 1, dtype=HALF[0], D=HALF[1]), window, sinks)


@settings(max_examples=12)
@given(
    st.integers(1, 70),
    st.integers(0, 40),
    st.integers(1, 60),
    st.integers(0, 60),
    st.sampled_from([(1, 1), (3, 1), (2, 2), (4, 2)]),
    st.sampled_from([1, 64]),
    st.booleans(),
)
@example(70, 40, 10, 40, (4, 2), 64, True)
def test_any_sizes_and_heads(Tq, before, window, sinks, heads, sms, far):
    x = make(Tq, Tq + before, HQ=heads[0], HK=heads[1], far=far)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_bwd, "sm_count", lambda _: sms)  # into how many ranges the queries of a sink are cut
        args = saved(x, window, sinks)
        # Few elements: the largest error of plain PyTorch among them is a matter of luck, and no budget.
        for got, exact in zip(swa_triton_backward(*at(args, torch.float32)), swa_chunk_backward(*args), strict=True):
            assert relative_error(got, exact) < 2e-6


@pytest.mark.parametrize("D", [24, 64] if not CUDA else [80, 256])
def test_head_dims(D):
    check(make(50, 70, D=D, dtype=torch.float16), 30, 7, scale=D**-0.5)


CUTS = [[0, 1, 1, 66, 140], [0, 0, 140, 140], [0, 63, 64, 140]]


@pytest.mark.parametrize("window, sms", [(11, 64), (60, 1)])  # as many slots for far sums as sequences; fewer
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_packed_sequences(cuts, window, sms, monkeypatch):
    monkeypatch.setattr(launch_bwd, "sm_count", lambda _: sms)
    check(make(140, far=True), window, 13, cu_seqlens=cuts)
    if CUDA:
        check(make(140, dtype=HALF[0], D=HALF[1]), window, 13, cu_seqlens=cuts)


def test_offsets_out_of_range_never_reach_outside():
    args = at(saved(make(64), 9, 3, cu_seqlens=[0, 20, 64]), torch.float32)
    args[6] = torch.tensor([0, 500, -3], dtype=torch.int32, device=DEVICE)
    swa_triton_backward(*args)


def test_two_runs_are_bitwise_equal():
    args = at(saved(make(100 if not CUDA else 3000, far=True, dtype=HALF[0], D=HALF[1]), 40, 20), HALF[0])
    for a, b in zip(swa_triton_backward(*args), swa_triton_backward(*args), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_a_suffix_are_those_of_the_whole():
    args = at(saved(make(130, far=True), 30, 9), torch.float32)
    whole = swa_triton_backward(*args)
    cut = [t[:, 47:] for t in args[:3]] + args[3:5] + [args[5][:, 47:], None] + [t[:, 47:] for t in args[7:9]] + args[9:]
    part = swa_triton_backward(*cut)
    for i in (0, 3):
        torch.testing.assert_close(part[i], whole[i][:, 47:], rtol=1e-5, atol=1e-5)
    head = (
        [t[:, :47] for t in args[:3]] + [t[:, :47] for t in args[3:5]] + [args[5][:, :47], None] + [t[:, :47] for t in args[7:9]] + args[9:]
    )
    for i in (1, 2):
        both = part[i].clone()
        both[:, :47] += swa_triton_backward(*head)[i]
        torch.testing.assert_close(both, whole[i], rtol=1e-5, atol=1e-5)


def strided(x):
    """The same values in every second column of a larger tensor, heads before tokens."""
    B, T, H, D = x.shape
    return torch.full((B, H, T, 2 * D), float("nan"), dtype=x.dtype, device=x.device).transpose(1, 2)[..., ::2].copy_(x)


def fused(*x):
    """The same values as slices of one tensor along the heads, as of a fused projection."""
    joined = torch.cat(x, 2)
    return joined.split([t.shape[2] for t in x], 2)


def test_strides_change_nothing():
    args = at(saved(make(50, B=2, HQ=2, HK=2, far=True), 20, 9), torch.float32)
    want = swa_triton_backward(*args)
    for views in ([*fused(*args[2:5]), strided(args[5])], [strided(t) for t in args[2:6]]):
        got = swa_triton_backward(strided(args[0]), args[1].transpose(1, 2).contiguous().transpose(1, 2), *views, *args[6:])
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_expanded_gradients():
    args = at(saved(make(70), 20, 3), torch.float32)
    one, zero = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    got = swa_triton_backward(one.expand_as(args[0]), zero.expand_as(args[1]), *args[2:])
    want = swa_triton_backward(torch.ones_like(args[0]), torch.zeros_like(args[1]), *args[2:])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_no_queries():
    x = make(0, 9, far=True)
    none = torch.empty(1, 0, 2, device=DEVICE)
    dq, dk, dv, dq_sinks = swa_triton_backward(x[0], none, *x, None, x[0], none, 3, 1, 1.0)
    assert dq.numel() == dq_sinks.numel() == 0 and not dk.any() and not dv.any()


def test_public_function():
    x = [t.requires_grad_() for t in make(70, far=True)]
    options = {"window": 20, "sinks": 5, "return_lse": True, "q_sinks": x[3]}
    grads = [torch.autograd.grad([y.sin().sum() for y in swa(*x[:3], **options, impl=impl)], x) for impl in ("triton", "reference")]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


FAULTS = {
    "delta's sign": ("b_ds += b_dlse[:, None]", "b_ds -= b_dlse[:, None]"),
    "lse's gradient dropped": ("b_ds += b_dlse[:, None]", "pass"),
    "a window one longer": ("(apart < farthest)", "(apart <= farthest)"),
    "sinks not cut": ("& (o_j < last)", ""),
    "the future visible": ("(apart >= nearest) & ", ""),
    "far sums dropped": ("tl.range(0, splits, num_stages=1)", "tl.range(0, 0, num_stages=1)"),
    "a split left out": ("tl.range(0, splits, num_stages=1)", "tl.range(1, splits, num_stages=1)"),
    "dk unscaled": ("b_dk * scale", "b_dk"),
    "one head of the group": ("i_hq = i_h * G + i_g", "i_hq = i_h * G"),
}


@cpu
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_faults_are_found(fault, monkeypatch, tmp_path):
    source = Path(bwd.__file__).read_text()
    assert fault[0] in source
    path = tmp_path / "faulty.py"
    path.write_text(source.replace(*fault))
    spec = importlib.util.spec_from_file_location("faulty", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("swa_bwd_dq_kernel", "swa_bwd_dkdv_kernel"):
        monkeypatch.setattr(launch_bwd, name, getattr(module, name))
    monkeypatch.setattr(launch_bwd, "sm_count", lambda _: 64)
    with pytest.raises(AssertionError):
        check(make(140), 33, 20)


@pytest.fixture
def hopper(monkeypatch):
    """The Hopper kernel, emulated; the kernels around it run in the interpreter."""
    monkeypatch.setattr(launch_bwd_hopper, "serves", lambda call: True)
    monkeypatch.setattr(launch_bwd_hopper, "TABLE", {("sm80", D): configs for (_, D), configs in launch_bwd_hopper.TABLE.items()})
    monkeypatch.setattr(launch_bwd_hopper, "FAR_CONFIG", Config({"BM": 64, "BN": 128}, 4, 1))
    monkeypatch.setattr(launch_bwd, "sm_count", lambda _: 64)  # into how many ranges the queries of a sink are cut

    def await_turn(p_turn, rank, _count):
        assert int(gluon_cpu.load(p_turn)) == int(rank), "programs run one after another: a turn that has not come never comes"

    def pass_turn(p_turn, count):
        gluon_cpu.store_wait(0)
        gluon_cpu.store(p_turn, count)

    def announce(p_done):
        gluon_cpu.store(p_done, gluon_cpu.load(p_done) + 128)

    def await_parts(p_done, threads):
        assert int(gluon_cpu.load(p_done)) == int(threads) or not int(threads), "a range of far sinks that has not been summed up"

    assembly = {
        "_look_up_turn": gluon_cpu.load,
        "_await_turn": await_turn,
        "_pass_turn": pass_turn,
        "_announce": announce,
        "_await_parts": await_parts,
    }

    def use(edit=str):
        module = gluon_cpu.gluon_on_cpu(hopper_bwd.__name__, edit=edit, assembly=assembly)
        monkeypatch.setattr(launch_bwd_hopper, "swa_bwd_hopper_kernel", module.swa_bwd_hopper_kernel)

    use()
    return use


@cpu
@pytest.mark.parametrize("D", [64, 128])
@by_case
def test_hopper(case, D, hopper):
    Tq, Tk, window, sinks = case
    check(make(Tq, Tk, D=D, dtype=torch.float16), window, sinks, scale=D**-0.5)


@cpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1)], ids=str)
def test_hopper_heads_batch_and_suffix(heads, D, hopper):
    check(make(150, 200, HQ=heads[0], HK=heads[1], B=2, D=D, far=True, dtype=torch.float16), 70, 130, scale=D**-0.5)


@cpu
@pytest.mark.parametrize("cuts", [*CUTS, [0, 140, 270, 270, 400]], ids=str)
def test_hopper_packed(cuts, hopper):
    check(make(cuts[-1], D=64, dtype=torch.float16), 50, 13, cu_seqlens=cuts, scale=0.125)


@cpu
@pytest.mark.parametrize("order", [(1, 1), (2, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_hopper_orders(order, D, hopper, monkeypatch):
    monkeypatch.setattr(launch_bwd_hopper, "_order", lambda _: order)
    check(make(150, HQ=4, HK=2, B=2, D=D, dtype=torch.float16), 70, 9, scale=D**-0.5)
    check(make(620, HQ=2, HK=2, D=D, dtype=torch.float16), 70, 200, scale=D**-0.5)


WAIT = "b_dq, b_dv, b_dk, b_p, b_ds = warpgroup_mma_wait(0, deps=(b_dq, b_dv, b_dk, b_p, b_ds))\n"
HOPPER_FAULTS = {
    "first part not stored": (128, "first = rank == 0", "first = rank == 1"),
    "order of the tiles": (128, "i_m = last - 1 - gl.where", "i_m = last - gl.where"),
    "the other warpgroup's dS not awaited": (128, "mbarrier.wait(ds_full.index(slot), ring)", ""),
    "the other warpgroup's dS not awaited, 64": (64, "mbarrier.wait(ds_full.index(slot), ring)", ""),
    "queries given back twice": (128, "mbarrier.arrive(do_free.index(stage), count=1)", "mbarrier.arrive(do_free.index(stage), count=2)"),
    "queries given back before their use": (
        128,
        "        b_dq, b_dv, b_p = warpgroup_mma_wait(1, deps=(b_dq, b_dv, b_p))\n",
        "        b_dq, b_dv, b_p = warpgroup_mma_wait(2, deps=(b_dq, b_dv, b_p))\n",
    ),
    "queries given back before their use, 64": (
        64,
        f"{WAIT}            mbarrier.arrive(do_free.index(before), count=1)\n            mbarrier.arrive(q_free.index(before), count=1)\n",
        f"mbarrier.arrive(do_free.index(before), count=1)\n            mbarrier.arrive(q_free.index(before), count=1)\n            {WAIT}",
    ),
    "products not awaited, 64": (64, "dtype, 4, SINKS)", "dtype, 5, SINKS)"),
    "dq_free never given": (128, "mbarrier.arrive(dq_free.index(slot * 2 + w), count=1)", "pass"),
    "the turn not passed on": (128, "_pass_turn(p_turn, rank + 1)", "_pass_turn(p_turn, rank)"),
    "mask dropped": (128, "if (i_m < masked_before) | (i_m >= masked_from):", "if i_m < 0:"),
    "halves of K swapped": (128, "k_panels.index(2 * w + W)", "k_panels.index(2 * W + w)"),
    "halves of K swapped, 64": (64, "s_half.index(2 * w + W)", "s_half.index(2 * W + w)"),
    "the last tile left out, 64": (64, "for _ in range(1, count):", "for _ in range(2, count):"),
    "far sums dropped": (128, "if splits > 0:", "if splits < 0:"),
    "a range of far sinks left out": (128, "p_part += range_ * (2 * KEYS * D)", "pass"),
    "far sinks not announced": (128, "    _announce(p_done)", "    pass"),
    "far sinks take no turn": (128, "i_n, rank + sunk)", "i_n, rank)"),
    "sinks not cut": (128, "hidden = gl.where(far, sinks, FAR_AWAY)", "hidden = gl.where(far, FAR_AWAY, FAR_AWAY)"),
    "far sinks as near as the window": (128, "nearest = gl.where(far, window, 0)", "nearest = gl.where(far, 0, 0)"),
}


@cpu
@pytest.mark.parametrize("fault", HOPPER_FAULTS.values(), ids=HOPPER_FAULTS.keys())
def test_hopper_faults_are_found(fault, hopper):
    D, before, after = fault

    def edit(source):
        assert before in source
        return source.replace(before, after)

    hopper(edit)
    with pytest.raises((AssertionError, IndexError)):
        check(make(700, D=D, dtype=torch.float16), 100, 9, scale=D**-0.5)


def keeps_bad_values_in_their_sequence(D, dtype, cuts, window, sinks):
    """A NaN in everything of one sequence and an infinity in another's change no bit of the others' gradients."""
    args = at(saved(make(cuts[-1], D=D, dtype=dtype), window, sinks, cu_seqlens=cuts, scale=D**-0.5), dtype)
    clean = swa_triton_backward(*args)[:3]
    own = torch.zeros(cuts[-1], dtype=torch.bool, device=DEVICE)
    for i in (0, 1, 2, 3, 4, 7, 8):
        args[i] = args[i].clone()
        for n, bad in ((1, float("nan")), (3, float("inf"))):
            own[cuts[n] : cuts[n + 1]] = True
            args[i][:, cuts[n] : cuts[n + 1]] = bad
    for got, want in zip(swa_triton_backward(*args)[:3], clean, strict=True):
        assert torch.equal(got[:, ~own], want[:, ~own])
        assert bool(got[:, own].isnan().any())


def test_packed_keeps_an_infinity_or_nan_in_its_sequence():
    keeps_bad_values_in_their_sequence(*reversed(HALF), [0, 40, 90, 97, 103, 140], 30, 5)


@gpu
@pytest.mark.parametrize("D", [64, 128])
def test_long_packed_sequences_keep_an_infinity_or_nan(D):
    keeps_bad_values_in_their_sequence(D, torch.bfloat16, [0, 70, 700, 707, 1300, 1364, 3000], 300, 5)


EDGES = [0, 70, 110, 117, 150, 180]


@cpu
@pytest.mark.parametrize("D", [64, 128])
def test_hopper_keeps_an_infinity_or_nan_in_its_sequence(D, hopper):
    keeps_bad_values_in_their_sequence(D, torch.float16, EDGES, 50, 5)


CLEARED = {
    "queries": (64, "_clear(s_q.index(stage), left, D, 64)"),
    "gradients of the output": (128, "_clear(s_do.index(stage), left, D, 64)"),
    "keys": (128, "_clear(s_k.index(w), Tk - j0 - w * ROWS, D, 64)"),
    "values": (64, "_clear(s_v.index(w), Tk - j0 - w * ROWS, D, 64)"),
    "half of the keys": (64, "_clear(s_half.index(2 * w), Tk - j0 - w * ROWS, 32, 32)"),
    "the other half": (64, "_clear(s_half.index(2 * w + 1), Tk - j0 - w * ROWS, 32, 32)"),
    "dq": (128, "_clear(s_dq.index(slot * 2 + w), left, D // 2, 32)"),
}


@cpu
@pytest.mark.parametrize("fault", CLEARED.values(), ids=CLEARED.keys())
def test_hopper_clears_all_that_it_must(fault, hopper):
    D, call = fault

    def edit(source):
        assert source.count(call) == 1
        return source.replace(call, "pass")

    hopper(edit)
    with pytest.raises(AssertionError):
        keeps_bad_values_in_their_sequence(D, torch.float16, EDGES, 50, 5)


@gpu
@pytest.mark.parametrize("form", [(torch.float16, 64), (torch.bfloat16, 128)], ids=str)
def test_long_sequences(form):
    x = make(5000, HQ=4, HK=2, dtype=form[0], D=form[1])
    check(x, 1000, 128, scale=form[1] ** -0.5)
    check(x, 700, 20, scale=form[1] ** -0.5, cu_seqlens=[0, 100, 2500, 2500, 5000])


@gpu
def test_the_portable_kernels_on_a_gpu(monkeypatch):
    monkeypatch.setattr(launch_bwd_hopper, "serves", lambda call: False)
    check(make(3000, HQ=4, HK=2, dtype=HALF[0], D=HALF[1]), 500, 70, scale=HALF[1] ** -0.5)


@gpu
def test_many_runs_beside_another_stream_are_bitwise_equal():
    args = at(saved(make(4096, HQ=16, HK=8, D=128, dtype=torch.bfloat16), 512, 0, scale=0.1), torch.bfloat16)
    want = swa_triton_backward(*args)
    noise, other = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(other):
            noise @ noise
        got = swa_triton_backward(*args)
        assert all(map(torch.equal, got, want))


@gpu
def test_offsets_beyond_int32():
    T, HQ, D = 300, 2, 128
    stride = 2**31 // T + 2048 - 2**31 // T % 1024
    x = make(T, HQ=HQ, D=D, dtype=torch.bfloat16)
    args = at(saved(x, 40, 20, scale=0.1), torch.bfloat16)
    want = swa_triton_backward(*args)
    wide = torch.zeros(T, stride, dtype=torch.bfloat16, device=DEVICE)
    assert wide.numel() > 2**31
    for i in (0, 2):
        far = wide.as_strided((1, T, HQ, D), (T * stride, stride, D, 1), i * 1024)
        args[i] = far.copy_(args[i])
    for a, b in zip(swa_triton_backward(*args), want, strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("cuts", [None, [0, 100, 3000, 8192]], ids=str)
def test_memory_and_graph(cuts):
    T, HQ, HK, D = 8192, 16, 8, 128
    args = at(saved(make(T, HQ=HQ, HK=HK, D=D, dtype=torch.bfloat16), 512, 64, scale=0.1, cu_seqlens=cuts), torch.bfloat16)
    want = swa_triton_backward(*args)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    swa_triton_backward(*args)
    torch.cuda.synchronize()
    outputs, delta, copy = 2 * T * D * (HQ + 2 * HK), 4 * T * HQ, 4 * T * HQ * D
    sinks = 2 * launch_bwd.sm_count(DEVICE) * 2 * 128 * D * 4
    assert torch.cuda.max_memory_allocated() - before <= outputs + 2 * delta + copy + sinks + 2**20
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = swa_triton_backward(*args)
    for t in got:
        t.fill_(float("nan"))
    graph.replay()
    assert all(map(torch.equal, got, want))
