"""The library operators: schema checks, torch.compile without recompiles, FLOP counts."""

import pytest
import torch
import torch.utils.checkpoint
from torch.utils.flop_counter import FlopCounterMode

from allmem_ops import WindowCache, swa, swa_step
from allmem_ops.ops.swa.geometry import visible_pairs
from tests.ops.swa.cases import assert_same, heads, inputs, results


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
def test_opcheck(packed, far):
    x = inputs(12, B=1 if packed else 2, far=far)
    cu_seqlens = torch.tensor([0, 5, 5, 12]) if packed else None
    args = (x["q"], x["k"], x["v"], x.get("q_sinks"), cu_seqlens, 4, 2, 0.3)
    torch.library.opcheck(torch.ops.allmem_ops.swa_chunk.default, args)
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    o, lse = torch.ops.allmem_ops.swa_chunk(*plain)
    torch.library.opcheck(torch.ops.allmem_ops.swa_chunk_bwd.default, (o * 2, lse * 0.5, *plain[:5], o, lse, *plain[5:]))


def test_opcheck_with_strided_views():
    q, k, v = (torch.randn(2, 12, 8, 4).requires_grad_()[:, :, a:b] for a, b in ((0, 4), (4, 6), (6, 8)))
    torch.library.opcheck(torch.ops.allmem_ops.swa_chunk.default, (q, k, v, None, None, 4, 2, 0.3))


@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_opcheck_of_the_step(far, sinks):
    q = torch.randn(2, 1, 4, 8)
    buffers = [torch.randn(2, n, 2, 8) for n in (sinks, sinks, 5, 5)]
    args = (q, torch.randn_like(q) if far else None, *buffers, torch.tensor([1, 9]), 0.3)
    torch.library.opcheck(torch.ops.allmem_ops.swa_step_chunk.default, args)


@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
def test_compiles_whole_and_does_not_recompile_for_other_lengths_windows_and_sinks(far):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, window, sinks: swa(**x, window=window, sinks=sinks, return_lse=True), fullgraph=True)

    def compare(T, window, sinks):
        x = inputs(T, B=2, far=far)
        o, lse = compiled(x, window, sinks)
        grads = torch.autograd.grad(o.sin().sum() + lse.sin().sum(), list(x.values()))
        want = swa(**x, window=window, sinks=sinks, return_lse=True)
        torch.testing.assert_close((o, lse), want)
        torch.testing.assert_close(grads, torch.autograd.grad(want[0].sin().sum() + want[1].sin().sum(), list(x.values())))

    compare(20, 8, 3)  # the first call is static in every size, the second makes sizes and ints symbols
    compare(33, 11, 5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T, window, sinks in ((64, 20, 2), (40, 5, 9), (111, 300, 7), (70, 64, 130)):
            compare(T, window, sinks)


def test_reference_compiles_whole():
    torch._dynamo.reset()
    x = inputs(20, far=True)
    compiled = torch.compile(lambda x: swa(**x, window=6, sinks=2, impl="reference"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), swa(**x, window=6, sinks=2))


def test_packed_call_compiles_whole():
    torch._dynamo.reset()
    x, cu_seqlens = inputs(30), torch.tensor([0, 11, 30])
    compiled = torch.compile(lambda x, cu: swa(**x, window=7, sinks=2, cu_seqlens=cu), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cu_seqlens), swa(**x, window=7, sinks=2, cu_seqlens=cu_seqlens))


def test_validation_raises_the_same_error_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: swa(q, k, v, window=3), backend="eager")
    x = inputs(5)
    with pytest.raises(Exception, match=r"`v` must have shape \[B, Tk, HK, D\] with Tk=5; got \[1, 4, 2, 8\]"):
        compiled(x["q"], x["k"], x["v"][:, 1:])


@pytest.mark.parametrize("Tq, Tk, window, sinks", [(20, 20, 6, 2), (7, 30, 9, 0), (1, 1, 1, 0)])
def test_flops_are_those_of_the_visible_pairs(Tq, Tk, window, sinks):
    x = inputs(Tq, Tk, B=2, HQ=4, HK=2, D=8)
    with FlopCounterMode(display=False) as forward:
        o = swa(**x, window=window, sinks=sinks)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    pairs = 2 * visible_pairs(Tq, Tk, window, sinks) * 4 * 8
    assert forward.get_total_flops() == 4 * pairs
    assert backward.get_total_flops() == 10 * pairs


def test_flops_of_packed_sequences():
    x = inputs(20)
    with FlopCounterMode(display=False) as counter:
        swa(**x, window=4, sinks=1, cu_seqlens=torch.tensor([0, 3, 3, 20]))
    assert counter.get_total_flops() == 4 * (visible_pairs(3, 3, 4, 1) + visible_pairs(17, 17, 4, 1)) * 4 * 8


def test_flops_of_a_step_are_those_of_all_slots():
    cache = WindowCache.empty(3, 2, 8, window=5, sinks=2, dtype=torch.float32, device="cpu")
    with FlopCounterMode(display=False) as counter:
        swa_step(torch.randn(3, 1, 4, 8), torch.randn(3, 1, 2, 8), torch.randn(3, 1, 2, 8), cache)
    assert counter.get_total_flops() == 4 * 3 * 4 * 8 * (5 + 2)


def test_window_beyond_T_costs_the_flops_of_the_dense_mask_halved():
    x = inputs(64, HQ=4, HK=4)
    with FlopCounterMode(display=False) as dense:
        swa(**x, window=64, impl="reference")
    with FlopCounterMode(display=False) as chunk:
        swa(**x, window=64)
    assert chunk.get_total_flops() == dense.get_total_flops() * 65 // 128


def test_a_checkpointed_call_gives_the_same_gradients():
    x = inputs(40, far=True)
    want = results(x, "chunk", window=7, sinks=3)

    def call(q, k, v, q_sinks):
        return swa(q, k, v, q_sinks=q_sinks, window=7, sinks=3, return_lse=True)

    assert_same(heads(*torch.utils.checkpoint.checkpoint(call, *x.values(), use_reentrant=False), x), want, 0.0)
