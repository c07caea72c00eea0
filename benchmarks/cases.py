"""The registry of benchmark cases: one entry an operator, shape and implementation, with what it computes and moves.

FLOPs are those of the formulas in the operators' READMEs: each product that the mathematics needs, counted once. Bytes are the least
traffic: every input read once, every output written once. So a share of a ceiling is a share of what the machine could do at best.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from allmem_ops import MemoryState, WindowCache, gated_fusion, memory_input, rotary, rotary_table, swa, swa_step, ttt_mlp, ttt_mlp_step
from allmem_ops.ops.swa.geometry import visible_pairs

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        op: the public function.
        name: shape and implementation; with `op` the key of the case.
        inputs: makes random inputs on a device; those that require a gradient are differentiated in direction "both".
        call: runs the operator once and returns its output.
        flops, bytes: of the forward pass.
        flops_both, bytes_both: of forward and backward; None: the case has no backward.
    """

    op: str
    name: str
    inputs: Callable[[str], Inputs]
    call: Callable[[Inputs], Tensor]
    flops: int
    bytes: int
    flops_both: int | None = None
    bytes_both: int | None = None

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward",) if self.flops_both is None else ("forward", "both")

    def work(self, direction: str) -> tuple[int, int]:
        """(FLOPs, bytes) of "forward" or "both"."""
        return (self.flops, self.bytes) if direction == "forward" else (self.flops_both, self.bytes_both)


def _swa(impl: str, T: int, HQ: int, HK: int, D: int, window: int, sinks: int, dtype: torch.dtype = torch.float32) -> Case:
    def inputs(device: str) -> Inputs:
        shapes = {"q": (1, T, HQ, D), "k": (1, T, HK, D), "v": (1, T, HK, D)}
        return {n: torch.randn(s, device=device, dtype=dtype, requires_grad=True) for n, s in shapes.items()}

    products = HQ * D * visible_pairs(T, T, window, sinks)
    moved = T * D * (2 * HQ + 2 * HK) * dtype.itemsize  # q, k, v, o
    return Case(
        "swa",
        f"{impl}-T{T}-w{window}+{sinks}-{HQ}/{HK}x{D}",
        inputs,
        lambda x: swa(x["q"], x["k"], x["v"], window=window, sinks=sinks, impl=impl),
        flops=4 * products,
        bytes=moved,
        flops_both=14 * products,  # backward: q k again, and four products for the gradients
        bytes_both=3 * moved,
    )


def _swa_step(B: int, HQ: int, HK: int, D: int, window: int, sinks: int, dtype: torch.dtype = torch.float32) -> Case:
    caches: dict[str, WindowCache] = {}

    def inputs(device: str) -> Inputs:
        cache = caches[device] = WindowCache.empty(B, HK, D, window=window, sinks=sinks, dtype=dtype, device=device)
        cache.append(*torch.randn(2, B, window + sinks, HK, D, device=device, dtype=dtype).unbind(0))
        return {n: torch.randn(B, 1, h, D, device=device, dtype=dtype) for n, h in (("q", HQ), ("k", HK), ("v", HK))}

    keys = window + sinks
    return Case(
        "swa_step",
        f"chunk-B{B}-w{window}+{sinks}-{HQ}/{HK}x{D}",
        inputs,
        lambda x: swa_step(x["q"], x["k"], x["v"], caches[x["q"].device.type]),
        flops=4 * B * HQ * D * keys,
        bytes=2 * B * HK * D * keys * dtype.itemsize,
    )


def _memory_inputs(device: str, B: int, T: int, H: int, d: int, h: int, dtype: torch.dtype, grad: bool) -> Inputs:
    x = {n: torch.randn(B, T, H, d, device=device) for n in "qkv"}
    x |= {n: torch.nn.functional.normalize(x[n], dim=-1) for n in "qk"}
    x = {n: t.to(dtype) for n, t in x.items()}
    x |= {n: torch.randn(H, h, d, device=device) * d**-0.5 for n in ("w_gate", "w_up")}
    x |= {"w_down": torch.randn(H, d, h, device=device) * h**-0.5}
    x |= {"eta": torch.full((B, T, H, 3), 1e-2, device=device), "mu": torch.full((B, T, H), 0.9, device=device)}
    return {n: t.requires_grad_(grad) for n, t in x.items()}


def _ttt_mlp(impl: str, T: int, H: int, d: int, h: int, chunk_size: int, dtype: torch.dtype = torch.float32) -> Case:
    moved = T * H * (4 * d * dtype.itemsize + 16) + 3 * H * d * h * 4  # q, k, v, o; eta and mu in fp32; the weights
    return Case(
        "ttt_mlp",
        f"{impl}-T{T}-c{chunk_size}-{H}x{d}x{h}",
        lambda device: _memory_inputs(device, 1, T, H, d, h, dtype, grad=True),
        lambda x: ttt_mlp(*x.values(), chunk_size=chunk_size, impl=impl).o,
        flops=18 * d * h * T * H,
        bytes=moved,
        flops_both=(18 + 36) * d * h * T * H,
        bytes_both=3 * moved,
    )


def _ttt_mlp_step(B: int, H: int, d: int, h: int, chunk_size: int, dtype: torch.dtype = torch.float32) -> Case:
    states: dict[str, MemoryState] = {}

    def inputs(device: str) -> Inputs:
        x = _memory_inputs(device, B, 1, H, d, h, dtype, grad=False)
        weights = [x.pop(n) for n in ("w_gate", "w_up", "w_down")]
        states[device] = MemoryState.initial(*weights, batch=B, chunk_size=chunk_size, dtype=dtype)
        return x

    return Case(
        "ttt_mlp_step",
        f"chunk-B{B}-c{chunk_size}-{H}x{d}x{h}",
        inputs,
        lambda x: ttt_mlp_step(*x.values(), states[x["q"].device.type]),
        flops=18 * B * H * d * h,
        bytes=3 * B * H * d * h * 4,  # a step reads the weights; writes of the open chunk come once in many tokens
    )


def _fusion(impl: str, T: int, H: int, d: int, dtype: torch.dtype = torch.float32) -> Case:
    D = H * d

    def inputs(device: str) -> Inputs:
        shapes = {"attn": (1, T, D), "memory": (1, T, H, d), "alpha": (D,), "gate": (1, T, H), "norm_weight": (d,)}
        return {n: torch.randn(s, device=device, dtype=dtype, requires_grad=True) for n, s in shapes.items()}

    moved = T * (3 * D + H) * dtype.itemsize
    return Case(
        "gated_fusion",
        f"{impl}-T{T}-{H}x{d}",
        inputs,
        lambda x: gated_fusion(x["attn"], x["memory"], x["alpha"], gate=x["gate"], norm_weight=x["norm_weight"], impl=impl),
        flops=0,  # elementwise
        bytes=moved,
        flops_both=0,
        bytes_both=moved + T * (3 * D + 2 * H) * dtype.itemsize,  # dy, memory, gate in; dmemory and dgate out (dattn is dy)
    )


def _memory_input(impl: str, T: int, H: int, d: int, taps: int = 4, dtype: torch.dtype = torch.float32) -> Case:
    C, columns = 3 * H * d, 3 * H * d + 5 * H

    def inputs(device: str) -> Inputs:
        shapes = {"projected": (1, T, columns), "conv_weight": (C, taps), "head_bias": (5 * H,), "q_norm": (d,), "k_norm": (d,)}
        return {n: torch.randn(s, device=device, dtype=dtype, requires_grad=True) for n, s in shapes.items()}

    def call(x: Inputs) -> Tensor:
        found = memory_input(*list(x.values())[:3], heads=H, q_norm=x["q_norm"], k_norm=x["k_norm"], impl=impl)
        return torch.cat([y.flatten(2) for y in found[:6]], -1)  # one output, so that every gradient is one

    moved = 2 * T * columns * dtype.itemsize
    return Case(
        "memory_input",
        f"{impl}-T{T}-{H}x{d}",
        inputs,
        call,
        flops=2 * taps * T * C,
        bytes=moved,
        flops_both=8 * taps * T * C,  # backward: the convolution again, and its two gradients
        bytes_both=moved + 3 * T * columns * dtype.itemsize,
    )


def _rotary(impl: str, T: int, HQ: int, HK: int, D: int, dtype: torch.dtype = torch.float32) -> Case:
    def inputs(device: str) -> Inputs:
        shapes = {"qkv": (1, T, HQ + 2 * HK, D), "q_norm": (D,), "k_norm": (D,)}
        return {n: torch.randn(s, device=device, dtype=dtype, requires_grad=True) for n, s in shapes.items()}

    def call(x: Inputs) -> Tensor:
        qkv = x["qkv"]
        inv_freq = 10000.0 ** -(torch.arange(0, D, 2, device=qkv.device) / D)
        table = rotary_table(torch.arange(T, device=qkv.device)[None], inv_freq)
        return torch.cat(rotary(qkv, *table, heads=HQ, heads_kv=HK, q_norm=x["q_norm"], k_norm=x["k_norm"], impl=impl), 2)

    heads, head, table = HQ + HK, T * D * dtype.itemsize, 4 * T * D
    moved = 2 * heads * head + table
    return Case(
        "rotary",
        f"{impl}-T{T}-{HQ}/{HK}x{D}",
        inputs,
        call,
        flops=0,  # elementwise
        bytes=moved,
        flops_both=0,
        bytes_both=moved + (2 * (heads + HK) + heads) * head + table,  # the outputs' gradients, the projection's, q and k again
    )


# Small enough for two CPU cores. The heads are SmolLM2-135M's; short and odd lengths stand beside the plain ones.
CASES = (
    _swa("reference", 1024, 9, 3, 64, window=512, sinks=4),
    _swa("chunk", 1024, 9, 3, 64, window=512, sinks=4),
    _swa("chunk", 2048, 9, 3, 64, window=512, sinks=4),
    _swa("chunk", 111, 9, 3, 64, window=60, sinks=4),
    _swa_step(1, 9, 3, 64, window=512, sinks=4),
    _swa_step(8, 9, 3, 64, window=512, sinks=4),
    _ttt_mlp("reference", 4096, 3, 64, 128, chunk_size=512),
    _ttt_mlp("chunk", 4096, 3, 64, 128, chunk_size=512),
    _ttt_mlp("chunk", 4096, 3, 64, 128, chunk_size=111),
    _ttt_mlp("chunk", 63, 3, 64, 128, chunk_size=512),
    _ttt_mlp_step(1, 3, 64, 128, chunk_size=512),
    _ttt_mlp_step(8, 3, 64, 128, chunk_size=512),
    _fusion("reference", 4096, 9, 64),
    _fusion("chunk", 4096, 9, 64),
    _memory_input("reference", 4096, 3, 64),
    _memory_input("chunk", 4096, 3, 64),
    _rotary("reference", 4096, 9, 3, 64),
    _rotary("chunk", 4096, 9, 3, 64),
)


def cases_of(*ops: str) -> list[tuple[Case, str]]:
    """(case, direction) of the given operators."""
    return [(case, direction) for case in CASES if case.op in ops for direction in case.directions]
