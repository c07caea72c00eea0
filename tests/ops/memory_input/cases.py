"""Calls of `memory_input` with random inputs, and the formula as one would type it."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from allmem_ops import memory_input
from allmem_ops.ops.memory_input.state import ConvTail

PARAMETERS = ("projected", "conv_weight", "head_bias", "q_norm", "k_norm")
OUTPUTS = ("q", "k", "v", "eta", "mu", "gate")


@dataclass(frozen=True)
class Case:
    """The shape and the options of a call. `lengths`: packed sequences; None: `batch` rows of `tokens`."""

    batch: int = 2
    tokens: int = 9
    heads: int = 3
    width: int = 5
    taps: int = 4
    gates: int = 3
    lengths: tuple[int, ...] | None = None
    tail: bool = False
    norm: bool = True
    l2: bool = True
    silu: bool = True
    l2_eps: float = 1e-3  # large: its part in the gradients shows

    @property
    def channels(self) -> int:
        return 3 * self.heads * self.width

    @property
    def shape(self) -> tuple[int, int]:
        return (self.batch, self.tokens) if self.lengths is None else (1, sum(self.lengths))

    def inputs(self, dtype=torch.float64, param_dtype=None, device="cpu", seed=0) -> dict:
        generator = torch.Generator().manual_seed(seed)
        param = param_dtype or dtype

        def draw(*shape, to):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, to).requires_grad_()

        return {
            "projected": draw(*self.shape, self.channels + 4 * self.heads + self.gates, to=dtype),
            "conv_weight": draw(self.channels, self.taps, to=param),
            "head_bias": draw(4 * self.heads + self.gates, to=param),
            "q_norm": draw(self.width, to=param) if self.norm else None,
            "k_norm": draw(self.width, to=param) if self.norm else None,
        }

    def state(self, dtype=torch.float64, device="cpu") -> ConvTail | None:
        if not self.tail:
            return None
        rows = self.batch if self.lengths is None else len(self.lengths)
        generator = torch.Generator().manual_seed(7)
        tail = torch.randn(rows, self.taps - 1, self.channels, generator=generator, dtype=torch.float64)
        return ConvTail(tail.to(device, dtype))

    def offsets(self, device="cpu") -> torch.Tensor | None:
        return None if self.lengths is None else torch.tensor([0, *self.lengths], device=device).cumsum(0)

    def options(self) -> dict:
        return {
            "heads": self.heads,
            "l2": self.l2,
            "qk_activation": "silu" if self.silu else "none",
            "l2_eps": self.l2_eps,
        }

    def call(self, x: dict, impl: str, state: ConvTail | None = None, **changes):
        options = self.options() | changes
        if "cu_seqlens" not in options:
            options["cu_seqlens"] = self.offsets(x["projected"].device)
        rest = {name: x[name] for name in ("q_norm", "k_norm")}
        return memory_input(x["projected"], x["conv_weight"], x["head_bias"], **rest, initial_state=state, impl=impl, **options)


FULL = Case()
PACKED = Case(lengths=(4, 0, 1, 7), tail=True)


@st.composite
def cases(draw) -> Case:
    taps = draw(st.integers(1, 4))
    return Case(
        batch=draw(st.integers(1, 2)),
        tokens=draw(st.integers(0, 9)),
        heads=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 5)),
        taps=taps,
        gates=draw(st.sampled_from([0, 3])),
        lengths=draw(st.none() | st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)),
        tail=draw(st.booleans()),
        norm=draw(st.booleans()),
        l2=draw(st.booleans()),
        silu=draw(st.booleans()),
    )


def outputs_of(result) -> dict[str, torch.Tensor]:
    return {name: value for name, value in zip(OUTPUTS, result[:6], strict=True) if value is not None}


def upstream(outputs: dict, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype) for n, y in outputs.items()}


def gradients(outputs: dict, x: dict, do: dict) -> dict[str, torch.Tensor]:
    present = {name: value for name, value in x.items() if value is not None}
    found = torch.autograd.grad([outputs[n] for n in do], list(present.values()), [do[n] for n in do])
    return dict(zip(present, found, strict=True))


def plain(case: Case, x: dict, state: ConvTail | None = None, norm_eps: float = 1e-6) -> dict[str, torch.Tensor]:
    """The formula as one would type it, every step rounded to the inputs' dtype, torch's own grouped convolution."""
    B, T, H, d, K, C = *case.shape, case.heads, case.width, case.taps, case.channels
    bounds = [(b, 0, T) for b in range(B)] if case.lengths is None else []
    if case.lengths is not None:
        ends = torch.tensor(case.lengths).cumsum(0).tolist()
        bounds = [(0, end - n, end) for end, n in zip(ends, case.lengths, strict=True)]
    pieces = []
    for n, (b, start, end) in enumerate(bounds):
        piece = x["projected"][b, start:end, :C]
        before = piece.new_zeros(K - 1, C) if state is None else state.inputs[n]
        padded = torch.cat([before, piece]).T[None]
        y = F.conv1d(padded, x["conv_weight"][:, None], groups=C)[0].T if end > start else piece
        pieces.append(y)
    y = torch.stack(pieces) if case.lengths is None else torch.cat(pieces)[None]
    q, k, v = y.reshape(B, T, 3, H, d).unbind(2)

    def normalised(y, weight):
        y = F.silu(y) if case.silu else y
        if weight is not None:
            y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + norm_eps) * weight
        return y / torch.sqrt(y.square().sum(-1, keepdim=True) + case.l2_eps) if case.l2 else y

    eta, mu, gate = (x["projected"][..., C:] + x["head_bias"]).split([3 * H, H, case.gates], -1)
    found = normalised(q, x["q_norm"]), normalised(k, x["k_norm"]), F.silu(v), F.softplus(eta).unflatten(-1, (H, 3)), mu.sigmoid(), gate
    return {name: value for name, value in zip(OUTPUTS, found, strict=True) if value.shape[-1] or name != "gate"}
