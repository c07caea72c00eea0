"""Inputs of `swa`, and its outputs and gradients by name, for one comparison shared by all tests."""

import torch

from allmem_ops import swa


def inputs(Tq, Tk=None, *, B=1, HQ=4, HK=2, D=8, dtype=torch.float64, far=False):
    """q, k, v and, with `far`, q_sinks; they require gradients."""
    Tk = Tq if Tk is None else Tk
    shapes = {"q": (B, Tq, HQ, D), "k": (B, Tk, HK, D), "v": (B, Tk, HK, D)} | ({"q_sinks": (B, Tq, HQ, D)} if far else {})
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for name, shape in shapes.items()}


def cast(x, dtype):
    return {name: t.detach().to(dtype).requires_grad_() for name, t in x.items()}


def heads(o, lse, x):
    """Gradients of x through o and lse, both with fixed non-uniform gradients, added to the outputs by name."""
    do = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
    dlse = torch.linspace(1, -1, lse.numel(), dtype=lse.dtype).view(lse.shape)
    grads = torch.autograd.grad((o, lse), list(x.values()), (do, dlse))
    return {"o": o, "lse": lse} | {f"d{name}": g for name, g in zip(x, grads, strict=True)}


def results(x, impl, **options):
    return heads(*swa(**x, **options, return_lse=True, impl=impl), x)


def assert_same(got, want, tol=1e-9):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        torch.testing.assert_close(got[name], want[name], rtol=tol, atol=tol, msg=lambda m, name=name: f"{name}: {m}")


def plain(x, window, sinks):
    """The formula in plain PyTorch at the inputs' precision: what a straightforward user would write."""
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    Tq, Tk, group, scale = q.shape[2], k.shape[2], q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    i, j = torch.arange(Tk - Tq, Tk)[:, None], torch.arange(Tk)
    score = q @ k.mT * scale
    if "q_sinks" in x:
        score = torch.where(i - j >= window, x["q_sinks"].transpose(1, 2) @ k.mT * scale, score)
    score = score.masked_fill((j > i) | ((i - j >= window) & (j >= sinks)), float("-inf"))
    lse = score.float().logsumexp(-1) if score.dtype != torch.float64 else score.logsumexp(-1)
    return heads((score.softmax(-1) @ v).transpose(1, 2), lse.transpose(1, 2), x)
