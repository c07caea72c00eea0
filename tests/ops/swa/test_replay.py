"""Replays of a backward: what is kept of a call, and when a call like it is worked out again."""

import types

import pytest
import torch
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from allmem_ops.ops.kernels import replay
from allmem_ops.ops.kernels.launcher import unchecked
from allmem_ops.ops.kernels.replay import Recorder, traits
from allmem_ops.ops.swa import launch_bwd
from allmem_ops.ops.swa.launch_bwd import swa_triton_backward
from tests.ops.kernels.launched import Kernel

CUDA = torch.cuda.is_available()
gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(replay, "_replays", {})


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(replay, "current_stream", lambda _: 77)
    monkeypatch.setattr(replay, "launch", lambda kernel, *_: kernel)


def described(x):
    return unchecked(TensorDescriptor, base=x, shape=x.shape, strides=x.stride(), block_shape=[4])


def filed(q, k, kernel, also=()):
    """A call with two inputs and an absent one, two results and two pieces of workspace."""
    record = Recorder((q, None, k))
    first, second = record.result((3,), torch.float32, CPU), record.result((0,), torch.float16, CPU)
    work = record.workspace(5, dtype=torch.float32, device=CPU)
    counters = record.workspace(2, dtype=torch.int32, device=CPU, zero=True)
    record.launch(kernel, None, CPU, 7, [described(k), None, work, counters, 5, 0.5], {})
    record.launch(kernel, None, CPU, 9, [*also, q, described(first), first, second, 8], {})
    record.file("key")


@pytest.mark.usefixtures("on_a_cpu")
def test_a_replay_launches_the_same_at_other_addresses():
    kernel = Kernel()
    filed(torch.empty(4), torch.empty(4), kernel)
    q, k = torch.empty(4), torch.empty(4)
    first, second = replay.replay("key", (q, None, k))
    assert (first.shape, first.dtype, second.shape, second.dtype) == ((3,), torch.float32, (0,), torch.float16)
    (grid, (of_k, absent, work, counters, *rest)), (other_grid, (at_q, of_first, *more)) = kernel.launched
    assert grid == (7, 1, 1) and other_grid == (9, 1, 1)
    assert absent is None and rest == [5, 0.5] and work % 16 == 0 and counters - work == 256
    assert at_q == q.data_ptr() and more == [first.data_ptr(), second.data_ptr(), 8]
    for x, tensor in ((of_k, k), (of_first, first)):
        assert isinstance(x, TensorDescriptor) and x.base.data_ptr() == tensor.data_ptr()
        assert (x.shape, x.strides, x.block_shape, x.padding) == (tensor.shape, tensor.stride(), [4], "zero")
    assert replay.replay("another key", (q, None, k)) is None


@pytest.mark.usefixtures("on_a_cpu")
def test_counters_are_zero_again(monkeypatch):
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **b: made.append(empty(*a, **b)) or made[-1].fill_(1))
    filed(empty(4), empty(4), Kernel())
    made.clear()
    replay.replay("key", (empty(4), None, empty(4)))
    assert made[2].dtype == torch.uint8 and made[2].sum() == made[2].numel() - 8 and not made[2][256:264].any()


@pytest.mark.usefixtures("on_a_cpu")
def test_what_can_not_be_done_again_is_not_kept():
    q, k = torch.empty(4), torch.empty(4)
    for first, second, kernel, also in (
        (q, q, Kernel(), ()),
        (q, k, None, ()),
        (q, k, Kernel(), (torch.empty(1),)),
        (q, k, Kernel(), (described(torch.empty(4)),)),
    ):
        filed(first, second, kernel, also)
        assert replay.replay("key", (q, None, k)) is None


@pytest.mark.usefixtures("on_a_cpu")
def test_inputs_that_are_not_aligned_and_hooks_of_launches_are_not_passed_over(monkeypatch):
    kernel, x = Kernel(), (torch.empty(4), None, torch.empty(4))
    filed(torch.empty(4), torch.empty(4), kernel)
    assert replay.replay("key", (torch.empty(5)[1:], None, x[2])) is None
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    assert replay.replay("key", x) is None and not kernel.launched
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [])
    assert replay.replay("key", x) is not None and len(kernel.launched) == 2


@pytest.mark.usefixtures("on_a_cpu")
def test_no_more_are_kept_than_set(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 3)
    for n in range(8):
        record = Recorder(())
        record.result((1,), torch.float32, CPU)
        record.file(n)
        assert len(replay._replays) <= 3 and n in replay._replays


def test_traits_tell_calls_apart():
    x = torch.empty(2, 4)
    different = [(x, None), (None, x), (x.T, None), (x.half(), None), (torch.empty(2, 5), None), (x, x), (x.expand(1, 2, 4), None)]
    keys = {traits(inputs, 3, 0.5) for inputs in different} | {traits(different[0], 4, 0.5), traits(different[0], 3, 0.25)}
    assert len(keys) == len(different) + 2
    assert traits((torch.empty(2, 4), None), 3, 0.5) in keys


class Bare:
    """A launcher in C, which has no closure."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args):
        self.calls.append(args)


class _Run:
    """What Triton 3.6 keeps beside a compiled kernel to launch it."""

    launch_cooperative_grid, launch_pdl, global_scratch_size, profile_scratch_size = False, True, 0, 0

    def __init__(self, launch):
        self.launch = launch

    def __call__(self, x, y, z, stream, function, *args):
        self.launch(x, y, z, stream, function, False, True, None, None, *args)


@pytest.mark.skipif(not replay._PLAIN, reason="only the launchers of Triton 3.6 are called past their Python")
@pytest.mark.usefixtures("on_a_cpu")
def test_plain_launches_give_the_driver_what_triton_would(monkeypatch):
    from triton.backends.nvidia import driver
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia import hopper

    utils = types.SimpleNamespace(
        fill_tma_descriptor=lambda *given: ("map", *(tuple(x) if isinstance(x, (list, tuple)) else x for x in given))
    )
    monkeypatch.setattr(driver.triton.runtime.driver, "_active", types.SimpleNamespace(utils=utils), raising=False)
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    q, k = torch.empty(1, 70, 2, 64), torch.empty(1, 70, 2, 64)
    of_k = unchecked(hopper.TensorDescriptor, base=k, shape=k.shape, strides=(8960, 128, 64, 1), block_shape=[1, 64, 1, 64], layout=layout)
    signature = dict(enumerate(["tensordesc<fp16>", "*fp16", "constexpr", "tensordesc<fp32>", "i32", "tensordesc<fp16>"]))
    given = [{"swizzle": n, "elem_size": 2, "elem_type": 6, "block_size": [1, 64, 1, 64], "fp4_padded": False} for n in (3, 2, 3)]
    launched = []
    compiled = types.SimpleNamespace(function=1, packed_metadata=2)
    compiled.run = _Run(driver.wrap_handle_tensordesc(lambda *args: launched.append(args), signature, given))
    bare = types.SimpleNamespace(function=3, packed_metadata=4, run=_Run(launched_bare := Bare()))
    assert replay._plain(compiled) and replay._plain(bare)
    record = Recorder((q, None, k))
    result = record.result((1, 70, 2, 64), torch.float32, CPU)
    of_result = unchecked(
        hopper.TensorDescriptor, base=result, shape=result.shape, strides=result.stride(), block_shape=[1, 64, 1, 64], layout=layout
    )
    args = [of_k, q, 64, of_result, 7, of_k]
    record.launch(compiled, None, CPU, 5, args, {})
    record.launch(bare, None, CPU, 6, [q, None, 9], {})
    record.file("key")
    other = torch.empty(1, 70, 2, 64), None, torch.empty(1, 70, 2, 64)
    (got,) = replay.replay("key", other)
    of_k.base, of_result.base = other[2], got
    compiled.run(5, 1, 1, 77, 1, 2, None, None, None, of_k, other[0].data_ptr(), 64, of_result, 7, of_k)
    assert launched[0] == launched[1] and len(launched[0]) > 40
    assert launched_bare.calls == [(6, 1, 1, 77, 3, False, True, None, None, 4, None, None, None, other[0].data_ptr(), None, 9)]


@gpu
@pytest.mark.parametrize("cuts", [None, [0, 100, 1500, 1500, 3000]], ids=str)
@pytest.mark.parametrize("sinks", [0, 70])
@pytest.mark.parametrize("D, dtype", [(128, torch.bfloat16), (64, torch.bfloat16), (80, torch.float16), (32, torch.float32)], ids=str)
def test_replayed_gradients_are_the_same_bits(D, dtype, sinks, cuts, monkeypatch):
    T = 3000
    q, do, o = (torch.randn(1, T, 4, D, device="cuda").to(dtype) for _ in range(3))
    k, v = (torch.randn(1, T, 2, D, device="cuda").to(dtype) for _ in range(2))
    lse, dlse = torch.full((1, T, 4), 9.0, device="cuda"), torch.randn(1, T, 4, device="cuda")
    cu = None if cuts is None else torch.tensor(cuts, dtype=torch.int32, device="cuda")
    tensors = [do, dlse, q, k, v, None, cu, o, lse]
    want = swa_triton_backward(*tensors, 300, sinks, 0.1)
    assert len(replay._replays) == 1
    monkeypatch.setattr(launch_bwd, "Call", None)  # nothing may be worked out again
    for _ in range(3):
        got = swa_triton_backward(*(None if x is None else x.clone() for x in tensors), 300, sinks, 0.1)
        assert all(map(torch.equal, got, want))
