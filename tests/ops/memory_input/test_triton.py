"""`memory_input` with `impl="triton"`, on a GPU or in Triton's interpreter: values, gradients, state, and as a library operator."""

import dataclasses
import importlib.util
import inspect
import sys

import pytest
import torch
from hypothesis import given, settings

from allmem_ops import memory_input, memory_input_step
from allmem_ops.ops.kernels.configs import Config
from allmem_ops.ops.memory_input import launch, registration
from allmem_ops.ops.memory_input.kernels import bwd, fwd, heads, sums, walk
from allmem_ops.ops.memory_input.state import ConvTail
from allmem_ops.testing import assert_within_budget
from tests.ops.memory_input.cases import FULL, PACKED, Case, cases, gradients, outputs_of, plain, upstream

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]  # no bfloat16 in the interpreter
# Two heads of 8 channels a tile and spans of four tokens: several blocks of heads and spans at the tests' sizes.
SMALL = {("sm80", "rows"): [Config({"TILE": 16, "PER_SM": 64, "SPAN": 4}, 4, 1)]}


_IN_THE_INTERPRETER = pytest.mark.skipif(
    CUDA, reason="small tiles and faults are tried where nothing has to be compiled: in the interpreter"
)


@pytest.fixture
def _small(monkeypatch) -> None:
    monkeypatch.setattr(launch, "_FWD", SMALL)
    monkeypatch.setattr(launch, "_BWD", SMALL)
    monkeypatch.setattr(launch, "_HEADS", (2, 8))
    monkeypatch.setattr(launch, "_SUM_ROWS", 2)
    monkeypatch.setattr(launch, "sm_count", lambda device: 1)


def check(case: Case, x: dict) -> None:
    """Outputs and gradients within the error budget, and the budget sees a zeroed one."""
    dtype = x["projected"].dtype
    x64, low = ({n: None if v is None else v.detach().to(to).requires_grad_() for n, v in x.items()} for to in (torch.float64, dtype))
    state = case.state(dtype)
    state64 = None if state is None else ConvTail(state.inputs.double())
    mine = {n: None if v is None else v.detach().to(DEVICE).requires_grad_() for n, v in x.items()}
    got = outputs_of(case.call(mine, "triton", None if state is None else state.to(DEVICE)))
    exact, allowed = outputs_of(case.call(x64, "reference", state64)), plain(case, low, state)
    for name, value in got.items():
        assert value.dtype == (torch.float32 if name in ("eta", "mu") else dtype) and value.is_contiguous()
        assert_within_budget(name, value, allowed[name], exact[name])
    do = upstream({n: y.cpu() for n, y in got.items()})
    got = gradients(got, mine, {n: g.to(DEVICE) for n, g in do.items()})
    exact = gradients(exact, x64, {n: g.double() for n, g in do.items()})
    allowed = gradients(allowed, low, {n: g.to(dtype) for n, g in do.items()})
    for name, grad in got.items():
        assert grad.dtype == x[name].dtype
        assert_within_budget(f"d{name}", grad, allowed[name], exact[name])
        with pytest.raises(AssertionError):
            assert_within_budget(f"d{name}", torch.zeros_like(grad), allowed[name], exact[name])


def compare(case: Case) -> None:
    """Outputs and gradients near those of the reference in float32."""
    x, state = case.inputs(torch.float32), case.state(torch.float32)
    mine = {n: None if v is None else v.detach().to(DEVICE).requires_grad_() for n, v in x.items()}
    want, got = (
        outputs_of(case.call(x, "reference", state)),
        outputs_of(case.call(mine, "triton", None if state is None else state.to(DEVICE))),
    )
    do = upstream(want)
    want_grads, got_grads = gradients(want, x, do), gradients(got, mine, {n: g.to(DEVICE) for n, g in do.items()})
    for name, value in (want | {f"d{n}": g for n, g in want_grads.items()}).items():
        mine = got[name] if name in got else got_grads[name[1:]]
        torch.testing.assert_close(mine.cpu(), value, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=2 if CUDA else 6)  # every example is compiled on a GPU
@given(cases())
def test_every_form_equals_the_reference(case: Case):
    compare(case)


@_IN_THE_INTERPRETER
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, tokens=9, heads=3, width=6),
        Case(tokens=5, heads=1, width=3, taps=2),
        Case(tokens=9, heads=1, width=5, taps=3, tail=True, batch=1),
        Case(lengths=(3, 0, 1, 6), tail=True, heads=2, width=5),
        Case(lengths=(5, 4), heads=2, width=4, taps=2, l2=False),
    ],
    ids=str,
)
def test_many_small_spans(case: Case):
    compare(case)


@pytest.mark.parametrize("param_dtype", [None, torch.float32], ids=["one-dtype", "fp32-parameters"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_is_within_the_budget(dtype: torch.dtype, param_dtype: torch.dtype | None):
    case = Case(batch=1, tokens=2001 if CUDA else 19, heads=8 if CUDA else 2, width=64 if CUDA else 24, gates=8 if CUDA else 2, l2_eps=1e-6)
    check(case, case.inputs(dtype, param_dtype))


@pytest.mark.skipif(not CUDA, reason="a GPU's sizes")
@pytest.mark.parametrize(
    "heads,width,gates,lengths", [(8, 64, 8, (700, 0, 1, 1300)), (9, 60, 0, None), (4, 128, 512, None), (1, 1024, 1, (3, 2000))]
)
def test_model_sizes(heads: int, width: int, gates: int, lengths: tuple | None):
    case = Case(batch=2, tokens=1001, heads=heads, width=width, gates=gates, lengths=lengths, tail=lengths is not None)
    check(case, case.inputs(torch.bfloat16, torch.float32))


def test_small_and_large_rates_keep_their_digits():
    case = Case(batch=1, tokens=8, heads=2, width=4)
    x = {n: v.detach() for n, v in case.inputs(torch.float32).items()}
    logits = x["projected"][..., case.channels :]
    logits.copy_(torch.linspace(-30, 30, logits.numel()).view_as(logits))
    x["head_bias"].zero_()
    eta = case.call({n: v.to(DEVICE) for n, v in x.items()}, "triton").eta.cpu().double()
    want = torch.nn.functional.softplus(logits[..., : 3 * case.heads].double(), threshold=50).view_as(eta)
    torch.testing.assert_close(eta, want, rtol=5e-6, atol=0)  # log(1 + e^x) as it stands is 5e-4 off at -9 and 0 from -17 on


def _step(case: Case, x: dict, state: ConvTail, impl: str, active=None):
    rest = {"q_norm": x["q_norm"], "k_norm": x["k_norm"], "heads": case.heads, "l2_eps": case.l2_eps}
    return outputs_of(memory_input_step(x["projected"], x["conv_weight"], x["head_bias"], state, active=active, impl=impl, **rest))


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
def test_a_step_equals_chunk_and_moves_the_active_rows_on(taps: int, tokens: int):
    case = Case(tokens=tokens, taps=taps, tail=True, heads=1)
    x = {n: v.detach() for n, v in case.inputs(torch.float32).items()}
    mine = {n: v.to(DEVICE) for n, v in x.items()}
    state, active = case.state(torch.float32), torch.tensor([True, False])
    ours = state.clone().to(DEVICE)
    version = ours.inputs._version
    want, got = _step(case, x, state, "chunk", active), _step(case, mine, ours, "triton", active.to(DEVICE))
    for name, value in want.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=1e-4, atol=2e-5)
    assert torch.equal(ours.inputs.cpu(), state.inputs)
    assert taps == 1 or ours.inputs._version > version


def test_strided_slices_of_one_projection_are_read_in_place(monkeypatch: pytest.MonkeyPatch):
    case = dataclasses.replace(FULL, tokens=3, heads=2)
    x = {n: v.detach().to(DEVICE) for n, v in case.inputs(torch.float32).items()}
    B, T, columns = x["projected"].shape
    wide = torch.randn(B, T, columns + 7, device=DEVICE)
    wide[..., 3 : 3 + columns] = x["projected"]
    tokens_last = x["projected"].transpose(1, 2).contiguous().transpose(1, 2)
    want = case.call(x, "triton")
    do = {n: g.to(DEVICE) for n, g in upstream({n: y.cpu() for n, y in outputs_of(want).items()}).items()}
    leaves = {n: v.clone().requires_grad_() for n, v in x.items()}
    want_grads = gradients(outputs_of(case.call(leaves, "triton")), leaves, do)
    heads_first = {n: g.transpose(1, 2).contiguous().transpose(1, 2) if g.dim() == 4 else g for n, g in do.items()}
    for projected in (wide[..., 3 : 3 + columns], tokens_last):
        mine = {n: v.clone().requires_grad_() for n, v in x.items()} | {"projected": projected.detach().requires_grad_()}
        assert mine["projected"].stride() == projected.stride()
        for copy in ("clone", "reshape"):  # what a copy would take
            monkeypatch.setattr(torch.Tensor, copy, None)
        got = outputs_of(case.call(mine, "triton"))
        got_grads = gradients(got, mine, heads_first)
        monkeypatch.undo()
        for name, value in outputs_of(want).items():
            assert torch.equal(got[name], value), name
        for name, value in want_grads.items():
            assert torch.equal(got_grads[name], value), name


def test_expanded_gradients():
    case = Case(tokens=3, heads=1)
    x = {n: v.detach().to(DEVICE).requires_grad_() for n, v in case.inputs(torch.float32).items()}
    result = outputs_of(case.call(x, "triton"))
    ones = {n: torch.ones((), device=DEVICE, dtype=y.dtype).expand(y.shape) for n, y in result.items()}  # what `y.sum()` hands back
    got, want = gradients(result, x, ones), gradients(outputs_of(case.call(x, "chunk")), x, ones)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("case", [Case(tokens=6, heads=2, batch=1), dataclasses.replace(PACKED, heads=2)], ids=["dense", "packed"])
def test_two_runs_are_bitwise_equal(case: Case):
    x = {n: v.detach().to(DEVICE).requires_grad_() for n, v in case.inputs(torch.float32).items()}
    runs = []
    for _ in range(2):
        result = outputs_of(case.call(x, "triton", None if not case.tail else case.state(torch.float32, DEVICE)))
        do = {n: g.to(DEVICE) for n, g in upstream({n: y.cpu() for n, y in result.items()}).items()}
        runs.append((*result.values(), *gradients(result, x, do).values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_offsets_of_a_pack_that_are_wrong_read_and_write_nothing_outside():
    """On a GPU the values of `cu_seqlens` are not checked; the kernels see positions clamped into the pack."""
    x = {n: v.detach().to(DEVICE) for n, v in Case(batch=1, tokens=6, heads=1).inputs(torch.float32).items()}
    for offsets in ([0, -5, 90], [3, 1, 2], [7, 8, 9]):
        operands = x["projected"], x["conv_weight"], x["head_bias"], x["q_norm"], x["k_norm"], None
        outputs = registration.memory_input_triton(*operands, torch.tensor(offsets, device=DEVICE), 1, True, True, 1e-6, 1e-6)
        assert all(torch.isfinite(y).all() for y in outputs)


@pytest.mark.parametrize("lengths", [None, (1, 1)], ids=["dense", "packed"])
def test_opcheck(lengths: tuple | None):
    case = Case(batch=1, tokens=1, heads=1, width=2, taps=2, gates=1, lengths=lengths, tail=lengths is not None)
    x = {n: v.detach().to(DEVICE).requires_grad_() for n, v in case.inputs(torch.float32).items()}
    state = case.state(torch.float32, DEVICE)
    tail, offsets = None if state is None else state.inputs, case.offsets(DEVICE)
    rest = (case.heads, True, True, 1e-6, 1e-3)
    detached = [v.detach() for v in x.values()]
    do = list(upstream(outputs_of(case.call(x, "chunk", state))).values())
    for impl in ("triton", "chunk"):
        torch.library.opcheck(getattr(registration, f"memory_input_{impl}"), (*x.values(), tail, offsets, *rest))
        torch.library.opcheck(getattr(registration, f"memory_input_{impl}_bwd"), (*do, *detached, tail, offsets, *rest))
    if offsets is None:
        tail = torch.randn(1, 1, case.channels, device=DEVICE)
        operands = (*detached, tail, None, *rest)
        torch.library.opcheck(registration.memory_input_step_triton, operands, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", ["chunk", "triton"])
def test_compiles_whole_and_does_not_recompile_for_another_length(impl: str):
    case = Case(batch=1, heads=1, width=4)
    torch._dynamo.reset()  # the other parameter's compilations

    @torch.compile(fullgraph=True, dynamic=True, backend="inductor" if CUDA else "aot_eager")
    def block(projected, conv_weight, head_bias, q_norm, k_norm):
        return memory_input(projected, conv_weight, head_bias, heads=1, q_norm=q_norm, k_norm=k_norm, impl=impl)[:6]

    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 3):
            x = dataclasses.replace(case, tokens=tokens).inputs(torch.float32)
            x = {n: v.detach().to(DEVICE).requires_grad_() for n, v in x.items()}
            got = outputs_of(block(*x.values()))
            want = outputs_of(case.call(x, impl, cu_seqlens=None, l2_eps=1e-6))
            do = {n: torch.ones_like(y) for n, y in want.items()}
            for a, b in zip(got.values(), want.values(), strict=True):
                torch.testing.assert_close(a, b)
            for a, b in zip(gradients(got, x, do).values(), gradients(want, x, do).values(), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs")
def test_forward_backward_and_step_in_a_cuda_graph():
    case = Case(lengths=(300, 1, 399), heads=8, width=64)
    x = {n: v.detach().to(DEVICE).requires_grad_() for n, v in case.inputs(torch.bfloat16, torch.float32).items()}
    offsets = case.offsets(DEVICE)
    state = ConvTail.zeros(1, case.channels, 4, dtype=torch.bfloat16, device=DEVICE)
    small = {n: v.detach() for n, v in x.items()} | {"projected": x["projected"][:, :1].detach()}

    def both():
        result = outputs_of(case.call(x, "triton", cu_seqlens=offsets))
        return *result.values(), *gradients(result, x, {n: torch.ones_like(y) for n, y in result.items()}).values()

    def step():
        return tuple(_step(case, small, state, "triton").values())

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both(), step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
        stepped = step()
    offsets.copy_(torch.tensor([0, 500, 500, 700]))
    state.inputs.normal_()
    kept = state.clone()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))
    after = state.clone()
    state.copy_([0], kept, [0])
    assert all(torch.equal(a, b) for a, b in zip(stepped, step(), strict=True))
    assert torch.equal(after.inputs, state.inputs)


def test_what_no_kernel_takes():
    with pytest.raises(ValueError, match="`impl` 'triton' needs one of bfloat16, float16, float32; got float64"):
        FULL.call(FULL.inputs(), "triton")
    case = Case(batch=1, tokens=1, heads=1, width=1025)
    x = {n: v.detach().to(DEVICE) for n, v in case.inputs(torch.float32).items()}
    with pytest.raises(ValueError, match="`conv_weight` must have heads of at most 1024 channels with `impl`='triton'; got 1025"):
        case.call(x, "triton")
    assert case.call(x, "auto").q.shape == (1, 1, 1, 1025)


_TAIL_OF_A_SPAN = (
    "b_x += tl.load(p_tail + o_tail + (TAPS - 1 + position - j) * C, mask=below(m_x, position, j), other=0.0).to(tl.float32)\n"
    "    return b_x\n\n\n@triton.jit\ndef within"
)
_FAULTS = {
    "taps in the wrong order": (walk, "b_c = b_x * b_w", "b_c = b_x * b_w3"),
    "a span starts from zeros": (walk, "b_x = tl.load(p_x + tl.cast(i_t - j", "b_x = 0 * tl.load(p_x + tl.cast(i_t - j"),
    "a pack is one sequence": (walk, "b_x = tl.where(position >= j, b_x, 0.0)", "b_x = b_x"),
    "a span without its tail": (walk, _TAIL_OF_A_SPAN, "pass\n    return b_x\n\n\n@triton.jit\ndef within"),
    "a pack without its tails": (walk, "b_x, 0.0)\n        if p_tail is not None:", "b_x, 0.0)\n        if False:"),
    "the norm over the padded width": (walk, "tl.sum(b_y * b_y, 1) / W", "tl.sum(b_y * b_y, 1) / (W + 1)"),
    "L2 before the RMSNorm's factor": (walk, "* (b_r * b_r) + l2_eps", "+ l2_eps"),
    "the third token shifted": (fwd, "b_c, b_b, b_a, b_x1, b_w", "b_c, b_b, b_x1, b_a, b_w"),
    "v with a norm's activation only": (fwd, "TAPS, True, False, False, FAST", "TAPS, False, False, False, FAST"),
    "the gradient of SiLU": (bwd, "b_s + b_y * (1 - b_s)", "b_s"),
    "the L2 norm's projection": (bwd, "b_dy -= b_z * (b_rl * b_dot)", "b_dy -= 0.0"),
    "what the L2 norm leaves of the mean": (bwd, "b_dot *= l2_eps * b_l * b_l", "b_dot *= 1.0"),
    "the RMSNorm's mean": (bwd, "b_y * (b_r * b_r * b_dot / W)", "b_y * 0.0"),
    "sums over a span's neighbours too": (bwd, "b_own = tl.where(own, b_dc, 0.0)", "b_own = b_dc"),
    "norm sums over a span's neighbours too": (bwd, "tl.where(own, b_rl, 0.0)", "b_rl"),
    "gradients stop at a span": (bwd, "tl.range(first, end + (TAPS - 1), 2)", "tl.range(first, end, 2)"),
    "gradients cross into the next sequence": (bwd, "b_dc3 = tl.where(position >= 3, b_dc, 0.0)", "b_dc3 = b_dc"),
    "eta's slope": (heads, "b_deta * b_s +", "b_deta +"),
    "mu's slope": (heads, "b_s * (1 - b_s)", "b_s"),
    "the bias's sum of one block": (heads, "b_sum += b_dx", "b_sum = b_dx"),
    "taps swapped in the sums": (sums, "o_c % C * TAPS + o_c // C", "o_c % C * TAPS + (TAPS - 1 - o_c // C)"),
}  # fmt: skip
_KERNELS = [name for name in vars(launch) if name.startswith("memory_input_") and name.endswith("_kernel")]
_FAULT_CASES = (
    Case(batch=1, tokens=9, heads=1, width=6, gates=1, l2_eps=0.5, tail=True),
    Case(lengths=(3, 2), tail=True, heads=1, width=6, gates=0),
)


def _compare_all() -> None:
    for case in _FAULT_CASES:
        compare(case)


@pytest.mark.usefixtures("_small")
def test_the_comparison_passes_without_a_fault():
    _compare_all()


@_IN_THE_INTERPRETER
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("fault", _FAULTS)
def test_a_fault_in_a_kernel_is_seen(fault: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    module, old, new = _FAULTS[fault]
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"the fault no longer fits the source: {old!r}"
    replaced = {}
    for other in (walk, heads, fwd, bwd, sums):  # those that import the faulty one follow it
        text = source.replace(old, new) if other is module else inspect.getsource(other)
        file = tmp_path / f"faulty_{other.__name__.rsplit('.', 1)[1]}.py"
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        copy = importlib.util.module_from_spec(spec)
        with monkeypatch.context() as patch:
            if module in (walk, heads) and (name := module.__name__.rsplit(".", 1)[1]) in replaced:
                patch.setitem(sys.modules, module.__name__, replaced[name])
            spec.loader.exec_module(copy)
        replaced[other.__name__.rsplit(".", 1)[1]] = copy
    for name in _KERNELS:
        for copy in replaced.values():
            if hasattr(copy, name):
                monkeypatch.setattr(launch, name, getattr(copy, name))
    with pytest.raises(AssertionError):
        _compare_all()
