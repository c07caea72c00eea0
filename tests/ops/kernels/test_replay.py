"""Replays: what is kept of a call, and when a call like it is worked out again."""

import pytest
import torch
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from allmem_ops import gated_fusion, rotary, rotary_table
from allmem_ops.ops.kernels import replay
from allmem_ops.ops.kernels.launcher import unchecked
from allmem_ops.ops.kernels.replay import Recorder, traits

CUDA = torch.cuda.is_available()
CPU = torch.device("cpu")


class Kernel:
    """Stands for a compiled kernel: its launches' grids and arguments."""

    function, packed_metadata = 1, 2

    def __init__(self):
        self.launched = []

    def run(self, x, y, z, stream, function, packed, *hooks_and_args):
        assert (stream, function, packed, *hooks_and_args[:3]) == (77, 1, 2, None, None, None)
        self.launched.append(((x, y, z), hooks_and_args[3:]))


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(replay, "_replays", {})


@pytest.fixture
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(replay, "current_stream", lambda _: 77)
    monkeypatch.setattr(replay, "launch", lambda kernel, *_: kernel)


def described(x):
    return unchecked(TensorDescriptor, base=x, shape=x.shape, strides=x.stride(), block_shape=[4])


def filed(q, k, kernel, also=()):
    """A call with two inputs and an absent one, a result, and two pieces of work of which the second is zeros."""
    record = Recorder((q, None, k))
    result = record.result((3,), torch.float64, CPU)
    work = record.workspace(5, dtype=torch.float32, device=CPU)
    counters = record.workspace(2, dtype=torch.int32, device=CPU, zero=True)
    record.launch(kernel, None, CPU, 7, [k, None, work, counters, 5, None, 0.5], {})
    record.launch(kernel, None, CPU, 9, [described(q), 8, result, *also], {})
    record.file("key")


@pytest.mark.usefixtures("_on_a_cpu")
def test_a_replay_launches_the_same_at_other_addresses():
    kernel = Kernel()
    filed(torch.empty(4), torch.empty(4), kernel)
    q, k = torch.empty(4), torch.empty(4)
    (result,) = replay.replay("key", (q, None, k))
    assert result.dtype == torch.float64 and result.shape == (3,)
    (grid, (at_k, absent, work, counters, *rest)), (second, (described_q, eight, at_result)) = kernel.launched
    assert grid == (7, 1, 1) and (at_k, absent) == (k.data_ptr(), None) and rest == [5, None, 0.5]
    assert counters - work == 256
    assert second == (9, 1, 1) and (eight, at_result) == (8, result.data_ptr())
    assert described_q.base.data_ptr() == q.data_ptr() and described_q.block_shape == [4]
    assert replay.replay("another key", (q, None, k)) is None


@pytest.mark.usefixtures("_on_a_cpu")
def test_what_cannot_be_done_again_is_not_kept():
    x, y = torch.empty(4), torch.empty(4)
    filed(x, x, Kernel())  # one tensor as two inputs
    filed(x, y, Kernel(), also=[torch.empty(1)])  # a tensor that is no input, as a copy of one
    filed(x, y, None)  # a launch of which nothing is known
    assert replay._replays == {}


@pytest.mark.usefixtures("_on_a_cpu")
def test_inputs_that_are_not_aligned_and_listeners_are_left_to_the_launch_code():
    filed(torch.empty(4), torch.empty(4), Kernel())
    good, shifted = torch.empty(4), torch.empty(5)[1:]
    assert replay.replay("key", (good, None, shifted)) is None
    assert replay.replay("key", (good, None, torch.empty(4))) is not None

    def hook(*_):
        raise AssertionError("not to be called")

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert replay.replay("key", (good, None, torch.empty(4))) is None
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


@pytest.mark.usefixtures("_on_a_cpu")
def test_the_number_of_replays_is_bounded(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 2)
    filed(torch.empty(4), torch.empty(4), Kernel())
    replay._replays["another"] = replay._replays["key"]
    filed(torch.empty(4), torch.empty(4), Kernel())
    assert list(replay._replays) == ["key"]


def test_traits_are_all_but_addresses():
    x = torch.empty(2, 3)
    assert traits((x, None), 5) == traits((torch.ones(2, 3), None), 5)
    others = [(x.T,), (x, x), (torch.empty(3, 2), None), (x.double(), None), (None, x), (torch.empty(2, 3, device="meta"), None)]
    assert all(traits(other, 5) != traits((x, None), 5) for other in others)
    assert traits((x, None), 6) != traits((x, None), 5)


@pytest.mark.skipif(not CUDA, reason="nothing is replayed in the interpreter")
def test_calls_like_one_before_are_replayed_and_give_the_same():
    kinds = {"device": "cuda", "dtype": torch.bfloat16}

    def results(shift: float) -> list[torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator, **kinds) + shift).requires_grad_()

        attn, memory, alpha, gate, weight, qkv = draw(1, 70, 64), draw(1, 70, 2, 32), draw(64), draw(1, 70, 2), draw(32), draw(1, 70, 4, 32)
        table = rotary_table(torch.arange(70, device="cuda")[None], 10.0 ** -torch.arange(16, device="cuda"))
        outputs = gated_fusion(attn, memory, alpha, gate=gate, norm_weight=weight), *rotary(qkv, *table, heads=2, heads_kv=1)
        leaves = [attn, memory, alpha, gate, weight, qkv]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])]

    for shift in (0.0, 1.0):
        replay._replays.clear()
        want = results(shift)
        assert len(replay._replays) == 4
        again, between, last = results(shift), results(shift + 1), results(shift)
        for a, b, c in zip(want, again, last, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
        assert not torch.equal(want[0], between[0])
