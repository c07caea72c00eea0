"""`memory_input`: values, gradients and states of the reference and the plain vectorised form."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmem_ops import memory_input, memory_input_step
from allmem_ops.ops.memory_input.state import ConvTail
from allmem_ops.testing import assert_within_budget
from tests.ops.memory_input.cases import FULL, PACKED, Case, cases, gradients, outputs_of, plain, upstream


@given(cases())
def test_reference_equals_torchs_own_convolution_and_norms(case: Case):
    x, state = case.inputs(), case.state()
    want = plain(case, x, state)
    got = outputs_of(case.call(x, "reference", state))
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-12, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@given(cases())
def test_chunk_equals_reference_in_float64(case: Case):
    x, state = case.inputs(), case.state()
    want, got = (outputs_of(case.call(x, impl, state)) for impl in ("reference", "chunk"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-12, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert got[name].is_contiguous()
    do = upstream(want)
    want, got = gradients(want, x, do), gradients(got, x, do)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, atol=1e-10, rtol=1e-8, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("case", [Case(tokens=4, heads=2, width=3), dataclasses.replace(PACKED, heads=1, width=3)], ids=["dense", "packed"])
def test_gradcheck(case: Case, impl: str):
    x, state = case.inputs(), case.state()

    def f(*values):
        return tuple(outputs_of(case.call(dict(zip(x, values, strict=True)), impl, state)).values())

    assert torch.autograd.gradcheck(f, list(x.values()))


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@given(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_split_equals_one_pass(impl: str, taps: int, lengths: list[int]):
    case = Case(tokens=sum(lengths), taps=taps)
    x = case.inputs()
    state, parts = None, []
    for piece in x["projected"].split(lengths, 1):
        result = case.call({**x, "projected": piece}, impl, state, output_final_state=True)
        state = result.state
        parts.append(outputs_of(result))
    whole = case.call(x, impl, output_final_state=True)
    for name, value in outputs_of(whole).items():
        torch.testing.assert_close(torch.cat([p[name] for p in parts], 1), value)
    assert torch.equal(state.inputs, whole.state.inputs)


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4))
def test_packed_with_states_equals_separate(taps: int, lengths: list[tuple[int, int]]):
    """Two calls, each packing the next piece of every sequence; the state after both holds the last inputs of each."""
    one = Case(batch=1, taps=taps)
    x = one.inputs()
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randn(1, a + b, x["projected"].shape[2], generator=generator, dtype=torch.float64) for a, b in lengths]
    state, got = None, [[] for _ in sequences]
    for call in range(2):
        pieces = [s[:, :a] if call == 0 else s[:, a:] for s, (a, _) in zip(sequences, lengths, strict=True)]
        sizes = tuple(p.shape[1] for p in pieces)
        case = dataclasses.replace(one, lengths=sizes)
        result = case.call({**x, "projected": torch.cat(pieces, 1)}, "chunk", state, output_final_state=True)
        state = result.state
        for mine, part in zip(got, result.q.split(list(sizes), 1), strict=True):
            mine.append(part)
    for n, (mine, sequence) in enumerate(zip(got, sequences, strict=True)):
        separate = dataclasses.replace(one, tokens=sequence.shape[1]).call({**x, "projected": sequence}, "chunk", output_final_state=True)
        torch.testing.assert_close(torch.cat(mine, 1), separate.q)
        assert torch.equal(state.inputs[n], separate.state.inputs[0])


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@given(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_steps_equal_one_pass(impl: str, taps: int, lengths: list[int]):
    case = Case(tokens=sum(lengths), taps=taps)
    x = {name: v.detach() for name, v in case.inputs().items()}
    options = case.options()
    state = ConvTail.zeros(2, case.channels, taps, dtype=torch.float64)
    parts = []
    for piece in x["projected"].split(lengths, 1):
        result = memory_input_step(piece, *list(x.values())[1:3], state, q_norm=x["q_norm"], k_norm=x["k_norm"], impl=impl, **options)
        assert result.state is state
        parts.append(outputs_of(result))
    whole = case.call(x, impl, output_final_state=True)
    for name, value in outputs_of(whole).items():
        torch.testing.assert_close(torch.cat([p[name] for p in parts], 1), value)
    assert torch.equal(state.inputs, whole.state.inputs)


def test_an_inactive_row_keeps_its_state():
    case = Case(tokens=2, tail=True)
    x, state = case.inputs(), case.state()
    before = state.inputs.clone()
    active = torch.tensor([False, True])
    memory_input_step(x["projected"], x["conv_weight"], x["head_bias"], state, heads=3, active=active)
    assert torch.equal(state.inputs[0], before[0])
    assert torch.equal(state.inputs[1], torch.cat([before[1], x["projected"][1, :, : case.channels]])[-3:])


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_the_future_never_changes_the_past(impl: str):
    x = FULL.inputs()
    changed = {**x, "projected": torch.cat([x["projected"][:, :5], torch.randn_like(x["projected"][:, 5:])], 1)}
    for name, value in outputs_of(FULL.call(x, impl)).items():
        other = outputs_of(FULL.call(changed, impl))[name]
        assert torch.equal(value[:, :5], other[:, :5]) and not torch.equal(value[:, 5:], other[:, 5:]), name


@pytest.mark.parametrize("param_dtype", [None, torch.float32], ids=["one-dtype", "fp32-parameters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_within_the_budget(dtype: torch.dtype, param_dtype: torch.dtype | None):
    case = Case(tokens=111, width=24, l2_eps=1e-6)
    x = case.inputs(dtype, param_dtype)
    x64, low = ({n: v.detach().to(to).requires_grad_() for n, v in x.items()} for to in (torch.float64, dtype))
    got, exact, allowed = outputs_of(case.call(x, "chunk")), outputs_of(case.call(x64, "reference")), plain(case, low)
    for name, value in got.items():
        assert value.dtype == (torch.float32 if name in ("eta", "mu") else dtype)
        assert_within_budget(name, value, allowed[name], exact[name])
    do = upstream(got)
    got = gradients(got, x, do)
    exact = gradients(exact, x64, {n: g.double() for n, g in do.items()})
    allowed = gradients(allowed, low, {n: g.to(dtype) for n, g in do.items()})
    for name, grad in got.items():
        assert grad.dtype == x[name].dtype
        assert_within_budget(f"d{name}", grad, allowed[name], exact[name])


def test_unused_outputs_have_zero_gradients_and_no_input_is_changed():
    x = FULL.inputs()
    before = {name: v.detach().clone() for name, v in x.items()}
    want = torch.autograd.grad(FULL.call(x, "reference").q.sum(), [x["projected"], x["conv_weight"]])
    got = torch.autograd.grad(FULL.call(x, "chunk").q.sum(), [x["projected"], x["conv_weight"]])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(x[name], before[name]) for name in x)


def test_outputs_own_their_memory_where_nothing_is_left_to_compute():
    case = Case(batch=1, tokens=1, heads=1, norm=False, l2=False, silu=False)
    outputs = outputs_of(case.call(case.inputs(torch.float32), "chunk"))
    assert len({y.untyped_storage().data_ptr() for y in outputs.values()}) == len(outputs)


def test_a_state_moves_between_rows_and_resets():
    tail = ConvTail.zeros(3, 2, 4, dtype=torch.float32)
    tail.inputs.fill_(1)
    tail.reset([1])
    assert tail.inputs.sum((1, 2)).tolist() == [6, 0, 6]
    tail.reset()
    assert tail.inputs.abs().sum() == 0
    assert tail.nbytes == 3 * 3 * 2 * 4


_BAD = {
    "projected-integer": ({"projected": torch.zeros(2, 9, 60, dtype=torch.int64)}, "`projected` must have dtype .*; got int64"),
    "projected-2d": ({"projected": torch.zeros(2, 60)}, r"`projected` must have shape \[B, T, columns\]; got \[2, 60\]"),
    "projected-narrow": ({"projected": torch.zeros(2, 9, 56)}, r"`projected` must have at least 3\*H\*d \+ 4\*H = 57 columns; got 56"),
    "weight-rows": ({"conv_weight": torch.zeros(44, 4)}, r"`conv_weight` must have 3\*H\*d rows with H=3; got 44"),
    "weight-taps": ({"conv_weight": torch.zeros(45, 5)}, "`conv_weight` must have from 1 to 4 taps; got 5"),
    "weight-dtype": ({"conv_weight": torch.zeros(45, 4).half()}, "`conv_weight` must have dtype float32 .*; got float16"),
    "bias-size": ({"head_bias": torch.zeros(12)}, r"`head_bias` must have shape \[columns-C\] with columns-C=15; got \[12\]"),
    "one-norm": ({"k_norm": None}, "`k_norm` must be given with the other norm's weight, or neither; got None"),
    "norm-size": ({"q_norm": torch.ones(4)}, r"`q_norm` must have shape \[d\] with d=5; got \[4\]"),
    "heads-zero": ({"heads": 0}, "`heads` must be at least 1; got 0"),
    "activation": ({"qk_activation": "relu"}, "`qk_activation` must be one of 'silu', 'none'; got 'relu'"),
    "l2": ({"l2": 1}, "`l2` must be a bool; got int"),
    "eps": ({"norm_eps": -1.0}, "`norm_eps` must be at least 0.0; got -1.0"),
    "state-type": ({"initial_state": torch.zeros(2, 3, 45)}, "`initial_state` must be a ConvTail; got Tensor"),
    "state-rows": ({"initial_state": ConvTail.zeros(3, 45, 4, dtype=torch.float32)}, r"`initial_state.inputs` must have shape .* N=2; got"),
    "state-dtype": ({"initial_state": ConvTail.zeros(2, 45, 4, dtype=torch.float64)}, "`initial_state.inputs` must have dtype float32"),
    "packed-batch": ({"cu_seqlens": torch.tensor([0, 9])}, "`projected` must have batch size 1 with `cu_seqlens`; got 2"),
    "impl": ({"impl": "cuda"}, "`impl` must be one of 'reference', 'chunk', 'triton', 'auto'; got 'cuda'"),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_input_is_a_value_error_that_names_it(name: str):
    changes, message = _BAD[name]
    x = {**{n: v.detach() for n, v in FULL.inputs(torch.float32).items()}, "heads": 3}
    memory_input(x.pop("projected"), x.pop("conv_weight"), x.pop("head_bias"), **x)  # legal before it is changed
    x = {**FULL.inputs(torch.float32), "heads": 3, **changes}
    with pytest.raises(ValueError, match=message):
        memory_input(x.pop("projected"), x.pop("conv_weight"), x.pop("head_bias"), **x)


def test_a_step_takes_up_to_256_tokens():
    x = Case(batch=1, tokens=257).inputs(torch.float32)
    state = ConvTail.zeros(1, 45, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="`projected` must have from 1 to 256 tokens; got 257"):
        memory_input_step(x["projected"], x["conv_weight"], x["head_bias"], state, heads=3)
