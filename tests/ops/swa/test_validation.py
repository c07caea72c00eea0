"""Every argument is checked, in one form: name, expectation, value."""

import pytest
import torch

from allmem_ops import WindowCache, swa, swa_step


def z(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


GOOD = {"q": z(2, 64, 4, 64), "k": z(2, 64, 2, 64), "v": z(2, 64, 2, 64), "window": 8}
PACKED = {"q": z(1, 6, 4, 8), "k": z(1, 6, 2, 8), "v": z(1, 6, 2, 8), "window": 8, "cu_seqlens": torch.tensor([0, 2, 6])}

BAD = [
    ({"q": 3}, r"`q` must be a torch.Tensor; got int"),
    ({"q": z(64, 4, 64)}, r"`q` must have shape \[B, Tq, HQ, D\]; got \[64, 4, 64\]"),
    ({"k": z(3, 64, 2, 64)}, r"`k` must have shape \[B, Tk, HK, D\] with B=2; got \[3, 64, 2, 64\]"),
    ({"k": z(2, 64, 2, 32)}, r"`k` must have shape \[B, Tk, HK, D\] with D=64; got \[2, 64, 2, 32\]"),
    ({"v": z(2, 63, 2, 64)}, r"`v` must have shape \[B, Tk, HK, D\] with Tk=64; got \[2, 63, 2, 64\]"),
    ({"v": z(2, 64, 4, 64)}, r"`v` must have shape \[B, Tk, HK, D\] with HK=2; got \[2, 64, 4, 64\]"),
    ({"q": z(2, 65, 4, 64)}, r"`q` must have at most Tk=64 positions \(they are the last ones of `k`\); got 65"),
    ({"q": z(2, 64, 3, 64)}, r"`q` must have a number of heads HQ that is a multiple of HK=2; got 3"),
    ({"k": z(2, 64, 0, 64), "v": z(2, 64, 0, 64)}, r"`q` must have a number of heads HQ that is a multiple of HK=0; got 4"),
    ({"q": z(2, 64, 4, 0), "k": z(2, 64, 2, 0), "v": z(2, 64, 2, 0)}, r"`q` must have a head dim D of at least 1; got 0"),
    ({"q": GOOD["q"].long()}, r"`q` must have dtype bfloat16 or float16 or float32 or float64; got int64"),
    ({"k": GOOD["k"].bfloat16()}, r"`k` must have dtype float32 \(the dtype of `q`\); got bfloat16"),
    ({"v": GOOD["v"].half()}, r"`v` must have dtype float32 \(the dtype of `q`\); got float16"),
    ({"v": GOOD["v"].to("meta")}, r"`v` must be on cpu, the device of `q`; got meta"),
    ({"q_sinks": z(2, 63, 4, 64)}, r"`q_sinks` must have shape \[B, Tq, HQ, D\] with Tq=64; got \[2, 63, 4, 64\]"),
    ({"q_sinks": GOOD["q"].double()}, r"`q_sinks` must have dtype float32 \(the dtype of `q`\); got float64"),
    ({"q_sinks": GOOD["q"].to("meta")}, r"`q_sinks` must be on cpu, the device of `q`; got meta"),
    ({"window": 0}, r"`window` must be at least 1; got 0"),
    ({"window": True}, r"`window` must be an int of at least 1; got bool True"),
    ({"window": 8.0}, r"`window` must be an int of at least 1; got float 8.0"),
    ({"window": None}, r"`window` must be an int of at least 1; got NoneType None"),
    ({"sinks": -1}, r"`sinks` must be at least 0; got -1"),
    ({"sinks": False}, r"`sinks` must be an int of at least 0; got bool False"),
    ({"scale": 0.0}, r"`scale` must be greater than 0; got 0.0"),
    ({"scale": float("nan")}, r"`scale` must be greater than 0; got nan"),
    ({"scale": float("inf")}, r"`scale` must be finite; got inf"),
    ({"scale": "1"}, r"`scale` must be a number; got str '1'"),
    ({"return_lse": 1}, r"`return_lse` must be a bool; got int 1"),
    ({"impl": "cuda"}, r"`impl` must be one of 'reference', 'chunk', 'triton', 'auto'; got 'cuda'"),
    ({"impl": "triton", **{n: GOOD[n].double() for n in "qkv"}}, r"`impl` 'triton' needs one of .*; got float64"),
    ({"impl": "triton", **{n: z(1, 2, 2, 257) for n in "qkv"}}, r"`q` must have a head dim D of at most 256 with `impl`='triton'; got 257"),
    ({"cu_seqlens": torch.tensor([0, 64])}, r"`q` must have batch size 1 with `cu_seqlens`; got 2. Flatten the batch into T first"),
]

BAD_PACKED = [
    ({"k": z(1, 5, 2, 8)}, r"`k` must have shape \[B, T, HK, D\] with T=6; got \[1, 5, 2, 8\]"),
    ({"k": z(1, 9, 2, 8), "v": z(1, 9, 2, 8)}, r"`k` must have shape \[B, T, HK, D\] with T=6; got \[1, 9, 2, 8\]"),
    ({"q_sinks": z(1, 5, 4, 8)}, r"`q_sinks` must have shape \[B, T, HQ, D\] with T=6; got \[1, 5, 4, 8\]"),
    ({"cu_seqlens": [0, 6]}, r"`cu_seqlens` must be a torch.Tensor; got list"),
    ({"cu_seqlens": torch.tensor([0.0, 6.0])}, r"`cu_seqlens` must have dtype int32 or int64; got float32"),
    ({"cu_seqlens": torch.tensor([0])}, r"`cu_seqlens` must have at least 2 elements; got 1"),
    ({"cu_seqlens": torch.tensor([[0, 6]])}, r"`cu_seqlens` must have shape \[N\+1\]; got \[1, 2\]"),
    ({"cu_seqlens": torch.tensor([0, 5])}, r"`cu_seqlens` must rise from 0 to T=6 without decreasing; got \[0, 5\]"),
    ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, r"`cu_seqlens` must rise from 0 to T=6 without decreasing; got \[0, 4, 3, 6\]"),
    ({"cu_seqlens": torch.tensor([1, 6])}, r"`cu_seqlens` must rise from 0 to T=6 without decreasing; got \[1, 6\]"),
]


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("base, change, match", [*((GOOD, *b) for b in BAD), *((PACKED, *b) for b in BAD_PACKED)])
def test_a_bad_argument_of_swa_is_named(base, change, match, impl):
    with pytest.raises(ValueError, match=match):
        swa(**({"impl": impl} | base | change))


def test_good_arguments_pass():
    swa(**GOOD)
    swa(**PACKED)


def test_unknown_and_positional_options_are_type_errors():
    with pytest.raises(TypeError):
        swa(**GOOD, windows=3)
    with pytest.raises(TypeError):
        swa(GOOD["q"], GOOD["k"], GOOD["v"], 8)
    with pytest.raises(TypeError):
        swa(GOOD["q"], GOOD["k"], GOOD["v"])


def test_the_operator_itself_refuses_offsets_that_do_not_fit():
    """On a GPU the public function does not look at the values; the operator, which reads them on the host anyway, does."""
    with pytest.raises(ValueError, match=r"`cu_seqlens` must rise from 0 to T=6"):
        torch.ops.allmem_ops.swa_chunk(PACKED["q"], PACKED["k"], PACKED["v"], None, torch.tensor([0, 9]), 3, 0, 1.0)


BAD_STEP = [
    ({"q": z(2, 2, 4, 8)}, r"`q` must have shape \[B, 1, HQ, D\]; got \[2, 2, 4, 8\]"),
    ({"q": z(3, 1, 4, 8)}, r"`q` must have shape \[B, 1, HQ, D\] with B=2; got \[3, 1, 4, 8\]"),
    ({"q": z(2, 1, 3, 8)}, r"`q` must have a number of heads HQ that is a multiple of HK=2; got 3"),
    ({"q": z(2, 1, 4, 8).double()}, r"`q` must have dtype float32 \(the dtype of `cache`\); got float64"),
    ({"k": z(2, 1, 3, 8)}, r"`k` must have shape \[B, 1, HK, D\] with HK=2; got \[2, 1, 3, 8\]"),
    ({"v": z(2, 1, 2, 8).half()}, r"`v` must have dtype float32 \(the dtype of `cache`\); got float16"),
    ({"v": z(2, 1, 2, 8).to("meta")}, r"`v` must be on cpu, the device of `cache`; got meta"),
    ({"cache": None}, r"`cache` must be a WindowCache; got NoneType"),
    ({"q_sinks": z(2, 2, 4, 8)}, r"`q_sinks` must have shape"),
    ({"q_sinks": z(2, 1, 4, 8).half()}, r"`q_sinks` must have dtype float32"),
    ({"active": z(3, dtype=torch.bool)}, r"`active` must have shape \[B\] with B=2; got \[3\]"),
    ({"active": z(2)}, r"`active` must have dtype bool; got float32"),
    ({"active": [True, True]}, r"`active` must be a torch.Tensor; got list"),
    ({"scale": -1.0}, r"`scale` must be greater than 0; got -1.0"),
]


@pytest.mark.parametrize("change, match", BAD_STEP)
def test_a_bad_argument_of_swa_step_is_named_and_leaves_the_cache_alone(change, match):
    cache = WindowCache.empty(2, 2, 8, window=4, sinks=1, dtype=torch.float32, device="cpu")
    good = {"q": z(2, 1, 4, 8), "k": z(2, 1, 2, 8) + 1, "v": z(2, 1, 2, 8) + 1, "cache": cache}
    with pytest.raises(ValueError, match=match):
        swa_step(**(good | change))
    assert all((t == 0).all() for t in cache.tensors().values())


@pytest.mark.parametrize(
    "change, match",
    [
        ({"batch": 0}, r"`batch` must be at least 1; got 0"),
        ({"heads_kv": 0}, r"`heads_kv` must be at least 1; got 0"),
        ({"head_dim": True}, r"`head_dim` must be an int of at least 1; got bool True"),
        ({"window": 0}, r"`window` must be at least 1; got 0"),
        ({"sinks": -1}, r"`sinks` must be at least 0; got -1"),
        ({"dtype": torch.int64}, r"`dtype` must be one of .*; got torch.int64"),
    ],
)
def test_a_bad_argument_of_empty_is_named(change, match):
    good = {"batch": 1, "heads_kv": 1, "head_dim": 1, "window": 1, "sinks": 0, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(ValueError, match=match):
        WindowCache.empty(**(good | change))


def test_append_checks_its_tokens():
    cache = WindowCache.empty(2, 2, 8, window=4, sinks=1, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"`k` must have shape \[B, T, HK, D\] with B=2; got \[1, 3, 2, 8\]"):
        cache.append(z(1, 3, 2, 8), z(1, 3, 2, 8))
    with pytest.raises(ValueError, match=r"`v` must have shape \[B, T, HK, D\] with T=3; got \[2, 4, 2, 8\]"):
        cache.append(z(2, 3, 2, 8), z(2, 4, 2, 8))
    with pytest.raises(ValueError, match=r"`k` must have dtype float32 \(the dtype of `cache`\); got float64"):
        cache.append(z(2, 3, 2, 8).double(), z(2, 3, 2, 8).double())
