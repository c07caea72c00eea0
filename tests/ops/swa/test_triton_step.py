"""The decode kernels of `swa`: against the fp64 reference and, for the cache, bit for bit against `WindowCache.append`.

On a CPU they run in Triton's interpreter with tiny blocks, so that a small cache still has many blocks and ranges.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allmem_ops import WindowCache, swa, swa_step
from allmem_ops.ops.kernels.configs import Config
from allmem_ops.testing import assert_within_budget

launch_step = pytest.importorskip("allmem_ops.ops.swa.launch_step")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@pytest.fixture(autouse=True)
def _many_ranges(monkeypatch, request):
    """Blocks of 16 slots and as many ranges as there are blocks; a test marked `pinned` takes what users get."""
    if "pinned" in request.fixturenames:
        return
    monkeypatch.setattr(launch_step, "_SPLIT", {shape: [Config({"BN": 16}, 4, 3)] for shape in launch_step._SPLIT})
    monkeypatch.setattr(launch_step, "sm_count", lambda _: 64)


@pytest.fixture
def pinned():
    """The pinned config and the GPU's own number of ranges."""


def cache_at(positions, window, sinks, HK=2, D=16, dtype=torch.float32):
    """Row b has seen positions[b] tokens."""
    cache = WindowCache.empty(len(positions), HK, D, window=window, sinks=sinks, dtype=dtype, device=DEVICE)
    for b, n in enumerate(positions):
        row = WindowCache.empty(1, HK, D, window=window, sinks=sinks, dtype=dtype, device=DEVICE)
        row.append(*(torch.randn(1, n, HK, D, device=DEVICE).to(dtype) for _ in range(2)))
        cache.copy_([b], row, [0])
    return cache


def token(cache, HQ, far=True):
    B, HK, D = cache.dims.values()
    heads = {"q": HQ, "k": HK, "v": HK} | ({"q_sinks": HQ} if far else {})
    return {name: torch.randn(B, 1, H, D, device=DEVICE).to(cache.ring_k.dtype) for name, H in heads.items()}


def double(cache):
    wide = {name: t.clone() if name == "positions" else t.double() for name, t in cache.tensors().items()}
    return WindowCache(**wide, **cache.options())


def compare(cache, x, active=None, scale=None):
    """One step of the kernels: the output within the budget of the chunk path, the cache what the chunk path makes of it."""
    exact = swa_step(**{n: t.double() for n, t in x.items()}, cache=double(cache), active=active, scale=scale, impl="reference")
    other = cache.clone()
    low = swa_step(**x, cache=other, active=active, scale=scale, impl="chunk")
    got = swa_step(**x, cache=cache, active=active, scale=scale, impl="triton")
    assert got.dtype == low.dtype
    assert_within_budget("o", got, low, exact)
    for name, tensor in cache.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
@pytest.mark.parametrize("window, sinks", [(33, 19), (7, 3), (1, 0), (1, 4), (5, 9), (40, 0)])
def test_a_step_at_mixed_positions(window, sinks, far, dtype):
    full = sinks + window
    cache = cache_at((0, 2, full - 1, full, 3 * full + 2), window, sinks, dtype=dtype)
    compare(cache, token(cache, 4, far))
    compare(cache, token(cache, 4, far), active=torch.tensor([True, False, True, True, False], device=DEVICE))


@settings(max_examples=8)
@given(
    st.integers(1, 40),
    st.integers(0, 30),
    st.lists(st.integers(0, 90), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from([1, 3] if CUDA else [1, 2, 3, 4]),
    st.sampled_from([40]) if CUDA else st.integers(1, 40),
    st.booleans(),
)
@example(20, 4, [3], 1, 17, 8, True)  # more query heads a group than the smallest tile has rows
@example(16, 16, [31, 32], 1, 1, 1, False)
def test_any_sizes(window, sinks, positions, HK, G, D, far):
    cache = cache_at(positions, window, sinks, HK, D)
    compare(cache, token(cache, HK * G, far))


# On a GPU each size compiles two kernels: every head dim and ratio once there, with one dtype each.
_HEADS = [(6, 2, 80), (8, 1, 20), (2, 2, 16)]
_HEADS_GPU = [(2, 2, 64), (6, 2, 80), (4, 1, 96), (8, 1, 128), (2, 1, 256), (9, 3, 32), (3, 1, 256), (4, 2, 128)]


@pytest.mark.parametrize(
    "HQ, HK, D, dtype",
    [(*sizes, DTYPES[i % 3]) for i, sizes in enumerate(_HEADS_GPU)] if CUDA else [(*sizes, t) for sizes in _HEADS for t in DTYPES],
)
def test_heads_and_head_dims(HQ, HK, D, dtype):
    cache = cache_at((60, 9), 30, 6, HK, D, dtype)
    compare(cache, token(cache, HQ), scale=0.3)


def test_from_an_empty_cache_on_steps_equal_one_pass():
    window, sinks, T = 6, 3, 14
    q, k, v, far = (torch.randn(1, T, H, 16, device=DEVICE) for H in (4, 2, 2, 4))
    cache = WindowCache.empty(1, 2, 16, window=window, sinks=sinks, dtype=torch.float32, device=DEVICE)
    rows = [(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], far[:, t : t + 1]) for t in range(T)]
    steps = [swa_step(a, b, c, cache, q_sinks=f, impl="triton") for a, b, c, f in rows]
    want = swa(*(t.double() for t in (q, k, v)), q_sinks=far.double(), window=window, sinks=sinks, impl="reference")
    low = swa(q, k, v, q_sinks=far, window=window, sinks=sinks, impl="chunk")
    assert_within_budget("o", torch.cat(steps, 1), low, want)
    assert cache.positions.tolist() == [T]


def test_slices_of_a_fused_projection_and_expanded_rows_are_read_in_place():
    cache = cache_at((20, 50), 16, 4)
    fused = torch.randn(2, 1, 16, 10, device=DEVICE)  # [B, 1, D, H]: the head dim is not dense
    q, k, v = (fused[..., a:b].transpose(2, 3) for a, b in ((0, 4), (4, 6), (6, 8)))
    active = torch.ones(1, dtype=torch.bool, device=DEVICE).expand(2)
    compare(cache, {"q": q, "k": k, "v": v, "q_sinks": q[:1].expand(2, -1, -1, -1)}, active=active)


@pytest.mark.parametrize("poison", [1e6, float("inf"), float("nan")])
def test_slots_never_written_are_not_read(poison):
    clean, dirty = cache_at((0, 3, 20), 40, 5), cache_at((0, 3, 20), 40, 5)
    dirty.copy_([0, 1, 2], clean, [0, 1, 2])
    for b, n in enumerate((0, 3, 20)):
        dirty.sink_k[b, n:], dirty.sink_v[b, n:] = poison, poison
        dirty.ring_k[b, max(n - 5, 0) :], dirty.ring_v[b, max(n - 5, 0) :] = poison, poison
    x = token(clean, 4)
    assert torch.equal(swa_step(**x, cache=dirty, impl="triton"), swa_step(**x, cache=clean, impl="triton"))


def test_the_token_that_leaves_the_window_is_not_seen():
    cache, other = cache_at((30,), 8, 2), cache_at((30,), 8, 2)
    other.copy_([0], cache, [0])
    slot = (30 - 2) % 8
    other.ring_k[0, slot], other.ring_v[0, slot] = float("nan"), float("nan")
    x = token(cache, 4)
    assert torch.equal(swa_step(**x, cache=other, impl="triton"), swa_step(**x, cache=cache, impl="triton"))
    assert torch.equal(other.ring_k, cache.ring_k)


def test_inactive_rows_stay_bit_for_bit_whatever_they_are_given():
    cache = cache_at((10, 3, 30), 8, 4)
    cache.ring_k[1, 0] = float("nan")
    before = cache.clone()
    bad = {name: torch.full_like(t, float("nan")) for name, t in token(cache, 4).items()}
    out = swa_step(**bad, cache=cache, active=torch.zeros(3, dtype=torch.bool, device=DEVICE), impl="triton")
    assert torch.equal(out, torch.zeros_like(out))
    for name, tensor in cache.tensors().items():
        assert torch.equal(tensor.view(torch.uint8), before.tensors()[name].view(torch.uint8)), name


def test_positions_beyond_32_bits():
    cache = cache_at((50, 50), 16, 4)
    cache.positions.copy_(torch.tensor([2**33 + 5, 2**31 - 1]))
    compare(cache, token(cache, 4))


def test_rows_do_not_depend_on_their_neighbours_and_runs_are_bitwise_equal():
    cache = cache_at((5, 40, 90), 33, 7)
    x, alone, again = token(cache, 4), cache.index_select([1]), cache.clone()
    got = swa_step(**x, cache=cache, impl="triton")
    assert torch.equal(swa_step(**x, cache=again, impl="triton"), got)
    one = swa_step(**{n: t[1:2] for n, t in x.items()}, cache=alone, impl="triton")
    torch.testing.assert_close(one, got[1:2])  # another number of ranges: sums in another order


@pytest.mark.parametrize("splits", [1, 2, 5, 128])
def test_any_number_of_ranges(splits, monkeypatch):
    monkeypatch.setattr(launch_step, "split_count", lambda *_: splits)
    cache = cache_at((0, 17, 49, 200), 60, 11)
    compare(cache, token(cache, 4))


def test_the_number_of_ranges_fills_the_gpu_and_stays_bounded():
    for pairs, slots in ((1, 4224), (8, 4224), (256, 4224), (1024, 4224), (8, 10**7), (8, 1), (3, 65)):
        splits = launch_step.split_count(pairs, slots, 32, 132)
        assert 1 <= splits <= min(launch_step.MAX_SPLITS, -(-slots // 32))
        assert splits == 1 or pairs * splits <= 2 * 132
    assert [launch_step.split_count(8 * batch, 4224, 32, 132) for batch in (1, 2, 4, 8, 16, 32)] == [22, 16, 8, 4, 2, 1]


def test_the_pinned_config(pinned):
    cache = cache_at((5, 700), 600, 20, D=64)
    compare(cache, token(cache, 4))


def faults():
    def zeroed(o, _):
        o.zero_()

    def not_moved_on(_, cache):
        cache.positions -= 1

    def not_written(_, cache):
        cache.ring_v.zero_()

    def one_slot_off(_, cache):
        cache.ring_k.copy_(cache.ring_k.roll(1, 1))

    return [zeroed, not_moved_on, not_written, one_slot_off]


@pytest.mark.parametrize("fault", faults(), ids=lambda f: f.__name__)
def test_the_comparison_sees_a_fault(fault, monkeypatch):
    cache, right = cache_at((30, 9), 8, 2), launch_step.swa_step

    def wrong(*args):
        o = right(*args)
        fault(o, cache)
        return o

    monkeypatch.setattr(launch_step, "swa_step", wrong)
    with pytest.raises(AssertionError):
        compare(cache, token(cache, 4))


@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_opcheck(far, sinks):
    cache = cache_at((1, 9), 5, sinks, D=16)
    x = token(cache, 4, far)
    active = torch.tensor([True, False], device=DEVICE)
    args = (x["q"], x["k"], x["v"], x.get("q_sinks"), active, *cache.tensors().values(), 0.3)
    torch.library.opcheck(torch.ops.allmem_ops.swa_step_triton.default, args)


def test_compiles_whole_and_does_not_recompile_as_positions_grow():
    cache, eager = cache_at((0, 3), 4, 2), cache_at((0, 3), 4, 2)
    eager.copy_([0, 1], cache, [0, 1])
    torch._dynamo.reset()
    step = torch.compile(swa_step, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    active = torch.tensor([True, False], device=DEVICE)
    for i in range(4):
        x = token(cache, 4)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = step(**x, cache=cache, active=active, impl="triton")
        assert torch.equal(got, swa_step(**x, cache=eager, active=active, impl="triton"))
    assert all(torch.equal(t, eager.tensors()[name]) for name, t in cache.tensors().items())


def test_no_autograd_and_constant_bytes():
    cache = cache_at((9,), 6, 2)
    nbytes, version = cache.nbytes, cache.ring_k._version
    x = {name: t.requires_grad_() for name, t in token(cache, 4).items()}
    assert not swa_step(**x, cache=cache, impl="triton").requires_grad
    assert cache.nbytes == nbytes and not any(t.requires_grad for t in cache.tensors().values())
    assert cache.ring_k._version > version  # a backward that saved it must notice


def test_what_the_kernels_do_not_take_is_one_clear_error():
    cache = cache_at((3,), 4, 1, D=257)
    x = token(cache, 4)
    with pytest.raises(ValueError, match=r"`q` must have a head dim D of at most 256 with `impl`='triton'; got 257"):
        swa_step(**x, cache=cache, impl="triton")
    swa_step(**x, cache=cache)  # "auto" takes the chunk path
    cache = cache_at((3,), 4, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`impl` 'triton' needs one of .*; got float64"):
        swa_step(**token(cache, 4), cache=cache, impl="triton")
    cache = cache_at((3, 3), 4, 1)
    cache.ring_k = cache.ring_k.mT.contiguous().mT
    with pytest.raises(ValueError, match=r"`cache.ring_k` must be contiguous"):
        swa_step(**token(cache, 4), cache=cache, impl="triton")
    assert WindowCache.from_state_dict(cache.state_dict()).ring_k.is_contiguous()


def test_no_rows():
    cache = cache_at((3, 3), 5, 2).index_select([])
    assert swa_step(**token(cache, 4), cache=cache, impl="triton").shape == (0, 1, 4, 16)


def test_flops_are_those_of_all_slots():
    from torch.utils.flop_counter import FlopCounterMode

    cache = cache_at((3, 3), 5, 2)
    with FlopCounterMode(display=False) as counter:
        swa_step(**token(cache, 4), cache=cache, impl="triton")
    assert counter.get_total_flops() == 4 * 2 * 4 * 16 * (5 + 2)


@gpu
@pytest.mark.parametrize("batch", [1, 7, 32, 128])
@pytest.mark.parametrize("D", [64, 128])
def test_full_size(batch, D, pinned):
    window, sinks, dtype = 4096, 128, torch.bfloat16
    cache = WindowCache.empty(batch, 8, D, window=window, sinks=sinks, dtype=dtype, device=DEVICE)
    for t in (cache.sink_k, cache.sink_v, cache.ring_k, cache.ring_v):
        t.normal_()
    cache.positions.copy_(torch.linspace(0, 20000, batch).long() if batch > 1 else torch.tensor([9000]))
    for far in (False, True):
        x, before = token(cache, 16, far), cache.clone()
        got = swa_step(**x, cache=cache, impl="triton")
        for rows in torch.arange(batch, device=DEVICE).split(16):  # all rows in float64 do not fit into 80 GB
            part, y = before.index_select(rows), {n: t[rows] for n, t in x.items()}
            exact = swa_step(**{n: t.double() for n, t in y.items()}, cache=double(part), impl="reference")
            low = swa_step(**y, cache=part, impl="chunk")
            assert_within_budget("o", got[rows], low, exact)
            for name, tensor in cache.index_select(rows).tensors().items():
                assert torch.equal(tensor, part.tensors()[name]), name


@gpu
def test_auto_takes_the_kernels_and_launches_two(pinned):
    cache = cache_at((500, 20), 300, 16, D=64, dtype=torch.bfloat16)
    x = token(cache, 8)
    swa_step(**x, cache=cache)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        swa_step(**x, cache=cache)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [n for n in names if "FillFunctor" not in n]  # the tests poison what is allocated
    assert names == ["swa_step_split_kernel", "swa_step_merge_kernel"]


@gpu
def test_a_captured_step_goes_on_with_the_positions_and_reads_nothing_on_the_host(pinned):
    cache = cache_at((0, 9, 60), 40, 4, D=64, dtype=torch.bfloat16)
    eager, x = cache.clone(), token(cache, 8)
    active = torch.tensor([True, True, False], device=DEVICE)
    swa_step(**x, cache=cache.clone(), active=active)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = swa_step(**x, cache=cache, active=active)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i in range(60):
        for t in (*x.values(), active):
            t.copy_(torch.randn_like(t) if t.is_floating_point() else torch.rand(3, device=DEVICE) < 0.8)
        graph.replay()
        assert torch.equal(out, swa_step(**x, cache=eager, active=active)), i
    assert all(torch.equal(t, eager.tensors()[name]) for name, t in cache.tensors().items())


@gpu
def test_offsets_beyond_32_bits(pinned):
    cache = WindowCache.empty(3, 8, 128, window=2**20, sinks=4, dtype=torch.float16, device=DEVICE)  # 3.2e9 elements a buffer
    for t in (cache.ring_k, cache.ring_v):
        t[2, -300:] = torch.randn(300, 8, 128, device=DEVICE)
    cache.positions.copy_(torch.tensor([0, 5, 2**20 + 4]))
    x = token(cache, 16)
    small = WindowCache.empty(1, 8, 128, window=2**20, sinks=4, dtype=torch.float16, device=DEVICE).copy_([0], cache, [2])
    got = swa_step(**x, cache=cache, impl="triton")
    want = swa_step(**{n: t[2:] for n, t in x.items()}, cache=small, impl="triton")
    torch.testing.assert_close(got[2:], want)
    assert torch.equal(cache.ring_k[2, 0], x["k"][2, 0])
