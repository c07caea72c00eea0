"""`rotary` with `impl="triton"`: on a GPU, or in Triton's interpreter."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from allmem_ops import rotary, rotary_table
from allmem_ops.ops.kernels import replay
from allmem_ops.ops.kernels.configs import Config
from allmem_ops.ops.rotary import launch, registration
from allmem_ops.ops.rotary.kernels import bwd, fwd, rows
from allmem_ops.testing import assert_within_budget
from tests.ops.rotary.cases import Case, gradients, plain
from tests.ops.rotary.test_values import CASES, as_models_do

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]  # no bfloat16 in the interpreter
SMALL = {("sm80", "rows"): [Config({"TILE": 32, "HEADS": 2, "PER_SM": 4}, 4, 1)]}


def to(x: dict, device: torch.device) -> dict:
    return {name: None if v is None else v.detach().to(device).requires_grad_() for name, v in x.items()}


def call(case: Case, x: dict, impl: str):
    table = case.table(x["qkv"].dtype, x["qkv"].device)
    return rotary(x["qkv"], *table, q_norm=x["q_norm"], k_norm=x["k_norm"], impl=impl, **case.options())


def check(case: Case, x: dict, device: torch.device) -> None:
    """Outputs and every gradient within the error budget, and the budget sees a zeroed one."""
    x64, low = (
        {n: None if v is None else v.detach().to(d).requires_grad_() for n, v in x.items()} for d in (torch.float64, x["qkv"].dtype)
    )
    ours = to(x, device)
    got, exact, allowed = call(case, ours, "triton"), call(case, x64, "reference"), plain(case, low)
    for name, y, y_low, y64 in zip("qkv", got, allowed, exact, strict=True):
        assert y.dtype == x["qkv"].dtype
        assert_within_budget(name, y, y_low, y64)
    got, exact, allowed = gradients(got, ours), gradients(exact, x64), gradients(allowed, low)
    for name, grad in got.items():
        assert grad.dtype == x[name].dtype and grad.shape == x[name].shape, name
        assert_within_budget(f"d{name}", grad, allowed[name], exact[name])
        with pytest.raises(AssertionError):
            assert_within_budget(f"d{name}", torch.zeros_like(grad), allowed[name], exact[name])


# On a GPU the sizes of models loop over many tiles as it is.
@pytest.fixture(params=["tiles as pinned"] if CUDA else ["tiles as pinned", "many small tiles"])
def _tiles(request, monkeypatch) -> None:
    if request.param == "many small tiles":
        monkeypatch.setattr(launch, "_FWD", SMALL)
        monkeypatch.setattr(launch, "_BWD", SMALL)


@settings(max_examples=3 if CUDA else 20)  # every example is compiled on a GPU
@given(CASES)
def test_every_form_equals_the_reference(case: Case):
    x = case.inputs(torch.float32)
    ours = to(x, torch.device("cuda" if CUDA else "cpu"))
    want, got = call(case, x, "reference"), call(case, ours, "triton")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)
    got = gradients(got, ours)
    for name, grad in gradients(want, x).items():
        torch.testing.assert_close(got[name].cpu(), grad, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"d{name}: {m}")


ODD = [
    Case(tokens=7, heads=9, heads_kv=3, width=24),
    Case(tokens=1, heads=1, heads_kv=1, width=2),
    Case(tokens=17, heads=4, heads_kv=1, width=96, batch=1),
    Case(tokens=9, heads=5, heads_kv=0, width=20),
    Case(tokens=9, heads=7, heads_kv=7, width=10, norms=False),
    Case(batch=3, tokens=9, heads=6, heads_kv=2, width=16, spread=True),
]


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_shapes(case: Case, device: torch.device):
    check(case, case.inputs(torch.float32), device)


@pytest.mark.parametrize("param_dtype", [None, torch.float32], ids=["one-dtype", "fp32-weights"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [Case(width=64), Case(width=32, norms=False, spread=True)])
def test_low_precision_is_within_the_budget(case: Case, dtype: torch.dtype, param_dtype: torch.dtype | None, device: torch.device):
    case = Case(**{**vars(case), "tokens": 2000 if CUDA else 61})
    check(case, case.inputs(dtype, param_dtype), device)


@pytest.mark.skipif(not CUDA, reason="a GPU's sizes")
@pytest.mark.parametrize(("heads", "heads_kv", "width"), [(16, 8, 128), (9, 3, 64), (12, 2, 256)])
def test_model_sizes(heads: int, heads_kv: int, width: int, device: torch.device):
    case = Case(batch=1, tokens=8001, heads=heads, heads_kv=heads_kv, width=width)
    check(case, case.inputs(torch.bfloat16), device)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_table_of_the_models_dtype_gives_the_models_bits(dtype: torch.dtype, device: torch.device):
    case = Case(heads=3, heads_kv=0, width=64, tokens=500 if CUDA else 20, norms=False)
    x = to(case.inputs(dtype), device)
    cos, sin = (t.to(dtype) for t in case.table(torch.float32, device))
    want = as_models_do(x["qkv"], torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    got = rotary(x["qkv"], cos, sin, heads=3, heads_kv=0, impl="triton").q
    assert torch.equal(got, want)
    up = torch.randn(want.shape, device=device).to(dtype)
    assert torch.equal(*(torch.autograd.grad(y, x["qkv"], up)[0] for y in (got, want)))


def test_norms_with_a_table_of_the_models_dtype(device: torch.device):
    """As the plain form, but for float32 sums in another order, which move a rounding here and there."""
    case = Case(width=64, tokens=500 if CUDA else 20)
    x = case.inputs(torch.float16)
    cos, sin = (t.half() for t in case.table(torch.float32))
    ours = to(x, device)
    options = {**case.options(), "impl": "triton"}
    got = rotary(ours["qkv"], cos.to(device), sin.to(device), q_norm=ours["q_norm"], k_norm=ours["k_norm"], **options)
    want = rotary(x["qkv"], cos, sin, q_norm=x["q_norm"], k_norm=x["k_norm"], **options | {"impl": "chunk"})
    for a, b in zip(got, want, strict=True):
        assert (a.cpu() != b).float().mean() < 0.01
        torch.testing.assert_close(a.cpu(), b, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(gradients(got, ours)["qkv"].cpu(), gradients(want, x)["qkv"], rtol=1e-2, atol=1e-2)


def test_weights_of_two_dtypes(device: torch.device):
    case = Case()
    x = case.inputs(torch.float16)
    x["k_norm"] = x["k_norm"].detach().float().requires_grad_()
    ours = to(x, device)
    got = gradients(call(case, ours, "triton"), ours)
    for name, want in gradients(call(case, x, "chunk"), x).items():
        assert got[name].dtype == want.dtype
        torch.testing.assert_close(got[name].cpu(), want, rtol=2e-3, atol=2e-3)


def test_strided_inputs_and_expanded_gradients(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    case = Case(batch=3, tokens=6, spread=True)
    x = case.inputs(torch.float32)
    cos, sin = case.table(torch.float32)
    strided = {
        "qkv": x["qkv"].detach().to(device).permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        **{n: torch.stack([x[n].detach().to(device)] * 2, -1)[:, 0] for n in ("q_norm", "k_norm")},
    }
    strided = {n: v.requires_grad_() for n, v in strided.items()}
    table = cos.to(device).transpose(0, 2).contiguous().transpose(0, 2), torch.cat([sin, sin], -1).to(device)[..., :4]
    assert strided["qkv"].stride() != x["qkv"].stride() and strided["q_norm"].stride() == (2,)
    # Strides go to the kernel; no copy is made on the way.
    for copy in ("contiguous", "clone"):
        monkeypatch.setattr(torch.Tensor, copy, None)
    y = rotary(strided["qkv"], *table, q_norm=strided["q_norm"], k_norm=strided["k_norm"], impl="triton", **case.options())
    up = [torch.ones((), device=device).expand(t.shape) for t in y]
    got = torch.autograd.grad(list(y), list(strided.values()), up)
    monkeypatch.undo()
    want = call(case, x, "reference")
    for a, b in zip(y, want, strict=True):
        torch.testing.assert_close(a.cpu(), b)
    want = torch.autograd.grad([t.sum() for t in want], list(x.values()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


def test_outputs_without_a_gradient_count_as_zero(device: torch.device):
    x = to(Case().inputs(torch.float32), device)
    for i in range(3):
        outputs = call(Case(), x, "triton")
        up = [torch.ones_like(y) if j == i else torch.zeros_like(y) for j, y in enumerate(outputs)]
        want = torch.autograd.grad(list(outputs), x["qkv"], up)[0]
        (got,) = torch.autograd.grad(call(Case(), x, "triton")[i].sum(), x["qkv"])
        assert torch.equal(got, want) and got.any()


def test_two_runs_give_the_same_bits(device: torch.device):
    case = Case(tokens=4001 if CUDA else 20, heads=9, heads_kv=3, width=64)
    x = to(case.inputs(torch.float32), device)
    first, second = (gradients(call(case, x, "triton"), x) for _ in range(2))
    for name, grad in first.items():
        assert torch.equal(grad, second[name]), name


def test_the_library_operator_gives_the_same_bits(device: torch.device):
    """As called under torch.compile: there v is a copy."""
    case = Case(tokens=40)
    x = to(case.inputs(torch.float32), device)
    direct = call(case, x, "triton")
    operator = registration.rotary_triton(x["qkv"], *case.table(torch.float32, device), x["q_norm"], x["k_norm"], 4, 2, 1e-6)
    assert direct.v.data_ptr() != operator[2].data_ptr() and direct.v.untyped_storage().data_ptr() == x["qkv"].untyped_storage().data_ptr()
    for a, b in zip(direct, operator, strict=True):
        assert torch.equal(a, b)
    a, b = gradients(direct, x), gradients(operator, x)
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("case", [Case(), Case(norms=False, spread=True), Case(heads_kv=0)])
def test_opcheck(case: Case, device: torch.device):
    x = to(case.inputs(torch.float32), device)
    inputs = x["qkv"], *case.table(torch.float32, device), x["q_norm"], x["k_norm"]
    torch.library.opcheck(registration.rotary_triton, (*inputs, case.heads, case.heads_kv, 1e-6))
    up = [torch.randn(2, 5, n, 8, device=device) for n in (case.heads, case.heads_kv, case.heads_kv)]
    detached = [None if t is None else t.detach() for t in inputs]
    torch.library.opcheck(registration.rotary_triton_bwd, (*up, *detached, 1e-6))


def test_compiles_whole_and_does_not_recompile_for_another_length(device: torch.device):
    def block(qkv, cos, sin, q_norm, k_norm):
        return rotary(qkv, cos, sin, heads=4, heads_kv=2, q_norm=q_norm, k_norm=k_norm, impl="triton")

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="inductor" if CUDA else "aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 17, 64):
            case = Case(tokens=tokens)
            x = to(case.inputs(torch.float32), device)
            inputs = x["qkv"], *case.table(torch.float32, device), x["q_norm"], x["k_norm"]
            want, got = block(*inputs), compiled(*inputs)
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b)
            want, got = gradients(want, x), gradients(got, x)
            assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.skipif(not CUDA, reason="compiled kernels are counted")
def test_kernels_are_not_compiled_again_for_another_length(device: torch.device):
    kernels = (launch.rotary_fwd_kernel, launch.rotary_bwd_kernel, launch.rotary_bwd_sums_kernel)

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    for tokens in (64, 1, 2, 15, 16, 17, 1024, 4097):
        case = Case(batch=1, tokens=tokens, width=64)
        x = to(case.inputs(torch.float32), device)
        gradients(call(case, x, "triton"), x)
        if tokens == 64:
            before = compiled()
    assert compiled() == before


def test_checkpointing(device: torch.device):
    from torch.utils.checkpoint import checkpoint

    x = to(Case().inputs(torch.float32), device)
    want = gradients(call(Case(), x, "triton"), x)
    got = gradients(checkpoint(lambda qkv: call(Case(), x | {"qkv": qkv}, "triton"), x["qkv"], use_reentrant=False), x)
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs")
def test_forward_and_backward_in_a_cuda_graph(device: torch.device):
    case = Case(tokens=700, width=64)
    x = to(case.inputs(torch.bfloat16), device)
    table = case.table(torch.float32, device)
    up = [torch.randn(2, 700, n, 64, device=device).bfloat16() for n in (4, 2, 2)]

    def both() -> tuple[torch.Tensor, ...]:
        y = rotary(x["qkv"], *table, q_norm=x["q_norm"], k_norm=x["k_norm"], **case.options())
        return *y, *torch.autograd.grad(list(y), list(x.values()), up)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        for v in x.values():
            v.copy_(torch.randn_like(v))
    graph.replay()
    for a, b in zip(captured, both(), strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits(device: torch.device):
    far = 2**30 + 8  # elements between two tokens
    storage = torch.empty(2 * far + 64, dtype=torch.float16, device=device)  # on a CPU only the touched pages exist
    qkv = storage.as_strided((1, 3, 4, 8), (0, far, 8, 1))
    qkv.copy_(torch.randn(qkv.shape))
    case = Case(batch=1, tokens=3, heads=2, heads_kv=1, norms=False)
    got = call(case, {"qkv": qkv, "q_norm": None, "k_norm": None}, "triton")
    want = call(case, {"qkv": qkv.clone().cpu(), "q_norm": None, "k_norm": None}, "chunk")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_wide_heads_go_to_the_plain_form(device: torch.device):
    width = registration.MAX_HEAD_DIM + 2
    qkv, table = torch.randn(1, 2, 1, width, device=device), torch.zeros(1, 2, width // 2, device=device)
    assert not rotary(qkv, table, table, heads=1, heads_kv=0).q.any()
    with pytest.raises(ValueError, match="`qkv` must have heads of at most 2048 channels"):
        rotary(qkv, table, table, heads=1, heads_kv=0, impl="triton")


FAULTS = {
    "the turn's sign": (rows, "p_table) - rounded", "p_table) + rounded"),
    "the second half's cosine": (rows, "rounded(b_x2 * b_cos, p_table)", "rounded(b_x2, p_table)"),
    "a norm over half a head": (rows, "b_x1 * b_x1 + b_x2 * b_x2", "b_x1 * b_x1"),
    "q's weight for k": (fwd, "p_cos, p_sin, p_k_norm, p_k", "p_cos, p_sin, p_q_norm, p_k"),
    "q in the place of k": (fwd, "p_x + HQ * s_x_h", "p_x"),
    "every sequence at the first one's positions": (fwd, "p_cos += i_b * s_cos_b", "p_cos += 0"),
    "the first block of heads for all": (rows, "i_h * BH + tl.cast", "tl.cast"),
    "the gradient turned forwards": (bwd, "b_cos, -b_sin", "b_cos, b_sin"),
    "the mean's term": (bwd, "b_n1 * b_mean", "b_n1 * 0.0"),
    "k's norm of q": (bwd, "o_x + HQ * s_x_h", "o_x"),
    "v's gradient in k's place": (bwd, "p_dx + (HQ + HK) * 2 * W", "p_dx + HQ * 2 * W"),
    "the weight's gradient of the last tile only": (bwd, "b_sum1 += b_dx1 * b_n1", "b_sum1 = b_dx1 * b_n1"),
    "k's sums in q's rows": (bwd, "groups * Q_BLOCKS + i_g * K_BLOCKS", "i_g * K_BLOCKS"),
    "sums of the first program only": (bwd, "column_sums(p_sums, rows,", "column_sums(p_sums, 1,"),
}
FORM = Case(tokens=5, heads=3, heads_kv=2, width=6, spread=True)


def _largest_difference(kernels: dict) -> float:
    device = "cuda" if CUDA else "cpu"
    x = to(FORM.inputs(torch.float32), torch.device(device))
    want = call(FORM, x, "reference")
    want = [*want[:2], *gradients(want, x).values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_replays", {})  # a faulty kernel is another one
        patch.setattr(launch, "_FWD", SMALL)
        patch.setattr(launch, "_BWD", SMALL)
        patch.setattr(launch, "sm_count", lambda device: 1)
        for name, kernel in kernels.items():
            patch.setattr(launch, name, kernel)
        got = call(FORM, x, "triton")
        got = [*got[:2], *gradients(got, x).values()]
    return torch.stack([(a - b).abs().max() for a, b in zip(got, want, strict=True)]).max().item()  # NaN stays NaN


def test_the_comparison_passes_without_a_fault():
    assert _largest_difference({}) < 1e-4


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_seen(fault: str, tmp_path):
    module, old, new = FAULTS[fault]
    sources = {m: inspect.getsource(m) for m in (rows, fwd, bwd)}
    assert sources[module].count(old) == 1, f"the fault no longer fits the source: {old!r}"
    sources[module] = sources[module].replace(old, new)
    # One file: what forward and backward share may be the faulty part.
    parts = [re.sub(r"from allmem_ops.ops.rotary.kernels.rows import (\([^)]*\)|.*)", "", s) for s in sources.values()]
    file = tmp_path / "faulty.py"
    file.write_text("\n".join(parts))
    spec = importlib.util.spec_from_file_location("faulty", file)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    names = ("rotary_fwd_kernel", "rotary_bwd_kernel", "rotary_bwd_sums_kernel")
    difference = _largest_difference({name: getattr(faulty, name) for name in names})
    assert not difference < 1e-3, difference


@pytest.mark.parametrize(("rows", "tokens", "width"), [(1, 5000 if CUDA else 33, 64), (3, 17, 5), (2, 1, 1), (1, 0, 4)])
def test_the_table_is_that_of_pytorch(device: torch.device, rows: int, tokens: int, width: int):
    positions = torch.randint(0, 200_000, (2 * tokens, rows), device=device).T[:, ::2]
    inv_freq = 10000.0 ** -(torch.arange(width, device=device) / width)
    angle = positions[..., None].float() * inv_freq
    for got, want in zip(launch.launch_table(positions, inv_freq), (angle.cos(), angle.sin()), strict=True):
        assert got.dtype == torch.float32 and got.shape == (rows, tokens, width)
        assert (got - want).abs().max() <= 1.2e-7 if tokens else got.numel() == 0
    public = rotary_table(positions, inv_freq)
    assert all(torch.allclose(a, b, rtol=0, atol=1.2e-7) for a, b in zip(public, (angle.cos(), angle.sin()), strict=True))


# In a process without the interpreter: nothing of these tables is computed with one rounding where there are two.
FUSED = """
import torch
from allmem_ops.ops.rotary.launch import launch_backward, launch_forward
from allmem_ops.testing.aot import absent_gpu

def empty(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

with absent_gpu("sm90") as found:
    table, norm = [empty(1, 64, 32)] * 2, [empty(64)] * 2
    for norms in ([None] * 2, norm):
        launch_forward(empty(1, 64, 6, 64), *table, *norms, 4, 1, 1e-6)
        launch_backward(empty(1, 64, 4, 64), *[empty(1, 64, 1, 64)] * 2, empty(1, 64, 6, 64), *table, *norms, 1e-6)
texts = [kernel.ptx for kernel in found if "sums" not in kernel.name]
assert len(texts) == 4 and all("mul.rn.bf16" in text and "fma.rn.bf16" not in text for text in texts)
"""


def test_products_of_half_precision_tables_are_rounded():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), *environment.get("PYTHONPATH", "").split(os.pathsep)])
    run = subprocess.run([sys.executable, "-c", FUSED], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
