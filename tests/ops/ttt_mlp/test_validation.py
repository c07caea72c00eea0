"""Every argument of `ttt_mlp`, `ttt_mlp_step` and `MemoryState.initial` is checked, in one form of error."""

import re

import pytest
import torch

from allmem_ops import MemoryState, ttt_mlp, ttt_mlp_step
from tests.ops.ttt_mlp.cases import TOKENS, WEIGHTS, inputs, some_state

X = inputs(length=5, dtype=torch.float32, grad=False)


def bad(name, change):
    return lambda x: x | {name: change(x[name])}


CASES = {
    "q is no tensor": (bad("q", lambda t: t.tolist()), "`q` must be a torch.Tensor"),
    "q without heads": (bad("q", lambda t: t[:, :, 0]), r"`q` must have shape \[B, T, H, d\]"),
    "q of ints": (bad("q", torch.Tensor.int), "`q` must have dtype bfloat16 or float16 or float32 or float64; got int32"),
    "k shorter": (bad("k", lambda t: t[:, 1:]), r"`k` must have shape \[B, T, H, d\] with T=5; got \[2, 4, 2, 4\]"),
    "k of another dtype": (bad("k", torch.Tensor.half), "`k` must have dtype float32"),
    "k elsewhere": (bad("k", lambda t: t.to("meta")), "`k` must be on cpu"),
    "v wider": (bad("v", lambda t: torch.cat([t, t], -1)), r"`v` must have shape \[B, T, H, d\] with d=4"),
    "w_gate transposed": (bad("w_gate", lambda t: t.mT), r"`w_gate` must have shape \[H, h, d\] with d=4"),
    "w_up with other h": (bad("w_up", lambda t: t[:, 1:]), r"`w_up` must have shape \[H, h, d\] with h=6"),
    "w_down as w_up": (bad("w_down", lambda t: t.mT), r"`w_down` must have shape \[H, d, h\]"),
    "bfloat16 weights": (bad("w_gate", torch.Tensor.bfloat16), "`w_gate` must have dtype float32 or float64"),
    "float64 weights": (lambda x: x | {n: x[n].double() for n in WEIGHTS}, "`w_gate` must have dtype float32"),
    "one float64 weight": (bad("w_down", torch.Tensor.double), "`w_down` must have dtype float32"),
    "eta in bfloat16": (bad("eta", torch.Tensor.bfloat16), "`eta` must have dtype float32"),
    "eta with two rates": (bad("eta", lambda t: t[..., :2]), r"`eta` must have shape \[B, T, H, 3\]"),
    "mu in float64": (bad("mu", torch.Tensor.double), "`mu` must have dtype float32"),
    "mu with a last dim": (bad("mu", lambda t: t[..., None]), r"`mu` must have shape \[B, T, H\]"),
    "chunk_size 0": (lambda x: x | {"chunk_size": 0}, "`chunk_size` must be at least 1; got 0"),
    "chunk_size a float": (lambda x: x | {"chunk_size": 4.0}, "`chunk_size` must be an int"),
    "unknown norm": (lambda x: x | {"norm": "post"}, "`norm` must be one of 'pre_write', 'post_write', 'none'; got 'post'"),
    "residual an int": (lambda x: x | {"residual": 1}, "`residual` must be a bool"),
    "grad_clip 0": (lambda x: x | {"grad_clip": 0.0}, "`grad_clip` must be greater than 0"),
    "grad_clip nan": (lambda x: x | {"grad_clip": float("nan")}, "`grad_clip`"),
    "negative eps": (lambda x: x | {"eps": -1e-9}, "`eps` must be at least 0"),
    "no state": (lambda x: x | {"initial_state": {}}, "`initial_state` must be a MemoryState; got dict"),
    "output_final_state None": (lambda x: x | {"output_final_state": None}, "`output_final_state` must be a bool"),
    "packed batch of 2": (lambda x: x | {"cu_seqlens": torch.tensor([0, 5])}, "`q` must have batch size 1 with `cu_seqlens`"),
    "unknown impl": (lambda x: x | {"impl": "cuda"}, "`impl` must be one of"),
    "no kernel for the widths": (lambda x: x | {"impl": "triton"}, "`q` must have d and h that the kernels take"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_argument_is_named(case):
    change, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        ttt_mlp(**change(X | {"chunk_size": 4}))


@pytest.mark.parametrize("ends", [[1, 5], [0, 4], [0, 4, 2, 5]])
def test_bad_offsets_are_named(ends):
    x = inputs(batch=1, length=5, grad=False)
    with pytest.raises(ValueError, match="`cu_seqlens` must rise from 0 to T=5"):
        ttt_mlp(**x, cu_seqlens=torch.tensor(ends))


@pytest.mark.parametrize("name, value", [("chunk_size", 5), ("norm", "none"), ("residual", False), ("grad_clip", 0.5), ("eps", 1e-6)])
def test_an_option_that_differs_from_the_states_is_named(name, value):
    state = some_state(X, 2, 4)
    with pytest.raises(ValueError, match=re.escape(f"`initial_state.{name}` must be {value!r}")):
        ttt_mlp(**X, **({"chunk_size": 4} | {name: value}), initial_state=state)


def test_a_state_of_other_sizes_is_named():
    with pytest.raises(ValueError, match=r"`initial_state.w_gate` must have shape \[N, H, h, d\] with N=2"):
        ttt_mlp(**X, chunk_size=4, initial_state=some_state(X, 3, 4))
    with pytest.raises(ValueError, match=r"`initial_state.w_gate` must have shape \[N, H, h, d\] with h=6"):
        ttt_mlp(**X, chunk_size=4, initial_state=some_state(inputs(h=7, dtype=torch.float32, grad=False), 2, 4))
    with pytest.raises(ValueError, match=r"`initial_state\.dtype` must be float32, the dtype of `q`; got bfloat16"):
        ttt_mlp(**X, chunk_size=4, initial_state=some_state(inputs(dtype=torch.bfloat16, grad=False), 2, 4))
    packed = inputs(batch=1, length=5, dtype=torch.float32, grad=False)
    with pytest.raises(ValueError, match="N=3"):
        ttt_mlp(**packed, chunk_size=4, cu_seqlens=torch.tensor([0, 1, 2, 5]), initial_state=some_state(packed, 1, 4))


def test_unknown_keywords_are_type_errors():
    with pytest.raises(TypeError, match="chunksize"):
        ttt_mlp(**X, chunksize=3)
    with pytest.raises(TypeError, match="mask"):
        ttt_mlp_step(*(X[name] for name in TOKENS), some_state(X, 2, 4).detach(), mask=None)
    with pytest.raises(TypeError, match="device"):
        MemoryState.initial(*(X[name] for name in WEIGHTS), batch=2, device="cpu")


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        ttt_mlp(*X.values(), 4)


STEP = {
    "too many tokens": (inputs(length=257, dtype=torch.float32, grad=False), {}, "`q` must have 1 to 256 tokens; got 257"),
    "no tokens": (inputs(length=0, dtype=torch.float32, grad=False), {}, "`q` must have 1 to 256 tokens; got 0"),
    "other batch": (inputs(batch=3, dtype=torch.float32, grad=False), {}, r"`state.w_gate` must have shape"),
    "other dtype": (inputs(dtype=torch.float16, grad=False), {}, "`state.dtype` must be float16"),
    "active of ints": (X, {"active": torch.ones(2)}, "`active` must have dtype bool"),
    "active too long": (X, {"active": torch.ones(3, dtype=torch.bool)}, r"`active` must have shape \[B\] with B=2"),
    "no state": (X, {"state": None}, "`state` must be a MemoryState"),
}


@pytest.mark.parametrize("case", STEP)
def test_a_bad_argument_of_a_step_is_named(case):
    x, options, message = STEP[case]
    state = some_state(X, 2, 4).detach()
    before = state.clone()
    with pytest.raises(ValueError, match=message):
        ttt_mlp_step(*(x[name] for name in TOKENS), **({"state": state} | options))
    assert all(torch.equal(t, getattr(before, name)) for name, t in state.tensors().items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": -1}, "`batch` must be at least 0"),
        ({"chunk_size": 0}, "`chunk_size`"),
        ({"dtype": torch.float64}, "`dtype` must be one whose state is float32"),
        ({"dtype": torch.int64}, "`dtype`"),
        ({"w_up": X["w_up"].half()}, "`w_up` must have dtype"),
    ],
)
def test_a_bad_argument_of_initial_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        MemoryState.initial(**({name: X[name] for name in WEIGHTS} | {"batch": 2} | change))
