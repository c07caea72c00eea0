"""The Hopper form of the forward: its tiles and its compilation on the CPU, values on a GPU of compute capability 9.

Gluon does not run in the interpreter: without such a GPU nothing here computes an attention.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allmem_ops import swa
from allmem_ops.ops.swa.geometry import stacked_start, stacked_tiles
from allmem_ops.ops.swa.launch_hopper import TABLE, serves
from allmem_ops.testing import assert_within_budget

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")


def visits(i0, rows, window, sinks, size):
    """The (row, key) pairs that the kernel's masks leave, by tile, the diagonal one last."""
    band, sink_end, sink_full, any_end, masked, full, count = stacked_tiles(i0, rows, window, sinks, size)
    i = torch.arange(i0, i0 + rows)[:, None]
    for n in range(count):
        j0 = stacked_start(n, i0, band, sink_end, sink_full, masked, full, size)
        j = j0 + torch.arange(size)
        seen = torch.ones(rows, size, dtype=torch.bool)
        if n < any_end:
            end = sink_end if n == 0 and sink_end > sink_full * size else i0
            seen = ((j > i - window) | (j < sinks)) & (j >= 0) & (j < end)
        elif n < masked:
            seen = j >= (i - window + 1).clamp(min=0)
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


# Prints a line a kernel: head dim, heads, packed, registers, bytes spilled, bytes of shared memory, wgmma in the code.
SCRIPT = """
from allmem_ops.ops.swa.kernels.hopper_fwd import swa_fwd_hopper_kernel as kernel
from allmem_ops.ops.swa.launch_hopper import TABLE
from allmem_ops.testing.aot import compile_for
from triton.experimental.gluon.language import NVMMASharedLayout

layout = repr(NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))
for (gpu, (D, heads)), (config, *_) in TABLE.items():
    if (D, heads) == (64, 1):  # has registers to spare
        continue
    packed = heads == 2
    tile = {rows: f"tensordesc<bf16[1, {rows}, 1, {D}],{layout}>" for rows in (64, 128 // heads, config.constants["BN"])}
    types = {"q": tile[64], "o": tile[64], "k": tile[config.constants["BN"]], "v": tile[config.constants["BN"]]}
    types |= {"k_diagonal": tile[128 // heads], "v_diagonal": tile[128 // heads], "p_o": "*bf16", "p_lse": "*fp32", "scale_log2": "fp32"}
    types |= dict.fromkeys(("Tq", "offset", "window", "sinks", "group", "packs", "blocks", "sequences", "items"), "i32")
    types |= {"cu_seqlens": "*i64"} if packed else {}
    constants = {**config.constants, "D": D, "HEADS": heads} | ({} if packed else {"cu_seqlens": None})
    found = compile_for(gpu, kernel, types, constants, num_warps=config.num_warps, num_stages=config.num_stages)
    print(D, heads, int(packed), found.registers, found.spill_bytes, found.shared_bytes, int("wgmma" in found.ptx))
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
    assert len(lines) == len(TABLE) - 1
    for D, _, _, registers, spilled, shared, wgmma in lines:
        assert int(registers) <= 168, D  # of 384 threads: the file of an SM; the partitions share it out anew
        assert int(spilled) <= 256, D
        assert int(shared) <= 227 * 1024, D
        assert wgmma == "1", D


def test_serves_nothing_off_a_hopper_gpu():
    q = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16)
    assert not serves(q, q, q, None)


def make(Tq, Tk, HQ, HK, D, dtype, B=1):
    shapes = {"q": (B, Tq, HQ, D), "k": (B, Tk, HK, D), "v": (B, Tk, HK, D)}
    return {name: torch.randn(shape, device="cuda").to(dtype) for name, shape in shapes.items()}


def plain(x, window, sinks):
    """(o, lse) of the formula in plain PyTorch at the inputs' precision."""
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    i, j = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device="cuda")[:, None], torch.arange(k.shape[2], device="cuda")
    score = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill((j > i) | ((i - j >= window) & (j >= sinks)), float("-inf"))
    return (score.softmax(-1) @ v).transpose(1, 2), score.float().logsumexp(-1).transpose(1, 2)


def check(x, window, sinks):
    assert serves(x["q"], x["k"], x["v"], None)
    options = {"window": window, "sinks": sinks, "return_lse": True}
    got = swa(**x, **options, impl="triton")
    exact = swa(**{name: t.double() for name, t in x.items()}, **options, impl="reference")
    for name, *values in zip(("o", "lse"), got, plain(x, window, sinks), exact, strict=True):
        assert_within_budget(name, *values)
    return got


@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2), (8, 1)], ids=str)
def test_within_the_budget(heads, D, dtype):
    for Tq, Tk, window, sinks in (
        (64, 64, 64, 0),
        (300, 300, 100, 4),
        (777, 1300, 130, 150),
        (500, 500, 1, 4),
        (700, 700, 10**12, 7),
        (1, 900, 300, 5),
    ):
        check(make(Tq, Tk, *heads, D, dtype, B=2), window, sinks)
    check(make(1500, 1500, *heads, D, dtype), 512, 128)


@hopper
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
def test_packed_equals_separate(heads):
    lengths = [0, 1, 63, 64, 65, 200, 0, 513, 3, 128, 700]
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    x = make(sum(lengths), sum(lengths), *heads, 128, torch.bfloat16)
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
