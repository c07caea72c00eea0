"""Calls of `rotary` with random inputs, and two independent ways to compute them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allmem_ops import rotary_table


@dataclass(frozen=True)
class Case:
    """The shape of a call. `spread`: every sequence has positions of its own."""

    batch: int = 2
    tokens: int = 5
    heads: int = 4
    heads_kv: int = 2
    width: int = 8
    norms: bool = True
    spread: bool = False

    def inputs(self, dtype: torch.dtype = torch.float64, param_dtype: torch.dtype | None = None, seed: int = 0) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, to: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(to).requires_grad_()

        norms = [draw(self.width, to=param_dtype or dtype) if self.norms else None for _ in range(2)]
        return {
            "qkv": draw(self.batch, self.tokens, self.heads + 2 * self.heads_kv, self.width, to=dtype),
            "q_norm": norms[0],
            "k_norm": norms[1] if self.heads_kv else None,
        }

    def positions(self) -> Tensor:
        index = torch.arange(self.tokens)[None]
        return index + 1000 * torch.arange(self.batch)[:, None] if self.spread else index

    def table(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inv_freq = 10000.0 ** -(torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)
        # one table for every dtype: what is compared is the operator, not the angles
        return tuple(t.to(wide).to(device) for t in (t.float() for t in rotary_table(self.positions(), inv_freq)))

    def options(self) -> dict[str, int]:
        return {"heads": self.heads, "heads_kv": self.heads_kv}


def by_hand(case: Case, x: dict[str, Tensor | None], eps: float = 1e-6) -> list[Tensor]:
    """float64, head by head; the rotation as a product of complex numbers."""
    cos, sin = case.table(torch.float64)
    turn = torch.complex(cos, sin).expand(case.batch, -1, -1)
    half, heads = case.width // 2, []
    for head in range(case.heads + case.heads_kv):
        y = x["qkv"][:, :, head]
        weight = x["q_norm"] if head < case.heads else x["k_norm"]
        if weight is not None:
            y = y * math.sqrt(case.width) / (y.square().sum(-1, keepdim=True) + case.width * eps).sqrt() * weight
        z = torch.complex(y[..., :half], y[..., half:]) * turn
        heads.append(torch.cat([z.real, z.imag], -1))
    stacked = [torch.stack(part, 2) if part else y[:, :, None][:, :, :0] for part in (heads[: case.heads], heads[case.heads :])]
    return [*stacked, x["qkv"][:, :, case.heads + case.heads_kv :]]


def plain(case: Case, x: dict[str, Tensor | None], eps: float = 1e-6) -> list[Tensor]:
    """As one would type it, every step rounded to the inputs' dtype: the yardstick for low precision."""
    cos, sin = (t[:, :, None].to(x["qkv"].dtype) for t in case.table(x["qkv"].dtype))
    parts = x["qkv"].split([case.heads, case.heads_kv, case.heads_kv], 2)
    turned = []
    for y, weight in zip(parts, (x["q_norm"], x["k_norm"]), strict=False):
        z = y if weight is None else y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps) * weight
        first, second = z.chunk(2, -1)
        turned.append(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))
    return [*turned, parts[2]]


def gradients(outputs: Any, x: dict[str, Tensor | None], seed: int = 1) -> dict[str, Tensor]:
    """Of every input, from random gradients of the outputs."""
    present = {name: value for name, value in x.items() if value is not None}
    generator = torch.Generator().manual_seed(seed)
    up = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype).to(y.device) for y in outputs]
    return dict(zip(present, torch.autograd.grad(list(outputs), list(present.values()), up), strict=True))
