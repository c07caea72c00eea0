"""Inputs and comparisons that the tests of `ttt_mlp` share."""

from dataclasses import replace

import torch

from allmem_ops import MemoryState, ttt_mlp

TOKENS = ("q", "k", "v", "eta", "mu")
WEIGHTS = ("w_gate", "w_up", "w_down")
NORMS = ("pre_write", "post_write", "none")
LEARNT = tuple(f"{kind}_{matrix}" for kind in "wm" for matrix in ("gate", "up", "down"))


def inputs(batch=2, length=11, heads=2, d=4, h=6, dtype=torch.float64, eta=0.1, seed=0, grad=True):
    """The eight tensors of a call by name: unit keys and queries, eta in [0, eta], mu in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    uniform = lambda *shape: torch.rand(shape, generator=g, dtype=torch.float64)  # noqa: E731
    x = {name: normal(batch, length, heads, d) for name in "qkv"}
    x["q"], x["k"] = (torch.nn.functional.normalize(x[name], dim=-1) for name in "qk")
    x |= {"w_gate": normal(heads, h, d) / d**0.5, "w_up": normal(heads, h, d) / d**0.5, "w_down": normal(heads, d, h) / h**0.5}
    x |= {"eta": eta * uniform(batch, length, heads, 3), "mu": uniform(batch, length, heads)}
    return {name: t.to(dtype if name in "qkv" else wide).requires_grad_(grad) for name, t in x.items()}


def some_state(x, batch, chunk_size, count=0, seed=5, **options):
    """A state with momentum, weights that are not the initial ones and, with `count`, an open chunk; its leaves want gradients."""
    g = torch.Generator().manual_seed(seed)
    weights = [x[name].detach() for name in WEIGHTS]
    state = MemoryState.initial(*weights, batch=batch, chunk_size=chunk_size, dtype=x["q"].dtype, **options)
    noise = lambda t, scale: scale * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)  # noqa: E731
    fields = {name: getattr(state, name) + noise(getattr(state, name), 0.2) for name in LEARNT}
    held = torch.full((batch,), count) if isinstance(count, int) else torch.tensor(count)
    some = (held > 0).to(state.mu_sum.dtype)
    for name in ("g_gate", "g_up", "g_down"):
        fields[name] = noise(getattr(state, name), 0.1) * some.view(-1, 1, 1, 1)
    fields["mu_sum"] = 0.5 * held.to(state.mu_sum.dtype)[:, None].expand(state.mu_sum.shape).clone()
    state = replace(state, **fields, count=held.clone(), position=held + 2 * chunk_size)
    for name in LEARNT:
        getattr(state, name).requires_grad_()
    return state


def tokens(x, start, stop):
    """The same call over the tokens from `start` to `stop`."""
    return x | {name: x[name][:, start:stop] for name in TOKENS}


def outputs(result):
    """o and the final state's tensors by name."""
    return {"o": result.o} | ({} if result.state is None else result.state.tensors())


def gradients(values, leaves, seed=9):
    """Gradients of a fixed random functional of `values` (those that have gradients), zeros where none arrives."""
    g = torch.Generator().manual_seed(seed)
    total = 0
    for name, t in values.items():
        if name == "o" or name in LEARNT:
            total = total + (t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(t) if f is None else f for (name, t), f in zip(leaves.items(), found, strict=True)}


def everything(x, impl, state=None, only_o=False, **options):
    """Outputs, final state and all gradients of one call, by name."""
    result = ttt_mlp(**x, impl=impl, initial_state=state, output_final_state=True, **options)
    values = outputs(result)
    leaves = dict(x) | ({} if state is None else {f"initial {name}": getattr(state, name) for name in LEARNT})
    found = gradients({"o": result.o} if only_o else values, leaves)
    return values | {f"gradient of {name}": t for name, t in found.items()}


def largest_difference(got, want):
    """The largest difference over all tensors, each relative to its largest element, and its name."""
    assert got.keys() == want.keys()
    worst = (0.0, "")
    for name, exact in want.items():
        assert got[name].shape == exact.shape, name
        scale = exact.abs().max().item() if exact.numel() else 0.0
        error = (got[name] - exact).abs().max().item() if exact.numel() else 0.0
        # not <=: a NaN is the worst of all
        if not error / (scale or 1.0) <= worst[0]:
            worst = (error / (scale or 1.0), name)
    return worst


def assert_equal_to(got, want, tolerance=1e-9):
    error, name = largest_difference(got, want)
    assert error <= tolerance, f"{name}: {error:.2e} relative to its largest element"
