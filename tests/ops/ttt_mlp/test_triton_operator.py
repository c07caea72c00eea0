"""The library operator of the Triton forward, and the shorter way of eager calls: opcheck, torch.compile, FLOP counts, graph capture."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from allmem_ops import ttt_mlp
from allmem_ops.ops.ttt_mlp import registration
from allmem_ops.ops.ttt_mlp.reference import Options
from tests.ops.ttt_mlp.cases import LEARNT, TOKENS, WEIGHTS, assert_equal_to, gradients, inputs, outputs, some_state

launch = pytest.importorskip("allmem_ops.ops.ttt_mlp.launch")

GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _two_splits(monkeypatch):
    if not GPU:
        monkeypatch.setattr(launch, "splits", lambda *_: 2)


def made(device, length=9, batch=1, grad=False, **sizes):
    x = inputs(batch=batch, length=length, heads=1, d=16, h=32, dtype=torch.float32, grad=False, **sizes)
    return {name: t.to(device).requires_grad_(grad) for name, t in x.items()}


def arguments(x, state=None, cu_seqlens=None, chunk_size=4, norm="pre_write", grad_clip=None, keep=False, save=False):
    """The operator's arguments."""
    held = [None] * 11
    if state is not None:
        held = [getattr(state, name) for name in (*LEARNT, "g_gate", "g_up", "g_down", "mu_sum", "count")]
    return (*(x[name] for name in (*TOKENS, *WEIGHTS)), *held, cu_seqlens, chunk_size, norm, True, grad_clip, 1e-5, keep, save)


@pytest.mark.parametrize("case", ["plain", "packed", "state"])
def test_opcheck(device, case):
    x = made(device, length=7)
    options = {
        "plain": {},
        "packed": {"cu_seqlens": torch.tensor([0, 3, 7], device=device), "keep": True, "save": True, "norm": "post_write"},
        "state": {"keep": True, "save": True, "grad_clip": 0.1},
    }[case]
    if case == "state":
        options["state"] = some_state({name: t.cpu() for name, t in x.items()}, 1, 4, 3).detach().to(device)
    # gradients are the subject of the backward's own tests
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.allmem_ops.ttt_mlp_triton.default, arguments(x, **options), test_utils=utils)


def test_the_operator_and_the_direct_way_give_the_same(device, monkeypatch):
    x = made(device, length=7)
    direct = outputs(ttt_mlp(**x, chunk_size=4, impl="triton", output_final_state=True))
    monkeypatch.setattr(registration, "direct", lambda *_: False)
    assert_equal_to(outputs(ttt_mlp(**x, chunk_size=4, impl="triton", output_final_state=True)), direct, 0)


def test_gradients_of_the_operator_and_of_the_direct_way_are_the_same(device, monkeypatch):
    x = made(device, length=7, grad=True)
    direct = gradients(outputs(ttt_mlp(**x, chunk_size=4, impl="triton", output_final_state=True)), x)
    monkeypatch.setattr(registration, "direct", lambda *_: False)
    operator = gradients(outputs(ttt_mlp(**x, chunk_size=4, impl="triton", output_final_state=True)), x)
    assert_equal_to(operator, direct, 0)


def test_dispatch_modes_see_the_operator_and_its_flops(device):
    x = made(device, length=12)
    unit = 16 * 32

    def count(**options):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ttt_mlp(**x, chunk_size=4, impl="triton", **options)
        return counter.get_total_flops()

    # a full last chunk is written only into a final state
    assert count() == (12 * 6 + 8 * 12) * unit
    assert count(output_final_state=True) == 12 * 18 * unit
    ends = torch.tensor([0, 3, 12], device=device)
    assert count(cu_seqlens=ends) == (12 * 6 + 8 * 12) * unit


def test_compiles_whole_and_does_not_recompile_for_length_or_chunk_size(device):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    call = torch.compile(lambda x, c: ttt_mlp(**x, chunk_size=c, impl="triton").o, fullgraph=True, backend=count)
    for length, chunk_size in [(7, 4), (9, 5), (11, 3), (4, 6)]:
        x = made(device, length=length)
        with torch.no_grad():
            assert torch.equal(call(x, chunk_size), ttt_mlp(**x, chunk_size=chunk_size, impl="triton").o)
        assert len(graphs) <= 2  # as the first call had it, then with dynamic sizes


def test_nothing_is_saved_when_no_backward_can_follow(device):
    x = made(device, length=7)
    out = launch.ttt_mlp_triton_forward(
        *(x[name] for name in TOKENS), [x[name] for name in WEIGHTS], None, None, Options(4, "pre_write", True, None, 1e-5), False, False
    )
    assert all(t is None for t in (*out[1:11], *out[12:]))


def test_widths_that_the_kernels_do_not_take(device):
    x = inputs(length=5, dtype=torch.float32, grad=False)
    x = {name: t.to(device) for name, t in x.items()}
    with pytest.raises(ValueError, match="`q` must have d and h that the kernels take"):
        ttt_mlp(**x, chunk_size=4, impl="triton")
    assert torch.equal(ttt_mlp(**x, chunk_size=4).o, ttt_mlp(**x, chunk_size=4, impl="chunk").o)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("chunk_size", [64, 7])
def test_a_cuda_graph_replays_it(device, chunk_size):
    x = {name: t.to(device) for name, t in inputs(batch=2, length=500, heads=4, d=64, h=128, dtype=torch.bfloat16, grad=False).items()}
    ttt_mlp(**x, chunk_size=chunk_size, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = ttt_mlp(**x, chunk_size=chunk_size, impl="triton").o
    for name in TOKENS:
        x[name].copy_(x[name].flip(1))
    graph.replay()
    assert torch.equal(o, ttt_mlp(**x, chunk_size=chunk_size, impl="triton").o)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_the_host_does_not_wait(device):
    x = made(device, length=100)
    ends = torch.tensor([0, 30, 100], device=device)
    ttt_mlp(**x, chunk_size=16, cu_seqlens=ends, impl="triton", output_final_state=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        state = ttt_mlp(**x, chunk_size=16, cu_seqlens=ends, impl="triton", output_final_state=True).state
        ttt_mlp(**x, chunk_size=16, cu_seqlens=ends, impl="triton", initial_state=state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_offsets_above_two_to_the_31(device):
    """Token strides of 2**25 elements: the last tokens begin beyond 2**31."""
    x = {name: t.to(device) for name, t in inputs(batch=1, length=70, heads=1, d=64, h=64, dtype=torch.bfloat16, grad=False).items()}
    want = ttt_mlp(**x, chunk_size=20, impl="triton").o
    room = torch.empty(70 * 2**25 + 64, dtype=torch.bfloat16, device=device)
    far = room.as_strided((1, 70, 1, 64), (0, 2**25, 0, 1)).copy_(x["k"])
    assert torch.equal(ttt_mlp(**(x | {"k": far, "v": x["v"]}), chunk_size=20, impl="triton").o, want)
