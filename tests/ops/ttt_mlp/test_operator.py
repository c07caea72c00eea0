"""The library operators: opcheck, torch.compile, FLOP counts, the plan of chunks, peak memory."""

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from allmem_ops import MemoryState, ttt_mlp, ttt_mlp_step
from allmem_ops.ops.ttt_mlp import api, layout, registration
from tests.ops.ttt_mlp.cases import NORMS, TOKENS, WEIGHTS, assert_equal_to, everything, gradients, inputs, outputs, some_state


def arguments(operator, call):
    """What `call` hands to the operator."""
    with mock.patch.object(api, operator, side_effect=getattr(api, operator)) as seen:
        call()
    return seen.call_args.args


@pytest.mark.parametrize("case", ["plain", "clip", "packed", "state", "frozen"])
def test_opcheck_of_the_chunk_operator(case):
    x = inputs(batch=1 if case == "packed" else 2, length=9, grad=case != "frozen")
    options = {
        "plain": {},
        "clip": {"grad_clip": 0.1, "norm": "post_write"},
        "packed": {"cu_seqlens": torch.tensor([0, 4, 9]), "output_final_state": True},
        "state": {"initial_state": some_state(x, 2, 4, [1, 3]), "output_final_state": True},
        "frozen": {},
    }[case]
    args = arguments("ttt_mlp_chunk", lambda: ttt_mlp(**x, chunk_size=4, **options))
    args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    torch.library.opcheck(torch.ops.allmem_ops.ttt_mlp_chunk.default, tuple(args))


def test_opcheck_of_the_backward_operator():
    x = inputs(length=9)
    with mock.patch.object(registration, "ttt_mlp_chunk_bwd", side_effect=registration.ttt_mlp_chunk_bwd) as seen:
        ttt_mlp(**x, chunk_size=4, grad_clip=0.1).o.sum().backward()
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in seen.call_args.args]
    torch.library.opcheck(torch.ops.allmem_ops.ttt_mlp_chunk_bwd.default, tuple(args))


def test_opcheck_of_the_step_operator():
    x = inputs(length=3, grad=False)
    state = some_state(x, 2, 4, [1, 3], grad_clip=0.1).detach()
    args = arguments("ttt_mlp_step_chunk", lambda: ttt_mlp_step(*(x[name] for name in TOKENS), state))
    torch.library.opcheck(torch.ops.allmem_ops.ttt_mlp_step_chunk.default, args)


def test_compiles_whole_and_does_not_recompile_for_length_or_chunk_size():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def call(x, chunk_size, state):
        out = ttt_mlp(**x, chunk_size=chunk_size, initial_state=state, output_final_state=True)
        return out.o, out.state

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=count)
    for length, chunk_size in [(9, 4), (13, 5), (21, 7), (40, 3), (8, 30)]:
        x = inputs(length=length, dtype=torch.float32)
        o, state = compiled(x, chunk_size, None)
        want = ttt_mlp(**x, chunk_size=chunk_size, output_final_state=True)
        assert torch.equal(o, want.o) and state.options() == want.state.options()
        assert_equal_to(state.tensors(), want.state.tensors(), 0)
        assert len(graphs) <= 2  # as the first call had it, then with dynamic sizes
    state = some_state(x, 2, 30, 3)
    torch.testing.assert_close(compiled(x, 30, state)[0], ttt_mlp(**x, chunk_size=30, initial_state=state).o, rtol=0, atol=0)


def test_compiled_gradients_are_the_same():
    torch._dynamo.reset()
    x = inputs(length=11)
    call = torch.compile(lambda x: ttt_mlp(**x, chunk_size=4, output_final_state=True), fullgraph=True, backend="aot_eager")
    got, want = outputs(call(x)), outputs(ttt_mlp(**x, chunk_size=4, output_final_state=True))
    assert_equal_to(got | gradients(got, x), want | gradients(want, x), 1e-14)


def test_the_step_compiles_whole_and_changes_the_state():
    torch._dynamo.reset()
    x = inputs(length=7, grad=False)
    one, two = (MemoryState.initial(*(x[name] for name in WEIGHTS), batch=2, chunk_size=3) for _ in range(2))
    step = torch.compile(ttt_mlp_step, fullgraph=True, backend="aot_eager")
    for t in range(7):
        token = [x[name][:, t : t + 1] for name in TOKENS]
        assert torch.equal(step(*token, one), ttt_mlp_step(*token, two))
    assert_equal_to(one.tensors(), two.tensors(), 0)


@pytest.mark.parametrize("norm", NORMS)
def test_flops_counted_are_those_of_the_reference(norm):
    x = inputs(batch=2, length=12, heads=2, d=4, h=6)
    token = 2 * 2 * 4 * 6  # B * H * d * h
    counted = []
    for impl in ("reference", "chunk"):
        with FlopCounterMode(display=False) as forward:
            o = ttt_mlp(**x, chunk_size=4, norm=norm, impl=impl).o
        counted.append(forward.get_total_flops())
    assert counted == [12 * 18 * token] * 2 == [registration.forward_flops(24, 24, 2, 4, 6)] * 2
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    assert backward.get_total_flops() == 12 * 46 * token == registration.backward_flops(24, 24, 2, 4, 6)


def test_flops_of_partial_chunks_states_packed_sequences_and_steps():
    x = inputs(batch=1, length=11, heads=1, d=4, h=6, grad=False)
    unit = 4 * 6

    def count(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    assert count(lambda: ttt_mlp(**x, chunk_size=4)) == (11 * 6 + 8 * 12) * unit
    assert count(lambda: ttt_mlp(**x, chunk_size=4, output_final_state=True)) == 11 * 18 * unit
    assert count(lambda: ttt_mlp(**x, chunk_size=4, cu_seqlens=torch.tensor([0, 3, 11]))) == (11 * 6 + 8 * 12) * unit
    state = some_state(x, 1, 4, 3).detach()
    assert count(lambda: ttt_mlp(**x, chunk_size=4, initial_state=state)) == (11 * 6 + 9 * 12) * unit
    assert count(lambda: ttt_mlp_step(*(x[name] for name in TOKENS), state)) == 11 * 18 * unit


@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_the_plan_covers_every_token_once_and_fits_its_slots(chunk_size):
    for length in range(20):
        for count in range(chunk_size):
            for group in (1, 2, 5):
                groups, rest = layout.plan(length, count, chunk_size, group)
                covered = [t for g in [*groups, rest] for t in range(g.start, g.stop)]
                assert covered == list(range(length))
                chunks = sum(g.chunks for g in groups)
                assert chunks == (count + length) // chunk_size and rest.size == ((count + length) % chunk_size if chunks else length)
                most, most_groups = layout.slots(length, 1, chunk_size, count > 0, group)
                assert chunks <= most and len(groups) <= most_groups


def test_packed_plans_fit_their_slots():
    for ends, counts in [([0, 0, 9, 10, 23], [2, 0, 3, 3]), ([0, 1, 2, 3], [3, 3, 3])]:
        for group in (1, 3):
            found = layout.batches(1, ends[-1], torch.tensor(counts), torch.tensor(ends), 4, 1, group)
            chunks, groups = layout.slots(ends[-1], len(counts), 4, True, group)
            assert found[-1].first_chunk + found[-1].chunks <= chunks
            assert found[-1].first_group + len(found[-1].groups) <= groups


def test_a_plan_of_bad_offsets_or_counters_is_refused():
    # Reached where the arguments' own check did not read values: under torch.compile, or on a GPU.
    for ends in ([1, 8], [0, 9], [0, 5, 4, 8]):
        with pytest.raises(ValueError, match="`cu_seqlens` must rise from 0 to T=8"):
            layout.batches(1, 8, None, torch.tensor(ends), 4, 1, 2)
    for count in (-1, 4):
        with pytest.raises(ValueError, match=r"`initial_state\.count` must lie in \[0, 4\)"):
            layout.batches(1, 8, torch.tensor([count]), None, 4, 1, 2)


def test_rows_at_one_counter_run_side_by_side():
    assert len(layout.batches(3, 8, torch.tensor([2, 2, 2]), None, 4, 3, 2)) == 1
    assert [b.rows for b in layout.batches(3, 8, None, None, 4, 2, 2)] == [slice(0, 2), slice(2, 3)]
    assert [b.count for b in layout.batches(3, 8, torch.tensor([2, 0, 2]), None, 4, 3, 2)] == [2, 0, 2]
    assert layout.side_by_side(8, 3, 128, 64, 512, "cpu") == (3, 1)
    assert layout.side_by_side(8, 3, 128, 64, 256, "cuda") == (8, 12)
    assert layout.side_by_side(1, 16, 512, 128, 2048, "cpu") == (1, 1)


def test_nothing_is_saved_when_no_backward_can_follow():
    x = inputs(length=12)
    with torch.no_grad():
        kept = arguments("ttt_mlp_chunk", lambda: ttt_mlp(**x, chunk_size=4))
    assert kept[-1] is False
    assert all(t.numel() == 0 for t in torch.ops.allmem_ops.ttt_mlp_chunk(*kept)[3:])


def test_only_wanted_inputs_get_gradients():
    x = inputs(length=12, grad=False)
    want = everything(inputs(length=12), "chunk", chunk_size=4, only_o=True)
    for name in x:
        leaf = x[name].clone().requires_grad_()
        (found,) = torch.autograd.grad(everything_o(x | {name: leaf}), leaf)
        torch.testing.assert_close(found, want[f"gradient of {name}"], rtol=1e-12, atol=1e-14)


def everything_o(x):
    o = ttt_mlp(**x, chunk_size=4).o
    g = torch.Generator().manual_seed(9)
    return (o * torch.randn(o.shape, generator=g, dtype=torch.float64)).sum()


_PEAK = """
import resource, torch
from allmem_ops import ttt_mlp

def run(length, H=3, d=64, h=128):
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, length, H, d), dim=-1) for _ in range(3))
    weights = torch.randn(H, h, d) / 8, torch.randn(H, h, d) / 8, torch.randn(H, d, h) / 11
    x = [t.requires_grad_() for t in (q, k, v, *weights, 0.01 * torch.rand(1, length, H, 3), torch.rand(1, length, H))]
    pages = int(open("/proc/self/statm").read().split()[1])
    o = ttt_mlp(*x, chunk_size=512).o
    grads = torch.autograd.grad(o, x, torch.ones(1).expand(o.shape))
    return pages * resource.getpagesize() + sum(4 * t.numel() for t in (o, *grads))

run(1024)
held = run(65536)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm; ru_maxrss has other units elsewhere")
def test_peak_memory_at_65536_tokens_is_the_stored_states_and_64_mb():
    extra = int(subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True).stdout)
    chunks, group = 128, layout.side_by_side(1, 3, 128, 64, 512, "cpu")[1]
    stored = 4 * 3 * 3 * 64 * 128 * (chunks + -(-chunks // group))
    assert stored <= extra + 2**23 and extra <= stored + 64e6, (extra, stored)
