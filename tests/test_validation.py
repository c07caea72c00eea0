"""The argument checks that all public functions share: one form of message, nothing let through."""

import re

import pytest
import torch

from allmem_ops import _impl
from allmem_ops import _validation as check
from allmem_ops._config import Settings, settings
from allmem_ops._impl import IMPLS, resolve_impl


def _message(f, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        f(*args, **kwargs)
    return str(error.value)


def test_shape_names_the_dims_that_differ():
    k = torch.zeros(2, 63, 4, 64)
    assert _message(check.check_shape, "k", k, "B T HK D", {"B": 2, "T": 64}) == (
        "`k` must have shape [B, T, HK, D] with T=64; got [2, 63, 4, 64]"
    )
    assert _message(check.check_shape, "k", k, "B T D", {"B": 2, "T": 64}) == (
        "`k` must have shape [B, T, D] with B=2, T=64; got [2, 63, 4, 64]"
    )
    assert _message(check.check_shape, "k", k, "B T 4 3", {}) == "`k` must have shape [B, T, 4, 3]; got [2, 63, 4, 64]"
    assert _message(check.check_shape, "k", None, "B", {}) == "`k` must be a torch.Tensor; got NoneType"


def test_shape_learns_dims_only_where_it_passes():
    known = {"B": 2}
    check.check_shape("q", torch.zeros(2, 5, 3), "B T 3", known)
    assert known == {"B": 2, "T": 5}
    _message(check.check_shape, "q", torch.zeros(3, 5, 7), "B T X", known)
    assert known == {"B": 2, "T": 5}


def test_dtype_and_device():
    x = torch.zeros(2, dtype=torch.int64)
    assert _message(check.check_dtype, "eta", x, torch.float32) == "`eta` must have dtype float32; got int64"
    assert _message(check.check_dtype, "k", x, (torch.float16, torch.bfloat16), "the dtype of `q`") == (
        "`k` must have dtype float16 or bfloat16 (the dtype of `q`); got int64"
    )
    check.check_dtype("x", x, torch.int64)
    assert _message(check.check_device, "k", x, torch.device("meta")) == "`k` must be on meta, the device of `q`; got cpu"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "`window` must be at least 1; got 0"),
        (True, "`window` must be an int of at least 1; got bool True"),
        (2.0, "`window` must be an int of at least 1; got float 2.0"),
        (None, "`window` must be an int of at least 1; got NoneType None"),
        ("4", "`window` must be an int of at least 1; got str '4'"),
    ],
)
def test_int(value: object, message: str):
    assert _message(check.check_int, "window", value, 1) == message
    check.check_int("window", 1, 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "`eps` must be greater than 0.0; got 0.0"),
        (-1, "`eps` must be greater than 0.0; got -1"),
        (float("nan"), "`eps` must be greater than 0.0; got nan"),
        (float("inf"), "`eps` must be finite; got inf"),
        (True, "`eps` must be a number; got bool True"),
        ("1", "`eps` must be a number; got str '1'"),
    ],
)
def test_float(value: object, message: str):
    assert _message(check.check_float, "eps", value, above=0.0) == message
    check.check_float("eps", 1e-6, above=0.0)


def test_float_minimum_takes_its_bound_and_refuses_nan():
    check.check_float("eps", 0.0, minimum=0.0)
    assert _message(check.check_float, "eps", float("nan"), minimum=0.0) == "`eps` must be at least 0.0; got nan"
    assert "finite" in _message(check.check_float, "scale", float("inf"))
    assert "finite" in _message(check.check_float, "scale", float("nan"))
    assert "finite" in _message(check.check_float, "scale", float("-inf"))


def test_bool_and_choice():
    check.check_bool("residual", False)
    assert _message(check.check_bool, "residual", 1) == "`residual` must be a bool; got int 1"
    assert _message(check.check_choice, "norm", "l2", ("a", "b")) == "`norm` must be one of 'a', 'b'; got 'l2'"


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 5], "`cu_seqlens` must be a torch.Tensor; got list"),
        (torch.zeros(2, 2), r"`cu_seqlens` must have shape [N+1]; got [2, 2]"),
        (torch.tensor([0.0, 5.0]), "`cu_seqlens` must have dtype int32 or int64; got float32"),
        (torch.tensor([0]), "`cu_seqlens` must have at least 2 elements; got 1"),
        (torch.tensor([0, 4]), "`cu_seqlens` must rise from 0 to T=5 without decreasing; got [0, 4]"),
        (torch.tensor([1, 5]), "`cu_seqlens` must rise from 0 to T=5 without decreasing; got [1, 5]"),
        (torch.tensor([0, 4, 3, 5]), "`cu_seqlens` must rise from 0 to T=5 without decreasing; got [0, 4, 3, 5]"),
    ],
)
def test_cu_seqlens(cu_seqlens: object, message: str):
    assert _message(check.check_cu_seqlens, cu_seqlens, torch.zeros(1, 5, 2, 4)) == message


def test_cu_seqlens_legal_forms():
    q = torch.zeros(1, 5, 2, 4)
    for values in ([0, 5], [0, 0, 1, 5, 5]):
        for dtype in (torch.int32, torch.int64):
            check.check_cu_seqlens(torch.tensor(values, dtype=dtype), q)
    assert (
        _message(check.check_cu_seqlens, torch.tensor([0, 5]), torch.zeros(2, 5, 2, 4))
        == "`q` must have batch size 1 with `cu_seqlens`; got 2. Flatten the batch into T first"
    )


def test_checks_trace_into_one_graph():
    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def f(q, k, window):
        known: dict[str, int] = {}
        check.check_shape("q", q, "B T H D", known)
        check.check_shape("k", k, "B T H D", known)
        check.check_dtype("k", k, q.dtype, "the dtype of `q`")
        check.check_device("k", k, q.device)
        check.check_int("window", window, 1)
        check.check_float("eps", 1e-6, above=0.0)
        return q + k * window

    q = torch.ones(1, 5, 2, 4)
    assert torch.equal(f(q, q, 3), q * 4)
    assert torch.equal(f(q[:, :3], q[:, :3], 7), q[:, :3] * 8)


def test_impl(monkeypatch: pytest.MonkeyPatch):
    x = torch.ones(1)
    assert [resolve_impl("an_op", i, x) for i in ("reference", "chunk", "auto")] == ["reference", "chunk", "chunk"]
    message = _message(resolve_impl, "an_op", "triton", x)
    assert "no Triton kernel exists yet for `an_op`" in message and "\n" not in message
    assert re.search("must be one of .*; got 'cuda'", _message(resolve_impl, "an_op", "cuda", x))
    assert IMPLS == ("reference", "chunk", "triton", "auto")

    monkeypatch.setattr(_impl, "KERNELS", frozenset({"an_op"}))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert resolve_impl("an_op", "auto", x) == "chunk"  # on a CPU
    assert "needs CUDA tensors" in _message(resolve_impl, "an_op", "triton", x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_impl("an_op", "triton", x) == "triton"
    assert "needs one of bfloat16, float16, float32; got float64" in _message(resolve_impl, "an_op", "triton", x.double())


def test_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("ALLMEM_OPS_AUTOTUNE", raising=False)
    assert settings() == Settings(autotune=False, interpret=False)
    monkeypatch.setenv("ALLMEM_OPS_AUTOTUNE", "1")
    assert settings() == Settings(autotune=True, interpret=False)
    monkeypatch.setenv("ALLMEM_OPS_AUTOTUNE", "yes")
    assert "`ALLMEM_OPS_AUTOTUNE` must be 0 or 1 (environment variable); got 'yes'" in _message(settings)
