"""Every legal form of a `gated_fusion` call, with random inputs, and two independent ways to compute it."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

NAMES = ("attn", "memory", "alpha", "gate", "norm_weight")


@dataclass(frozen=True)
class Form:
    """The shape of a call. `gate` is None, "head", "channel" or, with memory [B, T, D], a number of heads."""

    batch: int = 2
    tokens: int = 5
    heads: int = 3
    width: int = 4
    split: bool = True  # memory [B, T, H, d], else [B, T, D]
    attn: bool = True
    alpha: bool = True
    gate: str | None = "head"
    norm: bool = True

    def inputs(self, dtype: torch.dtype = torch.float64, param_dtype: torch.dtype | None = None, seed: int = 0) -> dict:
        generator = torch.Generator().manual_seed(seed)
        b, t, h, d = self.batch, self.tokens, self.heads, self.width

        def draw(*shape, to=dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(to).requires_grad_()

        param = param_dtype or dtype
        return {
            "attn": draw(b, t, h * d) if self.attn else None,
            "memory": draw(b, t, h, d) if self.split else draw(b, t, h * d),
            "alpha": draw(h * d, to=param) if self.alpha else None,
            "gate": None if self.gate is None else draw(b, t, h if self.gate == "head" else h * d, to=param),
            "norm_weight": draw(d, to=param) if self.norm else None,
        }


FULL = Form()


@st.composite
def forms(draw) -> Form:
    split = draw(st.booleans())
    return Form(
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(0, 7)),
        heads=draw(st.integers(1, 4)),
        width=draw(st.integers(1, 5)),
        split=split,
        attn=draw(st.booleans()),
        alpha=draw(st.booleans()),
        gate=draw(st.sampled_from([None, "head", "channel"])),
        norm=split and draw(st.booleans()),
    )


def by_element(form: Form, x: dict, eps: float = 1e-6) -> list[float]:
    """The formula with Python numbers, one element at a time, in the order of y's elements."""
    h, d, out = form.heads, form.width, []
    for b in range(form.batch):
        for t in range(form.tokens):
            memory = x["memory"][b, t].flatten().tolist()
            for channel in range(h * d):
                head = channel // d
                value = memory[channel]
                if form.norm:
                    mean = sum(m * m for m in memory[head * d : (head + 1) * d]) / d
                    value = value / math.sqrt(mean + eps) * x["norm_weight"][channel % d].item()
                if form.gate:
                    value /= 1 + math.exp(-x["gate"][b, t, head if form.gate == "head" else channel].item())
                if form.alpha:
                    value *= x["alpha"][channel].item()
                out.append(value + (x["attn"][b, t, channel].item() if form.attn else 0.0))
    return out


def plain(form: Form, x: dict, eps: float = 1e-6) -> torch.Tensor:
    """The formula as one would type it, every step rounded to the inputs' dtype: the yardstick for low precision."""
    y = x["memory"]
    if form.norm:
        y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps) * x["norm_weight"]
    y = y.flatten(2)
    if form.gate:
        gate = torch.sigmoid(x["gate"])
        y = y * (gate.repeat_interleave(form.width, -1) if form.gate == "head" else gate)
    if form.alpha:
        y = y * x["alpha"]
    return y + x["attn"] if form.attn else y


def gradients(y: torch.Tensor, x: dict, dy: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    present = {name: value for name, value in x.items() if value is not None}
    if dy is None:
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return dict(zip(present, torch.autograd.grad(y, list(present.values()), dy), strict=True))
