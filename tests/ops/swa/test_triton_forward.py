"""The forward kernel of `swa` against the fp64 definition, in the error of plain PyTorch at the same precision.

On a CPU it runs in Triton's interpreter with small tiles, so that short sequences still have every kind of tile; on a GPU with the
pinned configs and long sequences as well.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allmem_ops import swa
from allmem_ops.ops.kernels.configs import Config, candidates
from allmem_ops.ops.kernels.device import GPU_CLASSES
from allmem_ops.ops.swa import launch
from allmem_ops.testing import assert_within_budget

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")

SMALL = Config({"BM": 32, "BN": 16, "BG": 1, "TMA": 0}, 4, 2)
# Rows of a program belong to two heads where the group allows it; keys and values come through tensor descriptors.
GROUPED = Config({"BM": 32, "BN": 16, "BG": 2, "TMA": 1}, 4, 2)


@pytest.fixture(params=["pinned"] if CUDA else ["small", "grouped"])
def config(request, monkeypatch):
    """What the kernel is launched with: small tiles in the interpreter, what users get on a GPU."""
    if request.param != "pinned":
        use(SMALL if request.param == "small" else GROUPED, monkeypatch)


def use(config, monkeypatch):
    monkeypatch.setattr(launch, "TABLE", {key: [config] for key in launch.TABLE})


def make(Tq, Tk=None, *, B=1, HQ=2, HK=1, D=16, dtype=torch.float32, far=False):
    Tk = Tq if Tk is None else Tk
    shapes = {"q": (B, Tq, HQ, D), "k": (B, Tk, HK, D), "v": (B, Tk, HK, D)} | ({"q_sinks": (B, Tq, HQ, D)} if far else {})
    return {name: torch.randn(shape, device=DEVICE).to(dtype) for name, shape in shapes.items()}


def plain(x, window, sinks, scale):
    """(o, lse) of the formula in plain PyTorch at the inputs' precision."""
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    i, j = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=DEVICE)[:, None], torch.arange(k.shape[2], device=DEVICE)
    score = q @ k.mT * scale
    if "q_sinks" in x:
        score = torch.where(i - j >= window, x["q_sinks"].transpose(1, 2) @ k.mT * scale, score)
    score = score.masked_fill((j > i) | ((i - j >= window) & (j >= sinks)), float("-inf"))
    return (score.softmax(-1) @ v).transpose(1, 2), score.float().logsumexp(-1).transpose(1, 2)


def check(x, window, sinks, scale=None, cu_seqlens=None):
    """The kernel's outputs, within the budget."""
    options = {"window": window, "sinks": sinks, "scale": scale, "return_lse": True}
    got = swa(**x, **options, cu_seqlens=cu_seqlens, impl="triton")
    cuts = [(0, x["q"].shape[1])] if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))
    parts = [x if cu_seqlens is None else {n: t[:, a:b] for n, t in x.items()} for a, b in cuts]
    scale = x["q"].shape[-1] ** -0.5 if scale is None else scale
    low = [torch.cat(y, 1) for y in zip(*(plain(p, window, sinks, scale) for p in parts), strict=True)]
    exact = [swa(**{n: t.double() for n, t in p.items()}, **options, impl="reference") for p in parts]
    exact = [torch.cat(y, 1) for y in zip(*exact, strict=True)]
    assert got[0].dtype == x["q"].dtype and got[1].dtype == torch.float32
    for name, *values in zip(("o", "lse"), got, low, exact, strict=True):
        assert_within_budget(name, *values)
    return got


CASES = {  # Tq, Tk, window, sinks
    "one token": (1, 1, 3, 2),
    "less than a tile": (15, 15, 7, 2),
    "past one block": (33, 33, 32, 4),
    "whole tiles": (128, 128, 32, 16),
    "a window inside a block": (70, 70, 9, 0),
    "blocks and window apart": (111, 111, 50, 3),
    "window of one": (65, 65, 1, 0),
    "window of one and sinks": (65, 65, 1, 5),
    "window beyond T": (63, 63, 10**12, 9),
    "window is T": (64, 64, 64, 3),
    "many sinks": (100, 100, 20, 45),
    "sinks beyond T": (70, 70, 5, 10**12),
    "queries are the last": (33, 111, 40, 10),
    "one query": (1, 90, 40, 10),
    "queries inside the window": (20, 60, 50, 30),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("far", [False, True], ids=["q", "q_sinks"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_within_the_budget(case, far, dtype, config):
    Tq, Tk, window, sinks = case
    check(make(Tq, Tk, B=1 if not CUDA else 2, dtype=dtype, far=far), window, sinks, scale=0.3)


@settings(max_examples=20)
@given(
    st.integers(1, 60),
    st.integers(0, 40),
    st.integers(1, 70),
    st.integers(0, 60),
    st.sampled_from([(16, 16), (32, 16), (16, 32)]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (4, 1)]),
    st.booleans(),
    st.booleans(),
)
@example(60, 0, 16, 16, (32, 16), 2, (4, 2), True, True)
def test_any_tile_size(Tq, before, window, sinks, tile, BG, heads, tma, far):
    x = make(Tq, Tq + before, HQ=heads[0], HK=heads[1], far=far)
    with pytest.MonkeyPatch.context() as patch:
        use(Config({"BM": tile[0], "BN": tile[1], "BG": BG, "TMA": int(tma)}, 4, 2), patch)
        check(x, window, sinks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D, HQ, HK", [(5, 2, 2), (32, 2, 1), (64, 3, 1), (80, 4, 1), (96, 4, 2), (128, 8, 1), (256, 1, 1)])
def test_head_dims_and_groups(D, HQ, HK, dtype, config):
    check(make(70, HQ=HQ, HK=HK, D=D, dtype=dtype), 33, 5)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D, HQ, HK", [(32, 4, 4), (64, 9, 3), (80, 4, 2), (96, 4, 1), (128, 8, 4), (256, 8, 1)])
@pytest.mark.parametrize("T, window, sinks", [(2000, 512, 128), (4096, 1024, 0), (1111, 64, 300)])
def test_long_sequences(T, window, sinks, D, HQ, HK, dtype):
    check(make(T, HQ=HQ, HK=HK, D=D, dtype=dtype, far=True), window, sinks)
    check(make(T, HQ=HQ, HK=HK, D=D, dtype=dtype), window, sinks)


def test_float32_log_sum_exp_of_one_key_is_its_score(config):
    """To the last bit: a backward subtracts it from the score again, and the probability is 1."""
    x = {name: torch.randint(-9, 10, t.shape, device=DEVICE).float() for name, t in make(64, HQ=2, D=16).items()}
    _, lse = swa(**x, window=1, scale=0.3, return_lse=True, impl="triton")
    assert torch.equal(lse, (x["q"] * x["k"]).sum(-1) * 0.3)


def test_large_scores_neither_overflow_nor_lose_the_maximum(config):
    x = make(70)
    check({**x, "q": x["q"] * 1e3}, 33, 5, scale=1.0)


CUTS = [[0, 1, 1, 34, 111], [0, 0, 111, 111], [0, 32, 64, 111], [0, *range(1, 111, 7), 111]]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("cuts", CUTS, ids=["mixed", "empty ends", "whole blocks", "many"])
def test_packed_equals_separate_bit_for_bit(cuts, index, config):
    x = make(111, far=True)
    options = {"window": 11, "sinks": 4, "return_lse": True, "impl": "triton"}
    got = swa(**x, **options, cu_seqlens=torch.tensor(cuts, dtype=index, device=DEVICE))
    parts = [swa(**{n: t[:, a:b] for n, t in x.items()}, **options) for a, b in pairwise(cuts)]
    for packed, apart in zip(got, zip(*parts, strict=True), strict=True):
        assert torch.equal(packed, torch.cat(apart, 1))


def test_more_sequences_than_one_look_at_the_offsets_holds(config):
    lengths = torch.randint(0, 2, (300,))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(DEVICE)
    x = make(int(lengths.sum()), HQ=1, HK=1)
    got = swa(**x, window=3, cu_seqlens=cu_seqlens, impl="triton")
    torch.testing.assert_close(got, swa(**x, window=3, cu_seqlens=cu_seqlens, impl="chunk"), rtol=1e-5, atol=1e-5)


def test_packed_keeps_an_infinity_or_nan_in_its_sequence(config):
    x, cuts = make(150, HQ=2, D=16), [0, 40, 83, 99, 150]
    cu = torch.tensor(cuts, device=DEVICE)
    clean = swa(**x, window=30, sinks=3, cu_seqlens=cu, impl="triton")
    for n, bad in ((1, float("nan")), (2, float("inf"))):
        a, b = cuts[n : n + 2]
        dirty = {name: t.clone() for name, t in x.items()}
        for t in dirty.values():
            t[:, a:b] = bad
        got = swa(**dirty, window=30, sinks=3, cu_seqlens=cu, impl="triton")
        assert torch.equal(got[:, :a], clean[:, :a])
        assert torch.equal(got[:, b:], clean[:, b:])


@pytest.mark.parametrize("cuts", [[0, 200], [50, 20, 70], [-9, 30, 70], [10**6, 10**6, 10**6], [0, 10**9, 0]], ids=str)
def test_offsets_that_cannot_be_checked_touch_nothing_outside(cuts, config):
    x = make(70)
    guarded = {name: torch.nn.functional.pad(t, (0, 0, 0, 0, 500, 500), value=float("nan"))[:, 500:570] for name, t in x.items()}
    o, _ = launch.swa_triton_forward(*guarded.values(), None, torch.tensor(cuts, device=DEVICE), 11, 4, 0.3)
    assert o.shape == x["q"].shape  # what it holds is not defined; a GPU would report an access outside at the next synchronisation
    if CUDA:
        torch.cuda.synchronize()


def test_split_anywhere_equals_one_pass(config):
    x, options = make(90, far=True), {"window": 20, "sinks": 5, "impl": "triton"}
    whole = swa(**x, **options)
    for cut in (1, 33, 80):
        head = swa(*(t[:, :cut] for n, t in x.items() if n != "q_sinks"), q_sinks=x["q_sinks"][:, :cut], **options)
        tail = swa(x["q"][:, cut:], x["k"], x["v"], q_sinks=x["q_sinks"][:, cut:], **options)
        torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-5, atol=1e-5)


@settings(max_examples=5)
@given(st.integers(1, 89), st.integers(1, 60), st.integers(0, 60), st.booleans())
def test_the_future_never_changes_the_past_bit_for_bit(cut, window, sinks, far):
    x = make(90, far=far)
    y = {name: torch.cat([t[:, :cut], torch.randn_like(t[:, cut:])], 1) for name, t in x.items()}
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            use(SMALL, patch)
        a, b = (swa(**z, window=window, sinks=sinks, return_lse=True, impl="triton") for z in (x, y))
    for before, after in zip(a, b, strict=True):
        assert torch.equal(before[:, :cut], after[:, :cut])
        assert not torch.equal(before[:, cut:], after[:, cut:])


def test_keys_outside_the_window_are_not_touched(config):
    """A key that no query sees may hold anything: its tile is not even read."""
    x = make(160)
    k, v = (x[name].clone() for name in "kv")
    k[:, 32:64] = v[:, 32:64] = float("nan")
    x |= {"q": x["q"][:, 128:], "k": k, "v": v}
    assert swa(**x, window=16, sinks=16, impl="triton").isfinite().all()


def test_window_of_T_equals_causal_attention(config):
    x = make(65)
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    for window in (65, 2**40):
        torch.testing.assert_close(swa(**x, window=window, impl="triton"), want, rtol=1e-5, atol=1e-5)


def test_gqa_equals_repeated_heads(config):
    x = make(40, HQ=6, HK=2)
    k, v = (x[name].repeat_interleave(3, 2) for name in "kv")
    options = {"window": 20, "sinks": 3, "impl": "triton"}
    assert torch.equal(swa(**x, **options), swa(x["q"], k, v, **options))  # 3 is odd: one head a program in both


def views(x):
    """The same values at other strides, by name."""
    yield "fused projection", dict(zip(x, torch.cat(list(x.values()), 2).split([t.shape[2] for t in x.values()], 2), strict=True))
    yield "heads first", {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in x.items()}
    yield "every second channel", {n: t.repeat_interleave(2, 3)[..., ::2] for n, t in x.items()}
    yield "odd rows", {n: torch.nn.functional.pad(t, (0, 1))[..., :-1] for n, t in x.items()}
    yield "misaligned base", {n: torch.nn.functional.pad(t, (0, 0, 1, 0)).flatten()[t.shape[3] - 1 :] for n, t in x.items()}
    yield "expanded heads", {n: t[:, :, :1].expand(-1, -1, t.shape[2], -1) for n, t in x.items()}


def test_inputs_are_read_by_their_strides(config, monkeypatch):
    x, options = make(40, B=2, HQ=4, HK=2, far=True), {"window": 11, "sinks": 3, "impl": "triton"}
    want = swa(**x, **options)
    for name, y in views(x):
        if name == "misaligned base":
            y = {n: t[1 : 1 + x[n].numel()].view(x[n].shape).copy_(x[n]) for n, t in y.items()}
        if name == "expanded heads":
            want = swa(**{n: t.contiguous() for n, t in y.items()}, **options)
        monkeypatch.setattr(torch.Tensor, "contiguous", None)  # no copies
        got = swa(**y, **options)
        monkeypatch.undo() if CUDA else monkeypatch.delattr(torch.Tensor, "contiguous")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)


@gpu
def test_offsets_past_32_bits():
    """Tokens 2**31 elements apart, by strides."""
    step = 2**31 // 60
    step -= step % 16
    store = torch.zeros(step * 63 + 64, device=DEVICE, dtype=torch.float16)
    x = make(64, HQ=1, HK=1, D=64, dtype=torch.float16)["q"]
    y = store.as_strided(x.shape, (64 * step, step, 64, 1)).copy_(x)
    assert torch.equal(swa(y, y, y, window=40, impl="triton"), swa(x, x, x, window=40, impl="triton"))


def test_two_runs_are_bitwise_equal(config):
    x = make(111, far=True)
    a, b = (swa(**x, window=20, sinks=9, return_lse=True, impl="triton") for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("B, Tq, Tk, H", [(0, 5, 5, 2), (2, 0, 5, 2), (1, 0, 0, 2), (1, 3, 3, 0)])
def test_empty(B, Tq, Tk, H):
    x = make(Tq, Tk, B=B, HQ=H, HK=max(H, 1))
    o, lse = swa(**x, window=3, return_lse=True, impl="triton")
    assert o.shape == (B, Tq, H, 16) and lse.shape == (B, Tq, H)


@pytest.mark.parametrize("fault", ["window", "sinks", "scale", "zero"])
def test_a_fault_in_the_output_is_found(fault, config, monkeypatch):
    """The comparison of this file is sharp enough: a window one too long, a sink too few, another scale, a zeroed output fail it."""
    original = launch._launch

    def faulty(*args):
        *head, window, sinks, scale = args
        original(*head, window + (fault == "window"), sinks - (fault == "sinks"), scale * (1.01 if fault == "scale" else 1))
        if fault == "zero":
            args[6].zero_()

    monkeypatch.setattr(launch, "_launch", faulty)
    with pytest.raises(AssertionError, match="exceeds"):
        check(make(90), 20, 5)


def test_every_shape_class_has_a_config():
    for gpu_name in GPU_CLASSES:
        for kind in ("half", "single"):
            for D in (5, 16, 32, 64, 80, 96, 128, 256):
                for packed in (False, True):
                    (first, *_) = candidates(launch.TABLE, gpu_name, (kind, launch.padded_head_dim(D), packed))
                    assert set(first.constants) == {"BM", "BN", "BG", "TMA"}
                    assert set(first.constants) <= set(launch.swa_fwd_kernel.arg_names)
