"""`gated_fusion` as a library operator: opcheck and torch.compile."""

import pytest
import torch

from allmem_ops import gated_fusion
from allmem_ops.ops.fusion import registration
from tests.ops.fusion.forms import FULL, Form, gradients

_FORMS = [
    FULL,
    Form(split=False, norm=False, gate="channel"),
    Form(attn=False, alpha=False),
    Form(split=False, norm=False, attn=False, alpha=False, gate=None),
]


@pytest.mark.parametrize("form", _FORMS, ids=["full", "flat", "readout", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(form: Form, dtype: torch.dtype):
    x = form.inputs(dtype, torch.float32)
    torch.library.opcheck(registration.gated_fusion_chunk, (*x.values(), 1e-6))
    dy = torch.randn(form.batch, form.tokens, form.heads * form.width).to(dtype)
    detached = [None if v is None else v.detach() for v in list(x.values())[1:]]
    torch.library.opcheck(registration.gated_fusion_chunk_bwd, (dy, *detached, 1e-6))


def test_compiles_whole_and_does_not_recompile_for_another_length():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def block(attn, memory, alpha, gate, norm_weight):
        return gated_fusion(attn, memory, alpha, gate=gate, norm_weight=norm_weight)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 17, 64):
            x = Form(tokens=tokens).inputs(torch.float32)
            want = gated_fusion(x["attn"], x["memory"], x["alpha"], gate=x["gate"], norm_weight=x["norm_weight"])
            assert torch.equal(block(*x.values()), want)


def test_compiled_gradients_equal_eager_ones():
    x = FULL.inputs(torch.float32)

    def block(attn, memory, alpha, gate, norm_weight):
        return gated_fusion(attn, memory, alpha, gate=gate, norm_weight=norm_weight)

    want = gradients(block(*x.values()), x)
    got = gradients(torch.compile(block, fullgraph=True, backend="aot_eager")(*x.values()), x)
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name


def test_torch_func_grad_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x = FULL.inputs(torch.float32)

    def block(*values):
        return gated_fusion(*values[:3], gate=values[3], norm_weight=values[4])

    want = gradients(block(*x.values()), x)
    got = gradients(checkpoint(block, *x.values(), use_reentrant=False), x)
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name
