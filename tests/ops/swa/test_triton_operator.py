"""The kernels of `swa` as library operators: opcheck, torch.compile, recompilation, CUDA graphs, checkpointing, a second gradient."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from allmem_ops import swa
from allmem_ops.ops.kernels import launcher
from allmem_ops.ops.kernels.configs import Config
from allmem_ops.ops.swa import launch, launch_hopper
from allmem_ops.ops.swa.geometry import visible_pairs

CUDA = torch.cuda.is_available()
DTYPE = torch.float16 if CUDA else torch.float32  # one dtype, so that the tests share compiled kernels
gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    if not CUDA:
        config = Config({"BM": 32, "BN": 16, "BG": 1, "TMA": 0}, 4, 2)
        monkeypatch.setattr(launch, "TABLE", {key: [config] for key in launch.TABLE})


def make(T, device, *, B=1, HQ=2, HK=1, D=16, dtype=DTYPE, far=False):
    shapes = {"q": (B, T, HQ, D), "k": (B, T, HK, D), "v": (B, T, HK, D)} | ({"q_sinks": (B, T, HQ, D)} if far else {})
    return {name: torch.randn(shape, device=device).to(dtype).requires_grad_() for name, shape in shapes.items()}


def call(x, window, sinks, cu_seqlens=None):
    return swa(**x, window=window, sinks=sinks, cu_seqlens=cu_seqlens, return_lse=True, impl="triton")


def gradients(outputs, x, **options):
    """Of every input, through o and lse, both with uneven gradients."""
    weights = [torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, list(x.values()), weights, **options)


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
def test_opcheck(packed, far, device):
    x = make(20, device, far=far)
    cu_seqlens = torch.tensor([0, 5, 5, 20], device=device) if packed else None
    args = (x["q"], x["k"], x["v"], x.get("q_sinks"), cu_seqlens, 4, 2, 0.3)
    torch.library.opcheck(torch.ops.allmem_ops.swa_triton.default, args)
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    o, lse = torch.ops.allmem_ops.swa_triton(*plain)
    torch.library.opcheck(torch.ops.allmem_ops.swa_triton_bwd.default, (o * 2, lse * 0.5, *plain[:5], o, lse, *plain[5:]))


@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
def test_compiles_whole_and_does_not_recompile_for_other_lengths_windows_and_sinks(far, device):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="inductor" if CUDA and not far else "aot_eager")

    def compare(T, window, sinks):
        x = make(T, device, far=far)
        got, want = compiled(x, window, sinks), call(x, window, sinks)
        assert_equal(got, want)
        assert_equal(gradients(got, x), gradients(want, x))

    compare(20, 8, 3)  # the first call is static in every size, the second makes sizes and ints symbols
    compare(33, 11, 5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T, window, sinks in ((48, 20, 2), (40, 5, 9), (17, 300, 7)):
            compare(T, window, sinks)


@gpu
@pytest.mark.parametrize("D", [32, 64])
def test_one_compiled_kernel_serves_every_length_window_and_number_of_sinks(D, device):
    kernels = launch.swa_fwd_kernel, launch_hopper.swa_fwd_hopper_kernel

    def compiled():
        return len(launcher._compiled), *(sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels)

    for T, window, sinks in ((100, 7, 3), (1, 1, 0), (16, 16, 16), (64, 32, 1), (1024, 512, 128), (4097, 2**40, 2**40)):
        call(make(T, device, D=D), window, sinks)
        if T == 100:
            before = compiled()
    assert compiled() == before


def test_a_checkpointed_call_gives_the_same_gradients(device):
    x = make(40, device, far=True)
    want = gradients(call(x, 7, 3), x)

    def block(q, k, v, q_sinks):
        return call({"q": q, "k": k, "v": v, "q_sinks": q_sinks}, 7, 3)

    for reentrant in (False, True):
        assert_equal(gradients_of(lambda r=reentrant: checkpoint(block, *x.values(), use_reentrant=r), x), want)


def gradients_of(function, x):
    """By `.backward`, which reentrant checkpointing needs."""
    for t in x.values():
        t.grad = None
    outputs = function()
    weights = [torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, weights)
    return [t.grad for t in x.values()]


def test_a_second_gradient_of_one_graph_is_the_first(device):
    x = make(40, device, far=True)
    saved = {name: t.detach().clone() for name, t in x.items()}
    outputs = call(x, 7, 3)
    first = gradients(outputs, x, retain_graph=True)
    kept = [g.clone() for g in first]
    second = gradients(outputs, x)
    assert_equal(second, kept)
    assert_equal(first, kept)
    assert_equal(x.values(), saved.values())


def test_an_expanded_gradient_is_read_by_its_strides(device):
    x = make(40, device)
    o, lse = call(x, 7, 3)
    summed = torch.autograd.grad(o.sum() + lse.sum(), list(x.values()), retain_graph=True)
    assert_equal(summed, torch.autograd.grad((o, lse), list(x.values()), (torch.ones_like(o), torch.ones_like(lse))))


def test_flops_are_those_of_the_visible_pairs(device):
    x = make(40, device)
    with FlopCounterMode(display=False) as forward:
        o, _ = call(x, 7, 3)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    products = visible_pairs(40, 40, 7, 3) * 2 * 16
    assert forward.get_total_flops() == 4 * products
    assert backward.get_total_flops() == 10 * products


def test_auto_takes_the_kernels_on_a_gpu(device, monkeypatch):
    called = []
    original = launch.swa_triton_forward
    monkeypatch.setattr(launch, "swa_triton_forward", lambda *a: called.append("forward") or original(*a))
    x = make(20, device)
    swa(**x, window=4)
    assert called == (["forward"] if CUDA else [])
    swa(**{n: t.double() for n, t in x.items()}, window=4)  # no kernel for float64, nor for a head dim above 256
    swa(**make(3, device, D=272), window=4)
    assert len(called) == CUDA


@gpu
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_forward_and_backward_in_a_cuda_graph(packed, device):
    x = make(700, device, HQ=4, HK=2, D=64, dtype=torch.bfloat16, far=True)
    cu_seqlens = torch.tensor([0, 100, 100, 700], device=device) if packed else None

    def both():
        outputs = call(x, 128, 20, cu_seqlens)
        return *outputs, *gradients(outputs, x)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        for t in x.values():
            t.copy_(torch.randn_like(t))
        if packed:
            cu_seqlens.copy_(torch.tensor([0, 1, 350, 700], device=device))
    graph.replay()
    assert_equal(captured, both())


@gpu
def test_nothing_waits_for_the_device(device):
    x = make(700, device, D=64, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 100, 700], device=device)
    gradients(call(x, 128, 20, cu_seqlens), x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(call(x, 128, 20, cu_seqlens), x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("sinks", [0, 100])
@pytest.mark.parametrize("D", [64, 96, 128])
def test_peak_memory_is_bounded(D, sinks, device):
    """Above the inputs: outputs, gradients, lse, delta, and one copy of dq in float32. Far sinks: a workspace that T does not change."""
    T, HQ, HK = 8192, 8, 4
    x = make(T, device, HQ=HQ, HK=HK, D=D, dtype=torch.bfloat16)
    do = torch.randn_like(x["q"])

    def both():
        return torch.autograd.grad(swa(**x, window=1024, sinks=sinks, impl="triton"), list(x.values()), do)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    rows = T * HQ
    output = gradient = rows * D * 2
    keys = 2 * T * HK * D * 2
    # lse as it is returned, as the backward kernels read it, its gradient's zeros, and delta.
    allowed = output + gradient + keys + rows * D * 4 + 4 * (rows * 4)
    if sinks:
        allowed += 2 * torch.cuda.get_device_properties(device).multi_processor_count * 2 * 128 * D * 4
    assert torch.cuda.max_memory_allocated() - before <= allowed + 2**20
