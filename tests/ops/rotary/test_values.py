"""`rotary` in plain PyTorch: against complex numbers, gradcheck, chunk against reference, precision, checks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmem_ops import rotary, rotary_table
from allmem_ops.ops.rotary import chunk, registration
from allmem_ops.testing import assert_within_budget
from tests.ops.rotary.cases import Case, by_hand, gradients, plain

CASES = st.builds(
    Case,
    batch=st.integers(1, 3),
    tokens=st.integers(0, 7),
    heads=st.integers(1, 5),
    heads_kv=st.integers(0, 3),
    width=st.sampled_from([2, 4, 6, 16]),
    norms=st.booleans(),
    spread=st.booleans(),
)


def call(case: Case, x: dict, impl: str, **options: float):
    return rotary(*[x["qkv"], *case.table(x["qkv"].dtype)], q_norm=x["q_norm"], k_norm=x["k_norm"], impl=impl, **case.options(), **options)


@given(CASES)
def test_reference_is_the_product_of_complex_numbers(case: Case):
    x = case.inputs()
    for got, want in zip(call(case, x, "reference"), by_hand(case, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@given(CASES)
def test_chunk_equals_reference(case: Case):
    x = case.inputs()
    want, got = call(case, x, "reference"), call(case, x, "chunk")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and a.is_contiguous()
    want, got = gradients(want, x), gradients(got, x)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("case", [Case(tokens=3), Case(tokens=3, norms=False, spread=True), Case(heads_kv=0, tokens=2)])
def test_gradcheck(impl: str, case: Case):
    x = {name: value for name, value in case.inputs().items() if value is not None}
    names = list(x)

    def run(*values):
        x = {"q_norm": None, "k_norm": None} | dict(zip(names, values, strict=True))
        return tuple(y for y in call(case, x, impl, eps=0.1) if y.numel())

    torch.autograd.gradcheck(run, tuple(x.values()))


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_within_the_budget(impl: str, dtype: torch.dtype):
    case = Case(tokens=101, width=64)
    x = case.inputs(dtype, torch.float32)
    x64, low = ({n: v.detach().to(d).requires_grad_() for n, v in x.items()} for d in (torch.float64, dtype))
    got, exact, allowed = call(case, x, impl), call(case, x64, "reference"), plain(case, low)
    for name, *y in zip("qkv", got, allowed, exact, strict=True):
        assert_within_budget(name, *y)
        with pytest.raises(AssertionError):
            assert_within_budget(name, torch.zeros_like(y[0]), *y[1:])
    got, exact, allowed = gradients(got, x), gradients(exact, x64), gradients(allowed, low)
    for name, grad in got.items():
        assert grad.dtype == x[name].dtype
        assert_within_budget(f"d{name}", grad, allowed[name], exact[name])


def as_models_do(q, cos, sin):
    """q [B, T, H, D] turned by tables [B, T, D] of its own dtype, whose halves are equal: transformers' `apply_rotary_pos_emb`."""
    first, second = q.chunk(2, -1)
    return q * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_of_the_models_dtype_gives_the_models_bits(dtype: torch.dtype, impl: str, norm: bool):
    case = Case(heads=3, heads_kv=0, width=16, tokens=40, norms=norm)
    x = case.inputs(dtype)
    cos, sin = (t.to(dtype) for t in case.table(torch.float32))
    q = x["qkv"]
    if norm:
        wide = q.float()
        q = x["q_norm"] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    want = as_models_do(q, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    got = rotary(x["qkv"], cos, sin, heads=3, heads_kv=0, q_norm=x["q_norm"], impl=impl).q
    assert torch.equal(got, want)
    if not norm:
        up = torch.randn(want.shape).to(dtype)
        assert torch.equal(*(torch.autograd.grad(y, x["qkv"], up)[0] for y in (got, want)))


def test_positions_of_a_table():
    inv_freq = torch.tensor([1.0, 0.1], dtype=torch.float64)
    cos, sin = rotary_table(torch.tensor([[0, 3], [7, 1000]]), inv_freq)
    angle = torch.tensor([[[0, 0], [3, 0.3]], [[7, 0.7], [1000, 100]]], dtype=torch.float64)
    torch.testing.assert_close(cos, angle.cos())
    torch.testing.assert_close(sin, angle.sin())
    assert rotary_table(torch.tensor([[5]]), inv_freq.bfloat16())[0].dtype == torch.float32


def test_a_turn_keeps_lengths_and_products_depend_on_distances_alone():
    x = torch.randn(1, 5, 3, 8, dtype=torch.float64)
    inv_freq = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)

    def at(x, position):
        return rotary(x, *rotary_table(torch.full((1, 5), position), inv_freq), heads=3, heads_kv=0).q

    torch.testing.assert_close(at(x, 17).norm(dim=-1), x.norm(dim=-1))
    y = x.flip(1)
    torch.testing.assert_close((at(x, 3) * at(y, 1)).sum(-1), (at(x, 10) * at(y, 8)).sum(-1))


def test_backward_keeps_the_projection_only_for_norms():
    for case in (Case(), Case(norms=False)):
        x = case.inputs()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            call(case, x, "chunk")
        assert any(t.shape == x["qkv"].shape for t in saved) == case.norms


@pytest.mark.parametrize("case", [Case(), Case(norms=False, spread=True), Case(heads_kv=0)])
def test_opcheck(case: Case):
    x = case.inputs(torch.float32)
    inputs = x["qkv"], *case.table(torch.float32), x["q_norm"], x["k_norm"]
    torch.library.opcheck(registration.rotary_chunk, (*inputs, case.heads, case.heads_kv, 1e-6))
    up = [torch.randn(2, 5, n, 8) for n in (case.heads, case.heads_kv, case.heads_kv)]
    detached = [None if t is None else t.detach() for t in inputs]
    torch.library.opcheck(registration.rotary_chunk_bwd, (*up, *detached, 1e-6))


FAULTS = {
    "the turn's sign": ("first * cos + second * sin, second * cos - first * sin", "first * cos - second * sin, second * cos + first * sin"),
    "the mean's term": ("(dn * n).mean(-1, keepdim=True)", "0.0"),
    "the weight": ("dn = dz * weight.to(wide)", "dn = dz"),
    "the weight's gradient before the turn": ("dweight = (dz * n)", "dweight = (dy.to(wide) * n)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_backward_is_seen(fault: str):
    import inspect

    source = inspect.getsource(chunk)
    old, new = FAULTS[fault]
    assert source.count(old) == 1
    faulty: dict = {}
    exec(compile(source.replace(old, new), "faulty", "exec"), faulty)
    case = Case()
    x = case.inputs()
    want = gradients(call(case, x, "reference"), x)
    generator = torch.Generator().manual_seed(1)
    up = [torch.randn(2, 5, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2)]
    inputs = [x["qkv"].detach(), *case.table(torch.float64), x["q_norm"].detach(), x["k_norm"].detach(), 1e-6]
    got = faulty["rotary_backward"](*up, *inputs)
    assert max((a - b).abs().max() for a, b in zip(got, want.values(), strict=True)) > 1e-3
    right = chunk.rotary_backward(*up, *inputs)
    assert max((a - b).abs().max() for a, b in zip(right, want.values(), strict=True)) < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(1, 5, 7, 8)}, r"`qkv` must have shape \[B, T, HQ\+2\*HK, D\] with HQ\+2\*HK=8; got \[1, 5, 7, 8\]"),
        ({"qkv": torch.zeros(1, 5, 8, 7)}, "`qkv` must have an even number D of channels; got 7"),
        ({"qkv": torch.zeros(1, 5, 8, 8, dtype=torch.int32)}, "`qkv` must have dtype"),
        ({"cos": torch.zeros(1, 4, 4)}, r"`cos` must have shape \[1, T, D/2\] with T=5"),
        ({"sin": torch.zeros(2, 5, 4)}, r"`sin` must have shape \[B, T, D/2\] with B=1"),
        ({"cos": torch.zeros(1, 5, 4, dtype=torch.float16)}, "`cos` must have dtype float32"),
        ({"sin": torch.zeros(1, 5, 4, dtype=torch.float64)}, "`sin` must have dtype float32"),
        ({"heads": 0}, "`heads` must be at least 1; got 0"),
        ({"heads_kv": True}, "`heads_kv` must be an int"),
        ({"q_norm": torch.ones(8)}, "`k_norm` must be given with the other norm's weight, or neither"),
        ({"q_norm": torch.ones(7), "k_norm": torch.ones(8)}, r"`q_norm` must have shape \[D\] with D=8"),
        ({"q_norm": torch.ones(8), "k_norm": torch.ones(8).half()}, "`k_norm` must have dtype float32"),
        ({"eps": 0.0}, "`eps` must be greater than 0"),
        ({"impl": "cuda"}, "`impl` must be one of"),
    ],
)
def test_bad_arguments(change: dict, message: str):
    good = {"qkv": torch.zeros(1, 5, 8, 8), "cos": torch.zeros(1, 5, 4), "sin": torch.zeros(1, 5, 4), "heads": 4, "heads_kv": 2}
    rotary(**good)
    with pytest.raises(ValueError, match=message):
        rotary(**good | change)
