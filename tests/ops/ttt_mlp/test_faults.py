"""Faults put into the chunk path on purpose: the comparison of test_values.py must fail for each."""

import pytest
import torch

from allmem_ops.ops.ttt_mlp import chain, chunk
from tests.ops.ttt_mlp.cases import everything, inputs, largest_difference

X = inputs(length=14, eta=0.5)
TAKEN = {name: getattr(module, name) for module, names in (
    (chain, ("operands", "descent_backward", "clip_backward", "normalise_backward", "read_backward", "descent", "clip",
             "write_point", "read", "mu_means", "store")),
    (chunk, ("second_slope", "row_norms")),
) for name in names}  # fmt: skip
ROW_NORMS = torch.cat([X[name].detach().norm(dim=-1) for name in ("w_gate", "w_up", "w_down")], -1)


def _norms(p, w):
    return ROW_NORMS.repeat(w.shape[0] // ROW_NORMS.shape[0], 1)


def _without(function, index):
    """`function` with the index-th of its results zeroed."""

    def faulty(*args):
        found = list(TAKEN[function](*args))
        found[index] = torch.zeros_like(found[index])
        return tuple(found)

    return faulty


def _swapped(function, at):
    """`function` with the rates of up and down, its argument `at`, in each other's place."""

    def faulty(*args):
        args = list(args)
        args[at] = args[at][..., [0, 2, 1]]
        return TAKEN[function](*args)

    return faulty


# name -> (module, helper of the chunk path, what stands in for it, options of the call)
BACKWARD = {
    "sign of dM": (chain, "operands", lambda p, k, v, at, dd: TAKEN["operands"](p, k, v, at, -dd), {}),
    "rates of up and down swapped": (chain, "descent_backward", _swapped("descent_backward", 2), {}),
    "clip passed straight through": (chain, "clip_backward", lambda p, grad, clipped, sizes: grad, {"grad_clip": 0.3}),
    "clip without its direction": (
        chain,
        "clip_backward",
        lambda p, grad, clipped, sizes: TAKEN["clip_backward"](p, grad, 0 * clipped, sizes),
        {"grad_clip": 0.3},
    ),
    "dN dropped": (chain, "normalise_backward", _without("normalise_backward", 1), {}),
    "dN dropped, post_write": (chain, "normalise_backward", _without("normalise_backward", 1), {"norm": "post_write"}),
    "no second order in dW": (chain, "descent_backward", _without("descent_backward", 3), {}),
    "S'' = 0": (chunk, "second_slope", lambda s, a, silu: torch.zeros_like(s), {}),
    "read gradient at Wn": (
        chain,
        "read_backward",
        lambda p, q, do, w: TAKEN["read_backward"](p, q, do, chunk.normalise(p, w, _norms(p, w))),
        {},
    ),
    "no gradient through the rows' norms": (chain, "normalise_backward", lambda p, w, n, g: (g, 0 * n), {}),
    "no read gradient in dW": (chain, "read_backward", _without("read_backward", 1), {}),
    "no dK": (chain, "descent_backward", _without("descent_backward", 0), {}),
    "no dV": (chain, "descent_backward", _without("descent_backward", 1), {}),
    "no deta": (chain, "descent_backward", _without("descent_backward", 2), {}),
    "no dQ": (chain, "read_backward", _without("read_backward", 0), {}),
}

FORWARD = {
    "zeroed output": (chain, "store", lambda out, x, g: TAKEN["store"](out, 0 * x, g), {}),
    "sign of M": (chain, "descent", lambda *args: -TAKEN["descent"](*args), {}),
    "rates of up and down swapped": (chain, "descent", _swapped("descent", 3), {}),
    "read at the normalised weights": (
        chain,
        "read",
        lambda p, q, w: TAKEN["read"](p, q, chunk.normalise(p, w, _norms(p, w))),
        {},
    ),
    "gradient and base at the raw weights": (chain, "write_point", lambda p, w, n: w, {}),
    "M carries the unclipped G": (chain, "clip", lambda p, d: (d, TAKEN["clip"](p, d)[1]), {"grad_clip": 0.3}),
    "mu of the chunk's first token": (
        chain,
        "mu_means",
        lambda p, mu, g, held: chain.heads_first(mu, g)[..., :1],
        {},
    ),
    "norms over the other axis of Wdown": (
        chunk,
        "row_norms",
        lambda p, w: torch.cat([TAKEN["row_norms"](p, w)[:, : 2 * p.h], p.matrices(w)[1].norm(dim=1)[:, : p.d]], 1),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BACKWARD)
def test_a_faulty_backward_is_found(fault, monkeypatch):
    module, name, stand_in, options = BACKWARD[fault]
    options = {"chunk_size": 4} | options
    want = everything(X, "reference", **options)
    assert largest_difference(everything(X, "chunk", **options), want)[0] < 1e-12
    monkeypatch.setattr(module, name, stand_in)
    error, where = largest_difference(everything(X, "chunk", **options), want)
    # the least of these changes the worst gradient by a thousandth; the comparison allows 1e-9
    assert error > 1e-3 and where.startswith("gradient"), (error, where)


@pytest.mark.parametrize("fault", FORWARD)
def test_a_faulty_forward_is_found(fault, monkeypatch):
    module, name, stand_in, options = FORWARD[fault]
    options = {"chunk_size": 4} | options
    want = everything(X, "reference", **options)
    monkeypatch.setattr(module, name, stand_in)
    values = {name: t for name, t in everything(X, "chunk", **options).items() if not name.startswith("gradient")}
    error, where = largest_difference(values, {name: want[name] for name in values})
    assert error > 1e-3, (error, where)
