"""The device functions of the tile geometry are the Python functions that test_geometry.py checks against the dense mask."""

import pytest
import torch
import triton
import triton.language as tl

from allmem_ops.ops.swa.geometry import key_tiles, query_tiles
from allmem_ops.ops.swa.kernels import tiles


@triton.jit(do_not_specialize=["i0", "i1", "start", "Tk", "window", "sinks"])
def tiles_kernel(out, i0, i1, start, Tk, window, sinks, SIZE: tl.constexpr):
    a, b, c, d, e, f = tiles.query_tiles(i0, i1, window, sinks, SIZE)
    tl.store(out, a)
    tl.store(out + 1, b)
    tl.store(out + 2, c)
    tl.store(out + 3, d)
    tl.store(out + 4, e)
    tl.store(out + 5, f)
    a, b, c, d, e, f, g = tiles.key_tiles(i0, i1, start, Tk, window, sinks, SIZE)
    tl.store(out + 6, a)
    tl.store(out + 7, b)
    tl.store(out + 8, c)
    tl.store(out + 9, d)
    tl.store(out + 10, e)
    tl.store(out + 11, f)
    tl.store(out + 12, g)


@pytest.mark.parametrize(
    "start, Tk, window, sinks", [(0, 200, 30, 9), (150, 200, 30, 40), (0, 90, 200, 3), (10, 90, 1, 90), (0, 128, 32, 16)]
)
def test_device_functions_equal_python(device, start, Tk, window, sinks):
    for i0 in range(start, Tk, 29):
        args = i0, min(i0 + 29, Tk), start, Tk, window, sinks, 16
        out = torch.zeros(13, dtype=torch.int32, device=device)
        tiles_kernel[(1,)](out, *args)
        want = query_tiles(args[0], args[1], window, sinks, 16) + key_tiles(*args)
        assert out.tolist() == list(want), args
