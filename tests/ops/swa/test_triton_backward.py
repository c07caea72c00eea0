"""The backward kernels of `swa` against the definition's gradients, in the interpreter with tiny sizes and on a GPU with full ones."""

import pytest
import torch

from allmem_ops.ops.swa.chunk import swa_chunk_backward, swa_chunk_forward
from allmem_ops.ops.swa.launch_bwd import swa_triton_backward
from allmem_ops.testing import assert_within_budget

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter computes bfloat16 on raw bit patterns.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
NAMES = ("dq", "dk", "dv", "dq_sinks")


def operands(Tq, Tk=None, *, B=1, HQ=2, HK=1, D=16, far=False, dtype=torch.float32):
    """q, k, v, q_sinks (or None)."""
    Tk = Tq if Tk is None else Tk
    shapes = [(B, Tq, HQ, D), (B, Tk, HK, D), (B, Tk, HK, D)] + [(B, Tq, HQ, D)] * far
    x = [torch.randn(shape).to(dtype).to(DEVICE) for shape in shapes]
    return x if far else [*x, None]


def saved(x, window, sinks, scale=0.3, cu_seqlens=None):
    """What a backward is given, float64: do, dlse, q, k, v, q_sinks, cu_seqlens, o, lse, window, sinks, scale."""
    x = [None if t is None else t.double() for t in x]
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    o, lse = swa_chunk_forward(*x, cu_seqlens, window, sinks, scale)
    return [torch.randn_like(o), torch.randn_like(lse), *x, cu_seqlens, o, lse, window, sinks, scale]


def at(args, dtype):
    """The same arguments as kernels are given them: tensors in `dtype`, lse and its gradient in float32."""
    do, dlse, *x, cu_seqlens, o, lse, window, sinks, scale = args
    x = [None if t is None else t.to(dtype) for t in x]
    return [do.to(dtype), dlse.float(), *x, cu_seqlens, o.to(dtype), lse.float(), window, sinks, scale]


def check(x, window, sinks, dtype=torch.float32, **options):
    args = saved(x, window, sinks, **options)
    args[0] = args[0].to(dtype).double()
    exact, low = swa_chunk_backward(*args), swa_chunk_backward(*at(args, dtype))
    got = swa_triton_backward(*at(args, dtype))
    for name, *values in zip(NAMES, got, low, exact, strict=True):
        assert values[0].dtype == dtype
        assert_within_budget(name, *values)
    return got


CASES = {  # Tq, Tk, window, sinks
    "one token": (1, 1, 3, 2),
    "one tile": (32, 32, 7, 2),
    "past one tile": (65, 65, 64, 4),
    "tiles and window apart": (111, 111, 50, 3),
    "window of one": (70, 70, 1, 0),
    "window of one and sinks": (70, 70, 1, 5),
    "window beyond T": (70, 70, 500, 9),
    "window is T": (96, 96, 96, 3),
    "many sinks": (150, 150, 33, 90),
    "sinks beyond T": (70, 70, 5, 300),
    "queries are the last": (40, 140, 70, 10),
    "one query": (1, 130, 70, 10),
    "queries inside the window": (20, 100, 90, 30),
}


@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_within_budget(case, far):
    Tq, Tk, window, sinks = case
    check(operands(Tq, Tk, far=far), window, sinks)
