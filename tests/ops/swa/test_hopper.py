"""The Hopper form of the forward: its tiles, its compilation and its values on the CPU, values on a GPU of compute capability 9.

Gluon does not run in Triton's interpreter; on the CPU the kernel's source runs with the stand-ins of `allmem_ops.testing.gluon_cpu`.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allmem_ops import swa
from allmem_ops.ops.swa import launch_hopper
from allmem_ops.ops.swa.geometry import stacked_start, stacked_tiles
from allmem_ops.ops.swa.launch_hopper import serves, swa_hopper_forward
from allmem_ops.testing import assert_within_budget
from allmem_ops.testing.gluon_cpu import gluon_on_cpu

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")


def visits(i0, rows, window, sinks, size):
    """The (row, key) pairs that the kernel's masks leave, by tile, the diagonal one last."""
    band, sink_end, sink_full, any_end, masked, full, count = stacked_tiles(i0, rows, window, sinks, size)
    i = torch.arange(i0, i0 + rows)[:, None]
    for n in range(count):
        j0 = stacked_start(n, i0, band, sink_end, sink_full, masked, full, size)
        j = max(j0, 0) + torch.arange(size)  # a tile that would reach over the start begins there
        seen = torch.ones(rows, size, dtype=torch.bool)
        if n < any_end or j0 < 0:
            assert j0 >= 0 or n == 0
            end = sink_end if n == 0 and sink_end > sink_full * size else j0 + size
            seen = ((j > i - window) | (j < sinks)) & (j < end)
        elif n < masked:
            seen = j > i - window
        yield i.expand_as(seen)[seen], j.expand_as(seen)[seen]
    j = torch.arange(i0, i0 + rows)
    seen = (j <= i) & ((i - j < window) | (j < sinks))
    yield i.expand_as(seen)[seen], j.expand_as(seen)[seen]


@settings(max_examples=200)
@given(st.integers(0, 70), st.sampled_from([1, 2, 4, 8]), st.integers(1, 80), st.integers(0, 70), st.sampled_from([2, 4, 8, 16]))
@example(0, 4, 1, 0, 8)
@example(64, 4, 16, 64, 8)
@example(63, 8, 17, 9, 8)
def test_stacked_tiles_hold_every_visible_pair_once(i0, rows, window, sinks, size):
    end = i0 + rows
    count = torch.zeros(end, end, dtype=torch.int64)
    for i, j in visits(i0, rows, window, sinks, size):
        assert bool((j >= 0).all()), "a key before the first is left in"
        count.index_put_((i, j), torch.ones((), dtype=torch.int64), accumulate=True)
    i, j = torch.arange(end)[:, None], torch.arange(end)
    want = (i >= i0) & (j <= i) & ((i - j < window) | (j < sinks))
    assert torch.equal(count, want.long())


def test_stacked_tiles_read_little_more_than_the_band():
    tiles = stacked_tiles(6400, 64, 512, 0, 128)
    assert tiles[-1] * 128 + 64 == 576  # 512 + 63 keys are visible to a row or another
    assert tiles[4] == 1  # one tile of the four needs a mask


# Launches on tensors without memory, for a GPU that is not there. Prints a line a kernel: head dim, registers, bytes spilled, bytes of
# shared memory, wgmma in the code. The forms that need most registers: D = 128, packed with an even group, plain with an odd one.
SCRIPT = """
import torch
from allmem_ops.ops.swa.launch_hopper import swa_hopper_forward
from allmem_ops.testing.aot import absent_gpu

for D, heads, packed in ((128, (4, 2), True), (128, (3, 1), False)):
    with absent_gpu("sm90") as launched:
        q, k, v = (torch.empty(1, 500, n, D, dtype=torch.bfloat16, device="meta") for n in (heads[0], heads[1], heads[1]))
        cu_seqlens = torch.empty(4, dtype=torch.int64, device="meta") if packed else None
        for window, sinks in ((1, 0), (512, 16)):
            swa_hopper_forward(q, k, v, cu_seqlens, window, sinks, 0.1)
    assert len(launched) == 1, "another window or sinks, another compilation"
    print(D, launched[0].registers, launched[0].spill_bytes, launched[0].shared_bytes, int("wgmma" in launched[0].ptx))
"""


def test_compiles_for_sm90_asynchronous(tmp_path):
    """What is spilled lies outside the loops over tiles: scalars of an item."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "ptxas info" in run.stdout.replace("-blackwell", "")
    assert "serialized" not in run.stdout, "ptxas waits for each wgmma: not enough registers"
    lines = [line.split() for line in run.stdout.splitlines() if line[:1].isdigit()]
    assert len(lines) == 2
    for D, registers, spilled, shared, wgmma in lines:
        assert int(registers) <= 168, D  # of 384 threads: the file of an SM; the partitions share it out anew
        assert int(spilled) <= 256, D
        assert int(shared) <= 227 * 1024, D
        assert wgmma == "1", D


def test_serves_nothing_off_a_hopper_gpu():
    q = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16)
    assert not serves(q, q, q, None)


def make(Tq, Tk, HQ, HK, D, dtype, B=1, device="cuda"):
    shapes = {"q": (B, Tq, HQ, D), "k": (B, Tk, HK, D), "v": (B, Tk, HK, D)}
    return {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}


def plain(x, window, sinks):
    """(o, lse) of the formula in plain PyTorch at the inputs' precision."""
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    i, j = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None].to(q.device), torch.arange(k.shape[2], device=q.device)
    score = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill((j > i) | ((i - j >= window) & (j >= sinks)), float("-inf"))
    return (score.softmax(-1) @ v).transpose(1, 2), score.float().logsumexp(-1).transpose(1, 2)


def judge(got, x, window, sinks):
    exact = swa(**{name: t.double() for name, t in x.items()}, window=window, sinks=sinks, return_lse=True, impl="reference")
    for name, *values in zip(("o", "lse"), got, plain(x, window, sinks), exact, strict=True):
        assert_within_budget(name, *values)


def check(x, window, sinks):
    assert serves(x["q"], x["k"], x["v"], None)
    got = swa(**x, window=window, sinks=sinks, return_lse=True, impl="triton")
    judge(got, x, window, sinks)
    return got


MODULE = "allmem_ops.ops.swa.kernels.hopper_fwd"


def on_cpu(x, window, sinks, cu_seqlens=None, programs=1, **options):
    """(o, lse) of the launch code and the kernel's source, with `programs` programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_hopper, "swa_fwd_hopper_kernel", gluon_on_cpu(MODULE, **options).swa_fwd_hopper_kernel)
        patch.setattr(launch_hopper, "gpu_class", lambda _: "sm90")
        patch.setattr(launch_hopper, "sm_count", lambda _: programs)
        return swa_hopper_forward(**x, cu_seqlens=cu_seqlens, window=window, sinks=sinks, scale=x["q"].shape[3] ** -0.5)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
def test_source_within_the_budget(heads, D, late):
    for Tq, Tk, window, sinks in ((64, 64, 64, 0), (300, 300, 100, 4), (200, 420, 130, 150), (1, 200, 300, 5)):
        x = make(Tq, Tk, *heads, D, torch.float16, device="cpu")
        judge(on_cpu(x, window, sinks, programs=2, late=late), x, window, sinks)


@settings(max_examples=15)
@given(
    st.integers(1, 400), st.integers(0, 300), st.integers(1, 500), st.integers(0, 300), st.sampled_from([(2, 1), (1, 1), (4, 1)]),
    st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
@example(256, 0, 256, 128, (2, 1), 1, 0)
@example(129, 1, 1, 300, (1, 1), 2, 1)
def test_source_at_any_size(Tq, before, window, sinks, heads, programs, seed):
    x = make(Tq, Tq + before, *heads, 64, torch.float16, device="cpu")
    judge(on_cpu(x, window, sinks, programs=programs, seed=seed), x, window, sinks)


@pytest.mark.parametrize("heads", [(2, 1), (3, 1)], ids=str)
def test_source_packed_equals_separate(heads):
    lengths = [0, 1, 63, 64, 65, 200, 0, 3, 140]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    x = make(sum(lengths), sum(lengths), *heads, 64, torch.float16, device="cpu")
    for window, sinks in ((100, 0), (40, 5)):
        packed = on_cpu(x, window, sinks, cu, programs=2)
        for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False):
            if a < b:
                judge([t[:, a:b] for t in packed], {name: t[:, a:b] for name, t in x.items()}, window, sinks)


@pytest.mark.parametrize("fault", [None, "first < r + PART and stop > r"], ids=["", "rows of others not cleared"])
def test_source_packed_keeps_an_infinity_or_nan_in_its_sequence(fault):
    if fault is None:
        keeps_bad_values_in_their_sequence(str)
    else:
        with pytest.raises(AssertionError):
            keeps_bad_values_in_their_sequence(lambda source: source.replace(fault, "False"))


def keeps_bad_values_in_their_sequence(edit):
    lengths = [70, 64, 130, 7, 90]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    for heads, D in (((2, 1), 64), ((1, 1), 128)):
        x = make(sum(lengths), sum(lengths), *heads, D, torch.float16, device="cpu")
        clean = on_cpu(x, 100, 3, cu)
        for n, bad in ((1, float("nan")), (3, float("inf"))):
            a, b = cu[n], cu[n + 1]
            dirty = {name: t.clone() for name, t in x.items()}
            for t in dirty.values():
                t[:, a:b] = bad
            for got, want in zip(on_cpu(dirty, 100, 3, cu, edit=edit), clean, strict=True):
                assert torch.equal(got[:, :a], want[:, :a])
                assert torch.equal(got[:, b:], want[:, b:])
                assert bool(got[:, a:b].isnan().all())


PRODUCT = "b_o, b_h, b_p = warpgroup_mma_wait(0, deps=(b_o, b_h, b_p))"
FREE_VALUES = "mbarrier.arrive(v_free.index((n + V_STAGES - 1) % V_STAGES), count=1)"
FAULTS = {
    "values released before the product": (f"{PRODUCT}\n    {FREE_VALUES}", f"{FREE_VALUES}\n    {PRODUCT}"),
    "scores without waiting for the keys": ("mbarrier.wait(k_full.index(i_s), (n // STAGES) & 1)", "pass"),
    "a phase off by one": ("((n // STAGES) & 1) ^ 1)", "(n // STAGES) & 1)"),
    "queries released before the output has left": ("tma.store_wait(0)\n    mbarrier.arrive(q_free", "mbarrier.arrive(q_free"),
    "no turn passed": ("mbarrier.arrive(turns.index(1 - W), count=1)", "pass"),
    "output not scaled": ("b_o = b_o * gl.convert_layout(b_c, gl.SliceLayout(1, P_LAYOUT.parent), assert_trivial=True)[:, None]", "pass"),
    "no mask at the window": ('MASK == "band"', 'MASK == "never"'),
    "a tile moved up to the start keeps the keys of the next": ("sink_end, j0 + BN)", "sink_end, i0)"),
    "sinks forgotten": ("(near | (o_j < sinks)[None, :])", "near"),
}  # fmt: skip


def some_orders(edit):
    x = make(340, 340, 2, 1, 128, torch.float16, device="cpu")
    for seed in range(6):
        judge(on_cpu(x, 200, 9, seed=seed, edit=edit), x, 200, 9)


def test_source_in_some_orders_of_its_partitions():
    some_orders(str)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_source_faults_are_found(fault):
    def edit(source):
        assert source.count(fault[0]) == 1
        return source.replace(*fault)

    with pytest.raises(AssertionError):
        some_orders(edit)


@hopper
@pytest.mark.parametrize(
    "heads, D, dtype", [((4, 2), 128, torch.bfloat16), ((8, 1), 64, torch.bfloat16), ((3, 1), 64, torch.float16)], ids=str
)
def test_within_the_budget(heads, D, dtype):
    for Tq, Tk, window, sinks in ((64, 64, 64, 0), (300, 300, 100, 4), (777, 1300, 130, 150), (500, 500, 1, 4), (1, 900, 300, 5)):
        check(make(Tq, Tk, *heads, D, dtype, B=2), window, sinks)
    check(make(1500, 1500, *heads, D, dtype), 512, 128)
    check(make(700, 700, *heads, D, dtype), 10**12, 7)


@hopper
def test_polynomial_exponentials_within_the_budget():
    """A candidate for tuning, with half of the exponentials."""
    config = launch_hopper.TABLE["sm90", (64, 2)][-1]
    config = config._replace(constants=dict(config.constants) | {"POLY": 4})
    x = make(900, 900, 4, 2, 64, torch.bfloat16)
    judge(swa_hopper_forward(**x, cu_seqlens=None, window=500, sinks=3, scale=64**-0.5, config=config), x, 500, 3)


@hopper
def test_packed_keeps_an_infinity_or_nan_in_its_sequence():
    cuts = [0, 70, 134, 300, 307, 900]
    cu = torch.tensor(cuts, device="cuda")
    x = make(900, 900, 4, 2, 128, torch.bfloat16)
    clean = swa(**x, window=100, sinks=3, cu_seqlens=cu, impl="triton")
    for n, bad in ((1, float("nan")), (3, float("inf"))):
        a, b = cuts[n : n + 2]
        dirty = {name: t.clone() for name, t in x.items()}
        for t in dirty.values():
            t[:, a:b] = bad
        got = swa(**dirty, window=100, sinks=3, cu_seqlens=cu, impl="triton")
        assert torch.equal(got[:, :a], clean[:, :a]) and torch.equal(got[:, b:], clean[:, b:])


@hopper
def test_packed_equals_separate():
    lengths = [0, 1, 63, 64, 65, 200, 0, 513, 3, 128, 700]
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    x = make(sum(lengths), sum(lengths), 4, 2, 128, torch.bfloat16)
    for window, sinks in ((100, 0), (64, 5), (300, 200)):
        packed = swa(**x, window=window, sinks=sinks, cu_seqlens=cu, return_lse=True, impl="triton")
        for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False):
            if a < b:
                alone = swa(**{n: t[:, a:b] for n, t in x.items()}, window=window, sinks=sinks, return_lse=True, impl="triton")
                for got, want in zip(packed, alone, strict=True):
                    assert torch.equal(got[:, a:b], want)


@hopper
def test_strided_inputs_and_equal_runs():
    qkv = torch.randn(2, 500, 8, 128, device="cuda", dtype=torch.bfloat16)
    x = dict(zip("qkv", qkv.split([4, 2, 2], 2), strict=True))
    first = check(x, 200, 3)
    for _ in range(3):
        assert all(map(torch.equal, first, swa(**x, window=200, sinks=3, return_lse=True, impl="triton")))
