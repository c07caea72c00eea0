"""`poisoned_empty`, which tests/conftest.py puts around every test."""

import torch

from allmem_ops.testing.poison import _poisoning, poisoned_empty

_CALLS = (
    "torch.empty(3, dtype=dtype)",
    "torch.empty_like(torch.zeros(3, dtype=dtype))",
    "torch.empty_strided((3,), (1,), dtype=dtype)",
    "torch.zeros(2, dtype=dtype).new_empty(3)",
)


def _as_module(code: str, module: str, **names: object) -> object:
    """`code` evaluated as if it stood in `module`."""
    return eval(code, {"torch": torch, "__name__": module, **names})


def test_the_librarys_allocations_start_as_nan_in_every_test():
    for code in _CALLS:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert _as_module(code, "allmem_ops.ops.swa.chunk", dtype=dtype).isnan().all(), code


def test_integer_scratch_starts_with_a_value_out_of_every_range():
    for code in _CALLS:
        assert (_as_module(code, "allmem_ops", dtype=torch.int64) > 2**62).all(), code
        assert _as_module(code, "allmem_ops", dtype=torch.bool).all(), code


def test_other_callers_are_left_alone():
    allocate = _poisoning(lambda: torch.zeros(3), "allmem_ops")
    assert _as_module("allocate()", "allmem_ops.layers", allocate=allocate).isnan().all()
    for module in ("torch.nn.init", "allmem_ops_extra"):  # a name that only starts like the package's is another package
        assert torch.equal(_as_module("allocate()", module, allocate=allocate), torch.zeros(3))


def test_the_patches_end_with_the_block():
    before = torch.empty, torch.Tensor.__dict__["new_empty"]
    with poisoned_empty():
        assert torch.empty is not before[0]
    assert torch.empty is before[0]
    assert torch.Tensor.__dict__["new_empty"] is before[1]


def test_allocations_compile_without_a_graph_break():
    f = _as_module("lambda x: torch.empty_like(x).copy_(x) + x.new_empty(x.shape).zero_()", "allmem_ops.layers")
    x = torch.randn(4)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)
