"""The Triton backward of `ttt_mlp`: every gradient against the fp64 reference, and the properties that its kernels promise."""

from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allmem_ops import ttt_mlp
from allmem_ops.ops.ttt_mlp import launch_bwd, replay
from allmem_ops.testing import assert_within_budget
from benchmarks.gpu.ttt_mlp import allowed_bytes
from tests.ops.ttt_mlp import test_faults as faults
from tests.ops.ttt_mlp.cases import LEARNT, TOKENS, WEIGHTS, everything, inputs, largest_difference, some_state

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
OPTIONS = [{}, {"norm": "post_write", "grad_clip": 0.3}, {"norm": "none", "residual": False}]
# On a GPU every pair of these compiles eight kernels: there each option and each dtype once.
PAIRS = list(zip(DTYPES, OPTIONS, strict=True)) if CUDA else [(dtype, options) for dtype in DTYPES for options in OPTIONS]
# in the interpreter an operation on a tile costs a millisecond
SMALL = {"batch": 1, "heads": 1, "length": 9, "d": 16, "h": 16}


def on(device, x):
    return {name: t.detach().to(device).requires_grad_() for name, t in x.items()}


def exactly(x):
    return {name: t.detach().double().requires_grad_() for name, t in x.items()}


def state_on(state, device, double=False):
    if state is None:
        return None
    state = state.to(device)
    if double:
        found = {f.name: getattr(state, f.name) for f in fields(state) if f.init}
        exact = {name: t.detach().double() for name, t in found.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
        state = replace(state, **exact, dtype="float64")
    for name in LEARNT:
        setattr(state, name, getattr(state, name).detach().requires_grad_())
    return state


@pytest.fixture
def in_splits(monkeypatch):
    """Let every chunk's tokens be split in so many parts; the interpreter's device has room for one."""
    monkeypatch.setattr(replay, "_replays", {})
    return lambda parts: (monkeypatch.setattr(launch_bwd, "splits", lambda *_: parts), replay._replays.clear())


def compare(device, dtype, shape, *, state=None, only_o=False, cu=None, **options):
    """Values and gradients of kernels and of the reference at the same precision, both against the fp64 reference."""
    x = inputs(dtype=dtype, **shape)
    cu = None if cu is None else torch.tensor(cu)
    options |= {"cu_seqlens": cu}
    exact = everything(exactly(x), "reference", state_on(state, "cpu", double=True), only_o, **options)
    low = everything(x, "reference", state, only_o, **options)
    options |= {"cu_seqlens": None if cu is None else cu.to(device)}
    got = everything(on(device, x), "triton", state_on(state, device), only_o, **options)
    for name, t in got.items():
        if name.startswith("gradient"):
            assert_within_budget(name, t, low[name], exact[name])


# ---- against the reference


@pytest.mark.parametrize(("dtype", "options"), PAIRS, ids=str)
def test_gradients_are_within_the_budget(dtype, options, device):
    compare(device, dtype, SMALL, chunk_size=4, **options)


@pytest.mark.parametrize("options", [{"grad_clip": 0.3}, {"norm": "post_write"}], ids=str)
@pytest.mark.parametrize("count", [0, 3])
def test_gradients_of_an_initial_state(options, count, device, in_splits):
    in_splits(2)
    x = inputs(dtype=torch.float32, **SMALL)
    state = some_state(x, 1, 5, count, **options)
    compare(device, torch.float32, SMALL, state=state, chunk_size=5, **options)


@pytest.mark.parametrize("length", [1, 3, 4, 5])
def test_lengths_around_a_chunk(length, device):
    # from o alone; a full last chunk and its gradient through the final state: test_gradients_are_within_the_budget
    compare(device, torch.float32, SMALL | {"length": length}, only_o=True, chunk_size=4)


@pytest.mark.parametrize("chunks", [1, 8, 64, 128] if CUDA else [1, 5])
def test_errors_do_not_grow_with_the_number_of_chunks(chunks, device):
    # within the budget of the reference at that precision, whatever the number
    shape = {"batch": 1, "heads": 2, "length": 16 * chunks + 3, "d": 64, "h": 128} if CUDA else SMALL | {"length": 4 * chunks + 3}
    compare(device, DTYPES[-1], shape, only_o=True, chunk_size=16 if CUDA else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if CUDA else [torch.float32])
def test_nan_of_a_packed_neighbour_reaches_no_gradient(dtype, device):
    x = on(device, inputs(dtype=dtype, **SMALL | {"length": 13, "d": 64 if CUDA else 16, "h": 128 if CUDA else 16}))
    ends = torch.tensor([0, 6, 13], device=device)

    def found(x):
        o = ttt_mlp(**x, chunk_size=4, cu_seqlens=ends, impl="triton").o[:, :6]
        return [o, *(t[:, :6] for t in torch.autograd.grad(o.square().sum(), [x[name] for name in TOKENS]))]

    poisoned = {name: t.detach().clone() for name, t in x.items()}
    for name in TOKENS:
        poisoned[name][:, 6:] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(found(on(device, poisoned)), found(x), strict=True))


@pytest.mark.skipif(CUDA, reason="each width compiles; widths for a GPU: test_widths")
@settings(max_examples=3)
@given(
    length=st.integers(1, 12), chunk_size=st.integers(1, 9), batch=st.integers(1, 2), h=st.sampled_from([16, 32, 48]),
    norm=st.sampled_from(["pre_write", "post_write", "none"]), clip=st.sampled_from([None, 0.2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(length, chunk_size, batch, h, norm, clip, seed):
    shape = {"batch": batch, "heads": 1, "length": length, "d": 16, "h": h, "seed": seed}
    device = torch.device("cuda" if CUDA else "cpu")
    compare(device, torch.float32, shape, chunk_size=max(chunk_size, 3), norm=norm, grad_clip=clip)


@pytest.mark.skipif(not CUDA, reason="sizes for a GPU")
@pytest.mark.parametrize(("d", "h"), [(64, 128), (96, 80), (128, 256)])
def test_widths(d, h, device):
    compare(device, torch.bfloat16, {"batch": 2, "heads": 3, "length": 1111, "d": d, "h": h, "eta": 0.01}, chunk_size=129)


# ---- faults: what the comparison above would let through is found here

X = {name: t.detach().float().requires_grad_() for name, t in inputs(batch=1, heads=1, length=9, d=16, h=16, eta=0.5).items()}
_found = {}


def of_kernels(device, **options):
    key = str(options)
    if key not in _found:
        _found[key] = {name: t.cpu() for name, t in everything(on(device, X), "triton", **options).items()}
    return _found[key]


@pytest.mark.parametrize("fault", faults.BACKWARD)
def test_the_kernels_do_not_have_a_known_fault(fault, device, monkeypatch):
    """The kernels agree with the chunk path and not with what it gives with the fault."""
    module, name, stand_in, options = faults.BACKWARD[fault]
    options = {"chunk_size": 4} | options
    got = of_kernels(device, **options)
    x = exactly(X)
    rows = torch.cat([x[w].detach().norm(dim=-1) for w in WEIGHTS], -1)
    monkeypatch.setattr(faults, "ROW_NORMS", rows)
    assert largest_difference(got, everything(x, "chunk", **options))[0] < 2e-5
    monkeypatch.setattr(module, name, stand_in)
    error, where = largest_difference(got, everything(x, "chunk", **options))
    assert error > 5e-4 and where.startswith("gradient"), (error, where)


def _rates_swapped(a):
    a["eta"] = a["eta"][..., [0, 2, 1]]


def _scaled(name, by):
    def fault(a):
        a["saved"] = a["saved"]._replace(**{name: by * getattr(a["saved"], name)})

    return fault


def _shifted(a):
    x = a["saved"].x.clone()
    x[1:] = a["saved"].x[:-1]
    a["saved"] = a["saved"]._replace(x=x)


def _without_end(a):
    a["d_end"] = [None] * 6


INPUT_FAULTS = {
    "rates of up and down swapped": (_rates_swapped, {}),
    "mu of another chunk": (_scaled("mu_mean", 0.9), {}),
    "row norms with eps inside": (_scaled("size", 1.01), {}),
    "N of other weights": (_scaled("n", 1.01), {}),
    "weights of the chunk before": (_shifted, {}),
    "clip that never holds": (_scaled("g_size", 0.0), {"grad_clip": 0.3}),
    "final state's gradients dropped": (_without_end, {}),
}


@pytest.mark.parametrize("fault", INPUT_FAULTS)
def test_a_fault_in_what_the_backward_is_given_is_found(fault, device, monkeypatch):
    change, options = INPUT_FAULTS[fault]
    options = {"chunk_size": 4} | options
    want = of_kernels(device, **options)
    whole = launch_bwd.ttt_mlp_triton_backward
    names = "do", "d_end", "q", "k", "v", "eta", "mu", "weights", "state", "cu_seqlens", "saved", "options", "keep"

    def faulty(*args):
        a = dict(zip(names, args, strict=True))
        change(a)
        return whole(*a.values())

    monkeypatch.setattr(launch_bwd, "ttt_mlp_triton_backward", faulty)
    got = {name: t.cpu() for name, t in everything(on(device, X), "triton", **options).items()}
    error, where = largest_difference(got, want)
    assert error > 1e-3 and where.startswith("gradient"), (error, where)


# ---- properties


def test_two_backward_passes_are_bitwise_equal(device, in_splits):
    in_splits(4)
    x = on(device, inputs(dtype=torch.float16, **SMALL))
    o = ttt_mlp(**x, chunk_size=4, grad_clip=0.3, impl="triton").o
    first, second = (torch.autograd.grad(o, list(x.values()), torch.ones_like(o), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("parts", [2, 4])
def test_splits_of_a_chunk_change_rounding_alone(parts, device, in_splits):
    shape = SMALL | {"length": 50, "h": 32}
    x = on(device, inputs(dtype=torch.float32, **shape))
    in_splits(1)
    want = everything(x, "triton", chunk_size=40)
    in_splits(parts)
    error, where = largest_difference(everything(x, "triton", chunk_size=40), want)
    assert error < 2e-6, (error, where)


def test_packed_equals_separate(device):
    cu = [0, 5, 5, 6, 13]
    x = on(device, inputs(dtype=torch.float32, **SMALL | {"length": 13}))
    do = torch.randn(x["q"].shape).to(device)

    def grads(y, do, **kw):
        return torch.autograd.grad(ttt_mlp(**y, chunk_size=4, impl="triton", **kw).o, list(y.values()), do)

    packed = grads(x, do, cu_seqlens=torch.tensor(cu, device=device))
    weights = [torch.zeros_like(x[name]) for name in WEIGHTS]
    for a, b in pairwise(cu):
        if a == b:
            continue
        y = {name: (t[:, a:b] if name in TOKENS else t).detach().requires_grad_() for name, t in x.items()}
        alone = dict(zip(y, grads(y, do[:, a:b]), strict=True))
        for name, got in zip(x, packed, strict=True):
            if name in TOKENS:
                torch.testing.assert_close(got[:, a:b], alone[name], rtol=1e-5, atol=1e-6)
        weights = [s + alone[name] for s, name in zip(weights, WEIGHTS, strict=True)]
    for name, got in zip(x, packed, strict=True):
        if name in WEIGHTS:
            torch.testing.assert_close(got, weights[WEIGHTS.index(name)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["pre_write", "post_write"])
def test_a_cut_at_a_chunks_edge_gives_the_gradients_of_one_pass(norm, device):
    x = on(device, inputs(dtype=torch.float32, **SMALL))
    do = torch.randn(x["q"].shape).to(device)
    options = {"chunk_size": 4, "norm": norm, "impl": "triton"}
    want = torch.autograd.grad(ttt_mlp(**x, **options).o, list(x.values()), do)
    parts = [x | {name: x[name][:, cut] for name in TOKENS} for cut in (slice(0, 4), slice(4, None))]
    head = ttt_mlp(**parts[0], **options, output_final_state=True)
    tail = ttt_mlp(**parts[1], **options, initial_state=head.state)
    got = torch.autograd.grad(torch.cat([head.o, tail.o], 1), list(x.values()), do)
    error, where = largest_difference(dict(zip(x, got, strict=True)), dict(zip(x, want, strict=True)))
    assert error < 1e-5, (error, where)


def test_what_an_open_chunk_holds_has_no_gradient_and_its_values_do_not_matter(device):
    x = inputs(dtype=torch.float32, **SMALL)
    for name in ("k", "v", "eta", "mu"):
        x[name] = torch.where(torch.arange(9).view(1, 9, *[1] * (x[name].dim() - 2)) < 8, x[name].detach(), torch.nan).requires_grad_()
    x = on(device, x)
    o = ttt_mlp(**x, chunk_size=4, impl="triton").o
    found = dict(zip(x, torch.autograd.grad(o.sum(), list(x.values())), strict=True))  # an expanded gradient of o
    assert all(t.isfinite().all() for t in found.values())
    for name in ("k", "v", "eta", "mu"):
        assert not found[name][:, 8:].any()
    # the first chunk's k, v and eta reach the reads of the second and third; its mu multiplies M_0 = 0
    assert all(found[name][:, :4].any() for name in ("k", "v", "eta")) and found["mu"][:, 4:8].all()
    # mu_j is a mean: its tokens share one gradient
    assert (found["mu"][:, 4:8] == found["mu"][:, 4:5]).all()


def test_zero_rows_and_zero_keys(device):
    x = inputs(dtype=torch.float32, **SMALL)
    with torch.no_grad():
        x["k"][:, 2] = 0
        x["w_gate"][:, 3] = 0
        x["w_down"][:, 5] = 0
    exact = everything(exactly(x), "reference", chunk_size=4, only_o=True)
    got = everything(on(device, x), "triton", chunk_size=4, only_o=True)
    assert all(t.isfinite().all() for t in got.values())
    for name in ("gradient of q", "gradient of k", "gradient of v", "gradient of eta"):
        torch.testing.assert_close(got[name].cpu().double(), exact[name], rtol=1e-4, atol=1e-5)


def test_strided_inputs_and_gradients(device):
    x = inputs(dtype=torch.float32, **SMALL)
    y = on(device, x)
    o = ttt_mlp(**y, chunk_size=4, impl="triton").o
    do = torch.randn(1, 16, 9, 1, device=device).permute(0, 2, 3, 1)
    want = torch.autograd.grad(o, list(y.values()), do.contiguous())
    fused = torch.stack([x[name].detach() for name in "qkv"], -1).to(device)
    z = on(device, x) | {name: fused[..., i].requires_grad_() for i, name in enumerate("qkv")}
    got = torch.autograd.grad(ttt_mlp(**z, chunk_size=4, impl="triton").o, list(z.values()), do)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- the chain whose programs take all of a chunk's tokens: with bfloat16 on a GPU what runs; here one program, with nobody to wait for


@pytest.fixture
def owned(monkeypatch):
    """Counts the launches of that chain, which it makes the interpreter take."""
    programs, taken = launch_bwd.run, []
    monkeypatch.setattr(launch_bwd, "run", lambda kernel, *rest: (taken.append("owned" in kernel.__name__), programs(kernel, *rest)))
    monkeypatch.setattr(replay, "_replays", {})
    if not CUDA:
        recipe = launch_bwd.recipe

        def with_owned(*key):
            known = recipe(*key)
            return known._replace(owned=known.chain)

        monkeypatch.setattr(launch_bwd, "recipe", with_owned)
        monkeypatch.setattr(launch_bwd, "sm_count", lambda _: 8)
    return taken


TAKES_ALL = {"batch": 2, "heads": 2, "length": 700, "d": 64, "h": 128} if CUDA else SMALL | {"length": 40, "batch": 2}


@pytest.mark.parametrize("norm", ["pre_write", "post_write", "none"])
@pytest.mark.parametrize("carried", [False, True])
def test_programs_that_take_all_tokens(norm, carried, device, owned):
    dtype, chunk_size = (torch.bfloat16, 300) if CUDA else (torch.float32, 17)
    state = some_state(inputs(dtype=dtype, **TAKES_ALL), 2, chunk_size, [3, 0], norm=norm) if carried else None
    compare(device, dtype, TAKES_ALL, state=state, chunk_size=chunk_size, norm=norm)
    assert any(owned)


def test_a_clip_takes_the_other_chain(device, owned):
    compare(device, torch.float32, SMALL, chunk_size=4, grad_clip=0.3)
    assert not any(owned)


# ---- on a GPU


@pytest.mark.skipif(not CUDA, reason="a persistent kernel needs resident programs")
@pytest.mark.parametrize("shape", [{"length": 1000}, {"length": 1000, "batch": 40, "heads": 8}], ids=["resident", "in turns"])
def test_the_persistent_chain_equals_its_twin(shape, device, monkeypatch):
    x = on(device, inputs(dtype=torch.bfloat16, **{"batch": 2, "heads": 2, "d": 64, "h": 128, "eta": 0.01} | shape))
    whole = launch_bwd.ttt_mlp_triton_backward
    monkeypatch.setattr(launch_bwd, "ttt_mlp_triton_backward", lambda *args: whole(*args, persistent=True))
    want = everything(x, "triton", chunk_size=96)
    monkeypatch.setattr(launch_bwd, "ttt_mlp_triton_backward", lambda *args: whole(*args, persistent=False))
    got = everything(x, "triton", chunk_size=96)
    assert all(torch.equal(t, want[name]) for name, t in got.items())


@pytest.mark.skipif(not CUDA, reason="the host never waits for a GPU")
def test_no_host_synchronisation_and_bounded_memory(device):
    B, T, H, d, h, c = 1, 8192, 8, 64, 128, 512
    x = on(device, inputs(batch=B, length=T, heads=H, d=d, h=h, dtype=torch.bfloat16, eta=0.01))
    o = ttt_mlp(**x, chunk_size=c, impl="triton").o
    do = torch.randn_like(o)
    torch.autograd.grad(o, list(x.values()), do, retain_graph=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.autograd.grad(o, list(x.values()), do, retain_graph=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    taken = torch.cuda.max_memory_allocated() - before
    returned = sum(t.numel() * t.element_size() for t in found)
    assert taken - returned <= launch_bwd.workspace_bytes(B, B * (T // c), H, d, h, 2, 32) + 2**20


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_forward_and_backward_take_what_the_issue_allows(device):
    B, T, H, d, h, c = 1, 32768, 8, 64, 128, 2048
    x = on(device, inputs(batch=B, length=T, heads=H, d=d, h=h, dtype=torch.bfloat16, eta=0.01))
    do = torch.randn_like(x["q"])
    torch.autograd.grad(ttt_mlp(**x, chunk_size=c, impl="triton").o, list(x.values()), do)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(ttt_mlp(**x, chunk_size=c, impl="triton").o, list(x.values()), do)
    taken, allowed = torch.cuda.max_memory_allocated() - before, allowed_bytes(B, T, H, d, h, c)
    assert taken <= allowed, f"{taken / 1e6:.0f} MB; o and gradients, 27 d h bytes a chunk and head and 64 MB are {allowed / 1e6:.0f} MB"


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 2], ids=["all tokens", "tokens split"])
def test_the_barriers_hold_beside_a_busy_stream_and_in_two_streams_at_once(device, batch):
    x = on(device, inputs(batch=batch, length=120, heads=8, d=64, h=128, dtype=torch.bfloat16, eta=0.01))
    do = torch.randn_like(x["q"])

    def gradients():
        return torch.autograd.grad(ttt_mlp(**x, chunk_size=3, impl="triton").o, list(x.values()), do)

    want = gradients()
    busy, second, a = torch.cuda.Stream(), torch.cuda.Stream(), torch.randn(2048, 2048, device=device)
    second.wait_stream(torch.cuda.current_stream())
    for i in range(1000):
        if i % 4 == 0:
            with torch.cuda.stream(busy):
                a = (a @ a).clamp(-1, 1)
        got = [gradients()]
        if i % 10 == 0:
            with torch.cuda.stream(second):
                got.append(gradients())
            second.synchronize()
        for found in got:
            assert all(torch.equal(g, w) for g, w in zip(found, want, strict=True)), i
