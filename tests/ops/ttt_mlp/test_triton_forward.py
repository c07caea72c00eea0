"""The Triton forward of `ttt_mlp` against the definition in float64: in Triton's interpreter on a CPU, and on a GPU with larger sizes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allmem_ops import ttt_mlp
from allmem_ops.ops.ttt_mlp import replay, slots
from allmem_ops.ops.ttt_mlp.reference import Options
from allmem_ops.testing import assert_within_budget, relative_error
from tests.ops.ttt_mlp.cases import NORMS, TOKENS, WEIGHTS, assert_equal_to, inputs, largest_difference, outputs, some_state, tokens

launch = pytest.importorskip("allmem_ops.ops.ttt_mlp.launch")
chain = pytest.importorskip("allmem_ops.ops.ttt_mlp.kernels.chain")

GPU = torch.cuda.is_available()
# Two slices of hidden units and, in `_two_splits`, two splits of every chunk's tokens.
SMALL = {"batch": 1, "heads": 2, "d": 64, "h": 128} if GPU else {"batch": 1, "heads": 1, "d": 16, "h": 32}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
MATRICES = ("gate", "up", "down")


@pytest.fixture(autouse=True)
def _two_splits(monkeypatch):
    # On a CPU there is one "SM", so that nothing would be split.
    if not GPU:
        monkeypatch.setattr(launch, "splits", lambda *_: 2)


def made(device, dtype=torch.float32, **sizes):
    x = inputs(**(SMALL | {"dtype": dtype, "grad": False} | sizes))
    return {name: t.to(device) for name, t in x.items()}


def widened(x):
    return {name: t.double() for name, t in x.items()}


def widened_state(state):
    wide = {name: t.detach().double() if t.is_floating_point() else t for name, t in (state.tensors() | state.shared()).items()}
    return replace(state, **wide, dtype="float64")


def run(x, impl, state=None, **options):
    """o without the residual, which would hide errors, and the final state."""
    with torch.no_grad():
        return outputs(ttt_mlp(**x, impl=impl, initial_state=state, output_final_state=True, residual=False, **options))


def compared(names):
    return [name for name in names if name not in ("count", "position") and not name.startswith("tail")]


def check(x, state=None, **options):
    """Every result within the budget; returns the kernels' results."""
    got = run(x, "triton", state, **options)
    low = run(x, "reference", state, **options)
    exact = run(widened(x), "reference", None if state is None else widened_state(state), **options)
    for name in compared(exact):
        assert_within_budget(name, got[name], low[name], exact[name])
    for name in ("count", "position"):
        assert torch.equal(got[name], exact[name])
    return got


@pytest.mark.parametrize("grad_clip", [None, 0.15])
@pytest.mark.parametrize("norm", NORMS)
def test_values(device, norm, grad_clip):
    x = made(device, length=203 if GPU else 23)
    check(x, chunk_size=90 if GPU else 9, norm=norm, grad_clip=grad_clip)


# Lengths around the chunk's edge: T < c, T = 1, T = c, T = n c, n c + 1, c = 1, c a multiple of the tile and not.
@pytest.mark.parametrize("length, chunk_size", [(3, 4), (1, 4), (4, 4), (12, 4), (13, 4), (3, 1), (33, 16), (40, 19)])
def test_lengths_around_the_chunks_edge(device, length, chunk_size):
    x = made(device, length=length)
    got = check(x, chunk_size=chunk_size)
    with torch.no_grad():
        assert torch.equal(ttt_mlp(**x, chunk_size=chunk_size, impl="triton", residual=False).o, got["o"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [1, 8, 64, 128] if GPU else [1, 6])
def test_error_does_not_grow_with_the_number_of_chunks(device, chunks, dtype):
    check(made(device, dtype, length=(64 if GPU else 5) * chunks + 1, eta=0.01), chunk_size=64 if GPU else 5)


@pytest.mark.parametrize("d, h", [(32, 32), (64, 48), (96, 320), (128, 512)] if GPU else [(16, 16), (32, 48), (48, 32)])
def test_widths(device, d, h):
    check(made(device, d=d, h=h, length=300 if GPU else 20), chunk_size=100 if GPU else 8)


@pytest.mark.parametrize("norm, grad_clip", [("pre_write", 0.15), ("post_write", None), ("none", 0.15)])
def test_from_a_state_with_open_chunks(device, norm, grad_clip):
    x = made(device, length=12, batch=2)
    options = {"norm": norm, "grad_clip": grad_clip, "residual": False}
    state = some_state({name: t.cpu() for name, t in x.items()}, 2, 5, [3, 0], **options).detach().to(device)
    check(x, state, chunk_size=5, norm=norm, grad_clip=grad_clip)


def test_a_chunk_that_stays_open(device):
    x = made(device, length=2)
    state = some_state({name: t.cpu() for name, t in x.items()}, 1, 9, 3, residual=False).detach().to(device)
    got = check(x, state, chunk_size=9)
    assert torch.equal(got["w_up"], state.w_up) and got["count"].tolist() == [5]


def test_packed_equals_separate(device):
    ends = [0, 0, 9, 10, 19]
    x = made(device, length=19)
    options = {"norm": "post_write", "grad_clip": 0.15, "residual": False}
    state = some_state({name: t.cpu() for name, t in x.items()}, 4, 6, [2, 0, 5, 3], **options).detach().to(device)
    options = {"chunk_size": 6, "norm": "post_write", "grad_clip": 0.15}
    packed = run(x, "triton", state, cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device), **options)
    for n, (a, b) in enumerate(pairwise(ends)):
        alone = run(tokens(x, a, b), "triton", state.index_select([n]), **options)
        for name, t in alone.items():
            one = packed[name][:, a:b] if name == "o" else packed[name][n : n + 1]
            torch.testing.assert_close(one, t, rtol=1e-5, atol=1e-6)
            if a == b and name[0] in "wmg":
                assert torch.equal(one, getattr(state, name)[n : n + 1])


def test_packed_without_a_final_state(device):
    x = made(device, length=17)
    with torch.no_grad():
        packed = ttt_mlp(**x, chunk_size=4, cu_seqlens=torch.tensor([0, 8, 9, 9, 17], device=device), impl="triton").o
        for a, b in [(0, 8), (8, 9), (9, 17)]:
            torch.testing.assert_close(packed[:, a:b], ttt_mlp(**tokens(x, a, b), chunk_size=4, impl="triton").o, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 11), st.integers(1 if GPU else 3, 6), st.sampled_from(NORMS))
@settings(max_examples=20 if GPU else 3)
def test_split_equals_one_pass(cut, chunk_size, norm):
    x = made(torch.device("cuda" if GPU else "cpu"), length=11)
    options = {"chunk_size": chunk_size, "norm": norm, "grad_clip": 0.15}
    whole = run(x, "triton", **options)
    head = run(tokens(x, 0, cut), "triton", **options)
    with torch.no_grad():
        first = ttt_mlp(**tokens(x, 0, cut), impl="triton", output_final_state=True, residual=False, **options).state
    rest = run(tokens(x, cut, None), "triton", first, **options)
    parts = rest | {"o": torch.cat([head["o"], rest["o"]], 1)}
    assert_equal_to({name: parts[name] for name in compared(whole)}, {name: whole[name] for name in compared(whole)}, 1e-5)


def test_causality_bit_for_bit(device):
    x = made(device, length=14)
    options = {"chunk_size": 4, "norm": "pre_write", "grad_clip": 0.15}
    o = run(x, "triton", **options)["o"]
    for t in (4, 7) if not GPU else range(14):
        moved = {name: v.clone() for name, v in x.items()}
        for name in TOKENS:
            moved[name][:, t] += 0.5
        changed = run(moved, "triton", **options)["o"]
        assert torch.equal(changed[:, :t], o[:, :t])
        assert not torch.equal(changed[:, t], o[:, t])
        if t == 4:  # not read by its own chunk, but by the next
            own = x | {name: moved[name] for name in ("k", "v", "eta", "mu")}
            changed = run(own, "triton", **options)["o"]
            assert torch.equal(changed[:, :8], o[:, :8]) and not torch.equal(changed[:, 8:], o[:, 8:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_of_later_tokens_reaches_nothing_before(device, dtype):
    """Rows of the next chunk lie in a chunk's last tile: masked when they are loaded, as 0 * NaN is NaN."""
    x = made(device, dtype, length=23)
    want = run(x, "triton", chunk_size=9)["o"]
    poisoned = {name: t.clone() for name, t in x.items()}
    for name in ("k", "v", "eta", "mu"):
        poisoned[name][:, 9:] = torch.nan
    got = run(poisoned, "triton", chunk_size=9)["o"]
    # a chunk is read before it is written
    assert torch.equal(got[:, :18], want[:, :18]) and got[:, 18:].isnan().all()


def test_strided_inputs_among_other_data(device):
    """Views of fused and padded tensors whose other elements are NaN: nothing foreign is read and nothing is copied."""
    x = made(device, length=13)
    want = run(x, "triton", chunk_size=5)

    def inside(t, before, after):
        """`t` as a view of a larger tensor full of NaN."""
        big = t.new_full([n + a + b for n, a, b in zip(t.shape, before, after, strict=True)], float("nan"))
        view = big[tuple(slice(a, a + n) for a, n in zip(before, t.shape, strict=True))]
        return view.copy_(t)

    strided = {name: inside(x[name], [1, 2] + [1] * (x[name].dim() - 2), [0, 3] + [2] * (x[name].dim() - 2)) for name in TOKENS}
    strided["q"] = x["q"].transpose(1, 3).contiguous().transpose(1, 3)
    assert not any(t.is_contiguous() for t in strided.values())
    assert_equal_to(run(x | strided, "triton", chunk_size=5), want, 0)


def test_zero_rows_and_zero_keys_stay_finite(device):
    x = made(device, length=11)
    for name in WEIGHTS:
        x[name][:, 0] = 0
    x["k"][:, :5] = 0
    for eps in (1e-5, 0.0):
        got = check(x, chunk_size=4, eps=eps)
        assert all(t.isfinite().all() for t in got.values())


def test_gradient_sums_beyond_the_range_of_float16(device):
    x = made(device, torch.float16, length=20, eta=1e5)
    got = run(x, "triton", chunk_size=10, grad_clip=1.0)
    exact = run(widened(x), "reference", chunk_size=10, grad_clip=1.0)
    free = run({name: t[:, :10] if name in TOKENS else t for name, t in x.items()}, "triton", chunk_size=10)
    assert free["m_down"].isfinite().all() and free["m_down"].norm() > 65504
    assert relative_error(got["o"], exact["o"]) < 2e-3


def test_huge_rates_stay_finite(device):
    for dtype in DTYPES:
        got = run(made(device, dtype, length=12, eta=1e6), "triton", chunk_size=4, grad_clip=1.0)
        assert all(t.isfinite().all() for t in got.values())


def test_no_tokens(device):
    got = run(made(device, length=0), "triton", chunk_size=4)
    x = made(device, length=0)
    assert got["o"].shape == x["q"].shape
    assert all(torch.equal(got[f"w_{m}"], x[f"w_{m}"][None]) for m in MATRICES)
    assert not got["m_up"].any() and not got["g_up"].any()


def test_no_sequences(device):
    got = run(made(device, batch=0, length=5), "triton", chunk_size=4)
    assert got["o"].shape[0] == 0 and got["w_up"].shape[0] == 0


def test_two_runs_are_equal_bit_for_bit(device):
    x = made(device, length=19)
    first, second = (run(x, "triton", chunk_size=4, grad_clip=0.2) for _ in range(2))
    assert_equal_to(first, second, 0)


def test_offsets_that_decrease_stay_inside(device):
    # The arguments' check reads no values on a GPU: whatever comes, nothing outside the tensors is touched.
    x = made(device, length=6)
    for ends in ([0, 6, 0, 6], [0, 50, -7, 6], [6, 0, 6, 3]):
        out = launch.ttt_mlp_triton_forward(
            *(x[name] for name in TOKENS), [x[name] for name in WEIGHTS], None, torch.tensor(ends, device=device),
            Options(2, "pre_write", True, None, 1e-5), True, True,
        )  # fmt: skip
        first = out.first.tolist()
        assert all(0 <= s < out.x.shape[0] for s in first)


# ---- what the backward gets


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_saved(device, norm, packed):
    x = made(device, length=17, heads=1)
    ends = [0, 8, 8, 17] if packed else [0, 17]
    clip, c, eps = 0.15, 4, 1e-5
    cu_seqlens = torch.tensor(ends, device=device) if packed else None
    out = launch.ttt_mlp_triton_forward(
        *(x[name] for name in TOKENS), [x[name] for name in WEIGHTS], None, cu_seqlens, Options(c, norm, True, clip, eps), False, True
    )
    d, h = x["q"].shape[-1], x["w_up"].shape[1]
    n = out.n.split([h, h, d], -1)
    sizes = out.size.split([h, h, d], -1)

    def rows(t):
        """[H, 3, d, h] as gate, up [H, h, d] and down [H, d, h]."""
        return t[:, 0].mT, t[:, 1].mT, t[:, 2]

    at = 0
    for i, (a, b) in enumerate(pairwise(ends)):
        slots_of = max(-(-(b - a) // c), 1)
        if packed:
            assert out.first[i] == at
            assert out.slots[at : at + slots_of].tolist() == [[i, j] for j in range(slots_of)]
        torch.testing.assert_close(rows(out.x[at]), tuple(x[name] for name in WEIGHTS))
        assert not out.m[at].any()
        for j in range(slots_of):
            s = at + j
            if norm != "none":
                for w, size in zip(rows(out.x[s]), sizes, strict=True):
                    torch.testing.assert_close(size[s], w.norm(dim=-1))
            if j == slots_of - 1:
                continue
            scaled = norm == "pre_write" or (norm == "post_write" and j > 0)
            before = [w * (k / (size[s] + eps))[..., None] if scaled else w for w, k, size in zip(rows(out.x[s]), n, sizes, strict=True)]
            for w, m, point in zip(rows(out.x[s + 1]), rows(out.m[s + 1]), before, strict=True):
                torch.testing.assert_close(w, point + m)
            mu = x["mu"][0, a + j * c : a + (j + 1) * c].mean(0)
            torch.testing.assert_close(out.mu_mean[s], mu)
            for g, m, m_before, size in zip(MATRICES, rows(out.m[s + 1]), rows(out.m[s]), out.g_size[s].unbind(-1), strict=True):
                change = (m - mu[:, None, None] * m_before).norm(dim=(-2, -1))
                torch.testing.assert_close(change, size.clamp_max(clip), rtol=1e-4, atol=1e-6, msg=g)
        at += slots_of
    if packed:
        assert (out.slots[at:, 0] == -1).all()
        assert not out.x[at:].any()
    else:
        assert out.x.shape[0] == at


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.booleans(), st.data())
@settings(max_examples=200)
def test_the_slots_of_all_sequences_fit_their_bound(tokens, sequences, chunk_size, carried, keep, data):
    held = [data.draw(st.integers(0, chunk_size - 1)) if carried else 0 for _ in range(sequences)]
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), min_size=sequences - 1, max_size=sequences - 1)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]

    def needed(length, held):
        return (length + held) // chunk_size + 1 if keep else max(-(-(length + held) // chunk_size), 1)

    packed = slots.Spans(1, tokens, sequences, chunk_size, True, carried, keep)
    assert sum(map(needed, lengths, held)) <= packed.slots
    dense = slots.Spans(sequences, tokens, sequences, chunk_size, False, carried, keep)
    assert all(needed(tokens, n) <= dense.steps for n in held)
    if not carried:
        assert needed(tokens, 0) == dense.steps


# ---- faults: each must be seen by the comparison that the tests above make


def _raw(*arguments):
    return arguments[:3]


def _late(*arguments):
    start, stop = SOUND["chunk_span"](*arguments)
    return start + 1, stop


FAULTS = {
    "the gradient at the raw weights": ("point", _raw, {}),
    "no clip": ("clip", _raw, {"grad_clip": 0.05}),
    "the open chunk's sums dropped": ("with_held", _raw, {"state": True}),
    "half of the slabs": ("sum_slabs", lambda *a: tuple(t / 2 for t in SOUND["sum_slabs"](*a)), {}),
    "one token's mu for all": ("chunk_mus", lambda p_mu, stride, *a: SOUND["chunk_mus"](p_mu, stride * 0, *a), {}),
    "chunks that begin a token late": ("chunk_span", _late, {}),
    "row norms of half the hidden units": ("row_sizes", lambda *a: SOUND["row_sizes"](*a) / 2**0.5, {}),
}
SOUND = {name: getattr(chain, name) for name, _, _ in FAULTS.values()}


@pytest.mark.skipif(GPU, reason="compiled kernels do not see a function that a test has replaced")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(device, monkeypatch, fault):
    name, broken, options = FAULTS[fault]
    options = {"chunk_size": 5} | options
    x = made(device, length=13)
    state = some_state(x, 1, 5, 3, residual=False).detach() if options.pop("state", False) else None
    exact = run(widened(x), "reference", None if state is None else widened_state(state), **options)

    def worst():
        got = run(x, "triton", state, **options)
        return largest_difference({n: got[n] for n in compared(exact)}, {n: exact[n] for n in compared(exact)})[0]

    assert worst() < 1e-5
    monkeypatch.setattr(chain, name, broken)
    assert worst() > 1e-3


# ---- the form whose programs take all of a chunk's tokens: with bfloat16 on a GPU what runs; here one program, with nobody to wait for


@pytest.fixture
def owned(monkeypatch):
    """Counts the launches of that form, which it makes the interpreter take."""
    programs, taken = launch.run, []
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: (taken.append("owned" in kernel.__name__), programs(kernel, *rest)))
    if not GPU:
        recipe = launch.recipe

        def with_owned(*key):
            known = recipe(*key)
            return known._replace(sms=8, owned=launch.Kind({**known.chain.constants, "HS": 16}, {}))

        monkeypatch.setattr(launch, "recipe", with_owned)
    return taken


@pytest.mark.parametrize("grad_clip", [None, 0.15])
@pytest.mark.parametrize("norm", NORMS)
def test_programs_that_take_all_tokens(device, owned, norm, grad_clip):
    x = made(device, torch.bfloat16, batch=2, length=1100) if GPU else made(device, length=40, h=16)
    check(x, chunk_size=300 if GPU else 17, norm=norm, grad_clip=grad_clip)
    assert any(owned)


def test_programs_that_take_all_tokens_of_packed_sequences(device, owned):
    x = made(device, torch.bfloat16, length=1100) if GPU else made(device, length=24, h=16)
    ends = [0, 700, 700, 701, 1100] if GPU else [0, 15, 15, 16, 24]
    got = check(x, chunk_size=300 if GPU else 7, cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device))
    for n, (a, b) in enumerate(pairwise(ends)):
        alone = run(tokens(x, a, b), "triton", chunk_size=300 if GPU else 7)
        assert torch.equal(got["o"][:, a:b], alone["o"]) and torch.equal(got["w_down"][n : n + 1], alone["w_down"])
    assert any(owned)


@pytest.mark.parametrize("norm", NORMS)
def test_programs_that_take_all_tokens_go_on_from_a_state(device, owned, norm):
    x = made(device, torch.bfloat16, batch=2, length=700) if GPU else made(device, batch=2, length=20, h=16)
    chunk_size = 300 if GPU else 9
    state = some_state({name: t.cpu() for name, t in x.items()}, 2, chunk_size, [3, 0], norm=norm, residual=False).detach().to(device)
    check(x, state, chunk_size=chunk_size, norm=norm)
    assert any(owned)


def test_more_heads_than_programs_fit_take_the_other_form(device, owned):
    x = made(device, torch.bfloat16, batch=3, heads=8, length=300) if GPU else made(device, batch=9, length=5, h=16)
    run(x, "triton", chunk_size=100 if GPU else 3)
    assert not any(owned)


# ---- the persistent form, which needs a GPU


@pytest.mark.skipif(not GPU, reason="the interpreter runs programs one after another: a barrier would hang")
@pytest.mark.parametrize("dtype, norm, grad_clip", [(torch.bfloat16, "pre_write", None), (torch.float32, "post_write", 0.05)])
def test_one_launch_equals_a_launch_for_each_part(device, monkeypatch, dtype, norm, grad_clip):
    x = made(device, dtype, batch=3, heads=8, length=1000)
    options = {"chunk_size": 130, "norm": norm, "grad_clip": grad_clip}
    got = run(x, "triton", **options)
    recipe = launch.recipe
    monkeypatch.setattr(launch, "recipe", lambda *key: recipe(*key)._replace(persistent=False))
    monkeypatch.setattr(replay, "_replays", {})
    # the same device functions; the compiler may contract a product and a sum in one form and not in the other
    twin, exact = run(x, "triton", **options), run(widened(x), "chunk", **options)
    for name in compared(exact):
        assert_within_budget(name, got[name], twin[name], exact[name])


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 2], ids=["all tokens", "tokens split"])
def test_the_barrier_holds_beside_a_busy_stream(device, batch):
    x = made(device, torch.bfloat16, batch=batch, heads=8, length=120)
    want = run(x, "triton", chunk_size=3)
    busy, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=device)
    for i in range(1000):
        if i % 4 == 0:
            with torch.cuda.stream(busy):
                a = (a @ a).clamp(-1, 1)
        got = run(x, "triton", chunk_size=3)
        assert torch.equal(got["o"], want["o"]) and torch.equal(got["w_down"], want["w_down"]), i
