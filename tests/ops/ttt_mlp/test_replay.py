"""Replays: what is kept of a call, and when a call like it is worked out again."""

import pytest
import torch
from triton import knobs

from allmem_ops import ttt_mlp
from allmem_ops.ops.ttt_mlp import replay
from allmem_ops.ops.ttt_mlp.replay import Call
from tests.ops.kernels.launched import Kernel
from tests.ops.ttt_mlp.cases import inputs

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(replay, "_replays", {})


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(replay, "current_stream", lambda _: 77)


def filed(q, k, kernel, also=()):
    """A call with two inputs and an absent one that makes two tensors and returns the second and nothing."""
    call = Call((), (q, None, k))
    work, counters = call.keep(torch.empty(3)), call.keep(torch.zeros(2, dtype=torch.int32), zero=True)
    call.note(kernel, 7, [k, None, work, counters, 5, None, 0.5])
    call.note(kernel, 9, [*also, q, k, 8])
    call.file("key", (counters, None))


@pytest.mark.usefixtures("on_a_cpu")
def test_a_replay_launches_the_same_at_other_addresses():
    kernel = Kernel()
    filed(torch.empty(4), torch.empty(4), kernel)
    q, k = torch.empty(4), torch.empty(4)
    counters, nothing = replay.replay("key", (q, None, k))
    assert nothing is None and counters.dtype == torch.int32 and counters.tolist() == [0, 0]
    (grid, (at_k, absent, work, at_counters, *rest)), second = kernel.launched
    assert grid == (7, 1, 1) and (at_k, absent, at_counters) == (k.data_ptr(), None, counters.data_ptr())
    assert rest == [5, None, 0.5] and isinstance(work, int)
    assert second == ((9, 1, 1), (q.data_ptr(), k.data_ptr(), 8))
    assert replay.replay("another key", (q, None, k)) is None


@pytest.mark.usefixtures("on_a_cpu")
def test_what_can_not_be_done_again_is_not_kept():
    q, k = torch.empty(4), torch.empty(4)
    for first, second, kernel, also in ((q, q, Kernel(), ()), (q, k, None, ()), (q, k, Kernel(), (torch.empty(1),))):
        filed(first, second, kernel, also)
        assert replay.replay("key", (q, None, k)) is None


@pytest.mark.usefixtures("on_a_cpu")
def test_hooks_of_launches_are_not_passed_over(monkeypatch):
    kernel, x = Kernel(), (torch.empty(4), None, torch.empty(4))
    filed(torch.empty(4), torch.empty(4), kernel)
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    assert replay.replay("key", x) is None and not kernel.launched
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [])
    assert replay.replay("key", x) is not None and len(kernel.launched) == 2


@pytest.mark.usefixtures("on_a_cpu")
def test_inputs_that_are_not_aligned_are_worked_out():
    kernel = Kernel()
    filed(torch.empty(4), torch.empty(4), kernel)
    assert replay.replay("key", (torch.empty(5)[1:], None, torch.empty(4))) is None and not kernel.launched


@pytest.mark.usefixtures("on_a_cpu")
def test_replays_are_forgotten_before_they_fill_memory(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 2)
    for _ in range(3):
        filed(torch.empty(4), torch.empty(4), Kernel())
        replay._replays[len(replay._replays)] = None
    assert len(replay._replays) <= 3


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.3, "norm": "post_write", "cu_seqlens": (0, 100, 700)}], ids=str)
def test_replayed_calls_give_the_same_bits_for_other_tensors(options):
    if "cu_seqlens" in options:
        options = options | {"cu_seqlens": torch.tensor(options["cu_seqlens"], device="cuda")}
    made = [inputs(batch=1, length=700, heads=3, d=64, h=128, dtype=torch.bfloat16, eta=0.01, seed=seed) for seed in range(3)]
    made = [{name: t.detach().cuda().requires_grad_() for name, t in x.items()} for x in made]

    def everything(x):
        o = ttt_mlp(**x, chunk_size=64, impl="triton", **options).o
        return o, *torch.autograd.grad(o, list(x.values()), torch.ones_like(o).cumsum(1))

    want = []
    for x in made:
        replay._replays.clear()
        want.append(everything(x))
    replay._replays.clear()
    for x, known in zip(made, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(everything(x), known, strict=True))
    assert len(replay._replays) == 2
