"""Each known trap of a chunked, normalised, momentum-driven memory, as a test of its own; both implementations."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from allmem_ops import MemoryState, ttt_mlp
from tests.ops.ttt_mlp.cases import (
    LEARNT,
    NORMS,
    TOKENS,
    WEIGHTS,
    assert_equal_to,
    everything,
    gradients,
    inputs,
    outputs,
    some_state,
    tokens,
)

pytestmark = pytest.mark.parametrize("impl", ["reference", "chunk"])


def moved(x, name, start, stop, by=0.5):
    y = x[name].detach().clone()
    y[:, start:stop] += by
    return x | {name: y}


@pytest.mark.parametrize("name", ["k", "v", "eta", "mu"])
def test_a_chunk_is_read_before_it_is_written(impl, name):
    # mu acts on the momentum of the chunk before: from the second chunk on
    x = inputs(length=16, dtype=torch.float32, grad=False)
    before = ttt_mlp(**x, chunk_size=4, impl=impl).o
    after = ttt_mlp(**moved(x, name, 4, 8), chunk_size=4, impl=impl).o
    assert torch.equal(after[:, :8], before[:, :8])
    assert not torch.equal(after[:, 8:12], before[:, 8:12])


@pytest.mark.parametrize("norm", NORMS)
def test_first_chunk_reads_the_initial_weights_as_they_are(impl, norm):
    x = inputs(length=4, grad=False)
    o = ttt_mlp(**x, chunk_size=4, norm=norm, eps=0.3, impl=impl).o
    q, gate, up, down = (x[name] for name in ("q", *WEIGHTS))
    a, b = (torch.einsum("bthd,hkd->bthk", q, w) for w in (gate, up))
    want = q + torch.einsum("bthk,hdk->bthd", torch.nn.functional.silu(a) * b, down)
    torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-13)


def test_first_write_starts_at_the_initial_weights_only_up_to_eps(impl):
    x = inputs(length=4, eta=0.0, grad=False)
    state = ttt_mlp(**x, chunk_size=4, eps=0.3, impl=impl, output_final_state=True).state
    for name in WEIGHTS:
        size = x[name].norm(dim=-1, keepdim=True)
        torch.testing.assert_close(getattr(state, name)[0], x[name] * size / (size + 0.3), rtol=1e-12, atol=0)


def test_eps_is_outside_the_root(impl):
    x = inputs(length=4, eta=0.0, grad=False)
    state = ttt_mlp(**x, chunk_size=4, eps=0.5, impl=impl, output_final_state=True).state
    size = x["w_down"].norm(dim=-1)
    torch.testing.assert_close(state.w_down[0].norm(dim=-1), size * size / (size + 0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("norm", NORMS)
def test_zero_rows_stay_finite_forward_and_backward(impl, norm, name):
    x = inputs(length=9)
    x[name] = torch.cat([torch.zeros_like(x[name][:, :1]), x[name][:, 1:]], 1).detach().requires_grad_()
    for eps in (1e-5, 0.0):
        found = everything(x, impl, chunk_size=4, norm=norm, eps=eps)
        assert all(t.isfinite().all() for t in found.values())
        if norm == "pre_write":
            assert not found[name.replace("w_", "n_")][:, :, 0].any()


def test_momentum_starts_at_zero_and_mu_is_the_mean_of_its_own_chunk(impl):
    x = inputs(length=8, grad=False)
    options = {"chunk_size": 4, "norm": "none", "impl": impl, "output_final_state": True}
    first = ttt_mlp(**tokens(x, 0, 4), **options).state
    anything = ttt_mlp(**tokens(moved(x, "mu", 0, 4, by=7.0), 0, 4), **options).state
    assert_equal_to(anything.tensors(), first.tensors(), 0)  # mu * M_0 = 0
    for name in WEIGHTS:
        m = name.replace("w_", "m_")
        torch.testing.assert_close(getattr(first, name), x[name] + getattr(first, m), rtol=1e-12, atol=1e-14)
    both = ttt_mlp(**x, **options).state
    still = ttt_mlp(**(x | {"mu": torch.zeros_like(x["mu"])}), **options).state
    mean = x["mu"][:, 4:].mean(1)[..., None, None]
    torch.testing.assert_close(both.m_up - still.m_up, mean * first.m_up, rtol=1e-10, atol=1e-13)


def test_momentum_carries_the_clipped_gradient(impl):
    x = inputs(length=4, eta=1.0, grad=False)
    state = ttt_mlp(**x, chunk_size=4, grad_clip=0.01, impl=impl, output_final_state=True).state
    for name in LEARNT[3:]:
        torch.testing.assert_close(getattr(state, name).norm(dim=(-2, -1)), torch.full((2, 2), 0.01, dtype=torch.float64))


def test_writing_lowers_the_inner_loss(impl):
    x = inputs(length=4, eta=0.01, grad=False)
    state = ttt_mlp(**x, chunk_size=4, norm="none", impl=impl, output_final_state=True).state
    again = x | {"q": x["k"]}
    before = ttt_mlp(**again, chunk_size=4, impl=impl).o
    after = ttt_mlp(**again, chunk_size=4, norm="none", impl=impl, initial_state=state).o
    assert ((after - before) * x["v"]).sum((1, 3)).min() > 0


@pytest.mark.parametrize("length", [3, 1, 8, 9])
def test_a_full_last_chunk_is_written_and_a_partial_one_is_not(impl, length):
    x = inputs(length=length, grad=False)
    state = ttt_mlp(**x, chunk_size=4, impl=impl, output_final_state=True).state
    full = length - length % 4
    want = ttt_mlp(**tokens(x, 0, full), chunk_size=4, impl=impl, output_final_state=True).state
    assert_equal_to({name: getattr(state, name) for name in LEARNT}, {name: getattr(want, name) for name in LEARNT}, 1e-12)
    assert state.count.tolist() == [length % 4] * 2 and state.position.tolist() == [length] * 2
    assert state.g_up.any() == (length % 4 > 0) and state.mu_sum.any() == (length % 4 > 0)


@pytest.mark.parametrize("rate, matrix", [(0, "gate"), (1, "up"), (2, "down")])
def test_each_rate_moves_only_its_own_matrix(impl, rate, matrix):
    x = inputs(length=4, grad=False)
    eta = torch.zeros_like(x["eta"])
    eta[..., rate] = 0.1
    eta.requires_grad_()
    state = ttt_mlp(**(x | {"eta": eta}), chunk_size=4, impl=impl, output_final_state=True).state
    for name in ("gate", "up", "down"):
        assert getattr(state, f"m_{name}").any() == (name == matrix)
        (found,) = torch.autograd.grad(getattr(state, f"m_{name}").sum(), eta, retain_graph=True)
        nonzero = found.abs().sum((0, 1, 2)) > 0
        assert nonzero.tolist() == [name == m for m in ("gate", "up", "down")]


@pytest.mark.parametrize("token", [4, 7])
def test_first_and_last_token_of_a_chunk_belong_to_it(impl, token):
    x = inputs(length=12, grad=False)
    o = ttt_mlp(**x, chunk_size=4, impl=impl).o
    for name in ("k", "v", "eta"):
        changed = ttt_mlp(**moved(x, name, token, token + 1), chunk_size=4, impl=impl).o
        assert torch.equal(changed[:, :8], o[:, :8])
        assert not torch.allclose(changed[:, 8:], o[:, 8:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_huge_rates_stay_finite(impl, dtype):
    # 1e2 in float16: its factors are operands of the reference, whose definition ends at 65504
    eta = 1e2 if impl == "reference" and dtype == torch.float16 else 1e6
    x = inputs(length=12, dtype=dtype, eta=eta)
    found = everything(x, impl, chunk_size=4, only_o=True, grad_clip=1.0)
    assert all(t.isfinite().all() for name, t in found.items() if not name.startswith("g_"))


def test_tokens_of_a_partial_chunk_have_no_gradient_but_qs(impl):
    x = inputs(length=11)
    found = everything(x, impl, chunk_size=4)
    for name in ("k", "v", "eta", "mu"):
        assert not found[f"gradient of {name}"][:, 8:].any()
        assert found[f"gradient of {name}"][:, 4:8].abs().min() > 0
    assert found["gradient of q"][:, 8:].abs().min() > 0


def test_mus_gradient_is_the_same_over_a_chunk(impl):
    found = everything(inputs(length=12), impl, chunk_size=4)["gradient of mu"]
    for start in (4, 8):
        torch.testing.assert_close(found[:, start : start + 4], found[:, start : start + 1].expand(-1, 4, -1), rtol=1e-14, atol=0)


def test_residual_adds_the_output_gradient_to_dq_and_nothing_to_g(impl):
    x = inputs(length=11)
    on, off = (everything(x, impl, chunk_size=4, residual=r, only_o=True) for r in (True, False))
    do = gradients({"o": on["o"]}, {"o": on["o"]})["o"]
    torch.testing.assert_close(on["gradient of q"] - off["gradient of q"], do, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(on["o"] - off["o"], x["q"], rtol=1e-10, atol=1e-12)
    rest = [name for name in on if name not in ("o", "gradient of q")]
    assert_equal_to({name: on[name] for name in rest}, {name: off[name] for name in rest}, 1e-12)


def test_row_norms_come_from_the_weight_arguments_also_with_a_state(impl):
    x = inputs(length=9)
    state = some_state(x, 2, 4)
    louder = x | {name: (3 * x[name]).detach().requires_grad_() for name in WEIGHTS}
    quiet, loud = (everything(y, impl, state, chunk_size=4) for y in (x, louder))
    assert not torch.allclose(quiet["w_up"], loud["w_up"])
    torch.testing.assert_close(loud["n_up"], 3 * quiet["n_up"])
    for name in WEIGHTS:
        assert loud[f"gradient of {name}"].abs().sum() > 0  # through N alone


def test_dn_of_the_second_call_reaches_the_weights(impl):
    x = inputs(length=8)
    first = ttt_mlp(**tokens(x, 0, 4), chunk_size=4, impl=impl, output_final_state=True).state
    state = MemoryState(**first.detach().tensors(), **first.shared(), **first.options())
    second = ttt_mlp(**tokens(x, 4, 8), chunk_size=4, impl=impl, initial_state=state, output_final_state=True).state
    assert all(
        t.abs().sum() > 0
        for t in torch.autograd.grad(second.w_up.sum() + second.w_gate.sum() + second.w_down.sum(), [x[n] for n in WEIGHTS])
    )


def test_clip_holds_on_the_whole_chunk_just_above_its_threshold_only(impl):
    x = inputs(length=4, eta=0.5)
    free = ttt_mlp(**x, chunk_size=4, impl=impl, output_final_state=True).state
    size = free.m_up.norm(dim=(-2, -1)).min().item()
    below = everything(x, impl, chunk_size=4, grad_clip=1e9)
    assert_equal_to(below, everything(x, impl, chunk_size=4), 1e-12)
    for factor in (0.999, 1.001):
        m = ttt_mlp(**x, chunk_size=4, grad_clip=factor * size, impl=impl, output_final_state=True).state.m_up
        torch.testing.assert_close(m.norm(dim=(-2, -1)), free.m_up.norm(dim=(-2, -1)).clamp_max(factor * size), rtol=1e-9, atol=0)
    # in two parts: the clip acts once, on the sum
    parts = ttt_mlp(**tokens(x, 0, 2), chunk_size=4, grad_clip=0.999 * size, impl=impl, output_final_state=True).state
    parts = ttt_mlp(**tokens(x, 2, 4), chunk_size=4, grad_clip=0.999 * size, impl=impl, initial_state=parts, output_final_state=True).state
    whole = ttt_mlp(**x, chunk_size=4, grad_clip=0.999 * size, impl=impl, output_final_state=True).state
    assert_equal_to(parts.tensors(), whole.tensors())


def test_clip_of_a_zero_gradient(impl):
    found = everything(inputs(length=9, eta=0.0), impl, chunk_size=4, grad_clip=0.5)
    assert all(t.isfinite().all() for t in found.values())
    assert not found["m_up"].any()


@pytest.mark.parametrize("norm", NORMS)
def test_two_runs_are_equal_bit_for_bit(impl, norm):
    x = inputs(length=19, dtype=torch.float32)
    first, second = (everything(x, impl, chunk_size=4, norm=norm, grad_clip=0.2) for _ in range(2))
    assert_equal_to(first, second, 0)


def test_strided_inputs_and_expanded_output_gradients(impl):
    x = inputs(length=11)
    fused = torch.cat([x[name] for name in "qkv"], -1).transpose(0, 1).contiguous().transpose(0, 1)
    strided = x | dict(zip("qkv", fused.chunk(3, -1), strict=True))
    assert not strided["k"].is_contiguous()
    assert_equal_to(outputs(ttt_mlp(**strided, chunk_size=4, impl=impl)), outputs(ttt_mlp(**x, chunk_size=4, impl=impl)))
    expanded = torch.autograd.grad(ttt_mlp(**strided, chunk_size=4, impl=impl).o.sum(), list(x.values()))
    o = ttt_mlp(**x, chunk_size=4, impl=impl).o
    assert_equal_to(
        dict(zip(x, expanded, strict=True)), dict(zip(x, torch.autograd.grad(o, list(x.values()), torch.ones_like(o)), strict=True))
    )


def test_a_second_backward_gives_the_same(impl):
    x = inputs(length=11)
    o = ttt_mlp(**x, chunk_size=4, impl=impl, grad_clip=0.1).o
    first = torch.autograd.grad(o.square().sum(), list(x.values()), retain_graph=True)
    second = torch.autograd.grad(o.square().sum(), list(x.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same(impl, use_reentrant):
    x = inputs(length=11)

    def call(*tensors):
        return ttt_mlp(**dict(zip(x, tensors, strict=True)), chunk_size=4, impl=impl).o

    plain = torch.autograd.grad(call(*x.values()).square().sum(), list(x.values()))
    for t in x.values():
        t.grad = None
    checkpoint(call, *x.values(), use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(t.grad, p) for t, p in zip(x.values(), plain, strict=True))


def test_inputs_and_the_given_state_are_not_changed(impl):
    x = inputs(length=11)
    state = some_state(x, 2, 4, count=3)
    kept = {name: t.detach().clone() for name, t in (x | state.tensors()).items()}
    everything(x, impl, state, chunk_size=4)
    assert all(torch.equal(t, kept[name]) for name, t in (x | state.tensors()).items())


@pytest.mark.parametrize("lengths", [[0, 0, 5], [1, 1, 1], [7, 0, 1, 4], [0]])
def test_empty_and_one_token_sequences(impl, lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = inputs(batch=1, length=sum(lengths))
    state = some_state(x, len(lengths), 4, count=[i % 4 for i in range(len(lengths))])
    found = ttt_mlp(**x, chunk_size=4, cu_seqlens=ends, initial_state=state, output_final_state=True, impl=impl).state
    for n, length in enumerate(lengths):
        if length == 0:
            assert all(torch.equal(t[n], getattr(state, name)[n]) for name, t in found.tensors().items() if not name.startswith("n_"))


def test_no_tokens_and_no_sequences(impl):
    x = inputs(length=0)
    result = ttt_mlp(**x, chunk_size=4, impl=impl, output_final_state=True)
    assert result.o.shape == (2, 0, 2, 4)
    assert torch.equal(result.state.w_up, x["w_up"].expand(2, -1, -1, -1))


def test_heads_and_sequences_do_not_mix(impl):
    x = inputs(length=9, grad=False)
    whole = ttt_mlp(**x, chunk_size=4, impl=impl).o
    for b in range(2):
        for h in range(2):
            one = {name: x[name][b : b + 1, :, h : h + 1] for name in TOKENS} | {name: x[name][h : h + 1] for name in WEIGHTS}
            torch.testing.assert_close(ttt_mlp(**one, chunk_size=4, impl=impl).o[0, :, 0], whole[b, :, h], rtol=1e-10, atol=1e-12)


def test_every_head_width_and_hidden_width(impl):
    for d, h in [(1, 1), (3, 5), (60, 7), (96, 130)]:
        x = inputs(batch=1, length=7, heads=1, d=d, h=h)
        got = everything(x, impl, chunk_size=3)
        assert all(t.isfinite().all() for t in got.values())
        assert_equal_to(got, everything(x, "reference", chunk_size=3))


def test_nan_of_later_tokens_reaches_nothing_before(impl):
    """Not even as 0 * NaN: rows of the next chunk may lie in the last tile of a chunk."""
    x = inputs(length=11, grad=False)
    want = ttt_mlp(**x, chunk_size=4, impl=impl).o
    poisoned = {name: t.clone() for name, t in x.items()}
    for name in ("k", "v", "eta", "mu"):
        poisoned[name][:, 4:] = torch.nan
    got = ttt_mlp(**poisoned, chunk_size=4, impl=impl).o
    # a chunk is read before it is written
    assert torch.equal(got[:, :8], want[:, :8]) and got[:, 8:].isnan().all()


def test_nan_of_a_packed_neighbour_reaches_no_value_and_no_gradient(impl):
    x = inputs(batch=1, length=13)
    ends = torch.tensor([0, 6, 13])
    want = ttt_mlp(**tokens(x, 0, 6), chunk_size=4, impl=impl).o
    of_one = torch.autograd.grad(want.square().sum(), [x[name] for name in TOKENS])
    poisoned = {name: t.detach().clone() for name, t in x.items()}
    for name in TOKENS:
        poisoned[name][:, 6:] = torch.nan
    leaves = {name: poisoned[name].requires_grad_() for name in x}
    o = ttt_mlp(**leaves, chunk_size=4, cu_seqlens=ends, impl=impl).o
    found = torch.autograd.grad(o[:, :6].square().sum(), [leaves[name] for name in TOKENS])
    torch.testing.assert_close(o[:, :6], want, rtol=1e-12, atol=1e-13)
    for a, b in zip(found, of_one, strict=True):
        torch.testing.assert_close(a[:, :6], b[:, :6], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["w_gate", "w_up", "w_down", "m_gate", "m_up", "m_down"])
def test_one_matrix_of_the_final_state_may_be_all_that_has_a_gradient(impl, name):
    x = inputs(length=9)

    def found(impl):
        state = ttt_mlp(**x, chunk_size=4, impl=impl, output_final_state=True).state
        return gradients({name: getattr(state, name)}, x)

    got = found(impl)
    assert_equal_to(got, found("reference"))
    assert got["k"][:, :8].any() and not got["q"].any()


def test_slices_of_hidden_units_one_by_one_are_the_whole(impl):
    """Without a norm and a clip nothing couples them: O is the sum of the slices' and each has its own final weights."""
    x = inputs(length=11, h=6, grad=False)
    options = {"chunk_size": 4, "norm": "none", "residual": False, "impl": impl, "output_final_state": True}
    whole, o = ttt_mlp(**x, **options), 0
    for a, b in ((0, 2), (2, 6)):
        some = x | {"w_gate": x["w_gate"][:, a:b], "w_up": x["w_up"][:, a:b], "w_down": x["w_down"][:, :, a:b]}
        one = ttt_mlp(**some, **options)
        o = o + one.o
        torch.testing.assert_close(one.state.w_up, whole.state.w_up[:, :, a:b], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(one.state.m_down, whole.state.m_down[..., a:b], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(o, whole.o, rtol=1e-12, atol=1e-13)
