"""`PackedStep`: one token through a converted model, with its weights laid out for that.

A step at batch 1 reads every weight and the whole state once and computes next to nothing, so what counts is the number of kernels and the
bytes. In a layer everything that is linear in the normed input (queries, keys, values, and the memory's whole projection) is one product,
gate and up projections are another, and the outputs of attention, memory and MLP are added to the residual stream by the products that
make them. The elementwise work between them is compiled by torch where there is a GPU.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allmem_ops.hf import AllMemCache
from allmem_ops.hf.runtime import Runtime, runtime_of
from allmem_ops.layers.memory import MemoryBranch
from allmem_ops.ops.swa.api import swa_step


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as the model families round it: in float32, then to `x`'s dtype, then times the weight."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def rotated_heads(
    y: Tensor, norms: tuple[Tensor, Tensor, float] | None, heads: tuple[int, int], head_dim: int, at: tuple[Tensor, Tensor],
    clamped: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Queries, keys, and queries for the sinks, [B, 1, heads, D], from the projection `y` [B, columns].

    Args:
        norms: weights of the heads' RMSNorms and their eps, or None.
        heads: of queries and of keys.
        at, clamped: cos and sin [B, 1, D] at the token's position and at the last trained one, or None.
    """
    q, k = y[:, : sum(heads) * head_dim].unflatten(-1, (sum(heads), head_dim))[:, None].split(heads, 2)
    if norms is not None:
        q, k = rms_norm(q, norms[0], norms[2]), rms_norm(k, norms[1], norms[2])
    cos, sin = (c[:, :, None] for c in at)
    q_sinks = None if clamped is None else _turned(q, *(c[:, :, None] for c in clamped))
    return _turned(q, cos, sin), _turned(k, cos, sin), q_sinks


def gated(y: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up for [B, gate and up]."""
    gate, up = y.chunk(2, -1)
    return activation(gate) * up


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _on(device: torch.device, function: Callable) -> Callable:
    """`function` as it runs on that device."""
    return _compiled(function) if device.type == "cuda" else function


def _joined(layers: list[nn.Linear], extra: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of several linear layers of one input as one, with the rows `extra` after them."""
    weights = [layer.weight.detach() for layer in layers]
    rows = weights if extra is None else [*weights, extra.to(weights[0].dtype)]
    if all(layer.bias is None for layer in layers):
        return torch.cat(rows), None
    biases = [w.new_zeros(w.shape[0]) if layer.bias is None else layer.bias.detach() for w, layer in zip(weights, layers, strict=True)]
    return torch.cat(rows), torch.cat(biases if extra is None else [*biases, weights[0].new_zeros(extra.shape[0])])


@dataclass
class _Layer:
    """One decoder layer: its own modules, and copies of its weights side by side.

    Args:
        inputs: weight and bias of q, k, v and the memory's projection.
        memory_out: alpha times the memory's output projection, or None.
        gate_up: weight and bias of the MLP's two first projections.
    """

    module: nn.Module
    attention: nn.Module
    branch: MemoryBranch | None
    inputs: tuple[Tensor, Tensor | None]
    memory_out: Tensor | None
    gate_up: tuple[Tensor, Tensor | None]


class PackedStep:
    """Logits of one token a sequence, as the converted model computes them, with a quarter of its kernels.

    Holds copies of the projections' weights (not of the vocabulary's, nor of the output and down projections): `refresh` after a change.

    Args:
        model: a converted model of a known family.
        memory: False leaves the memory branches out, and their projections with them.

    Raises:
        ValueError: `model` is not converted.
    """

    def __init__(self, model: nn.Module, *, memory: bool = True) -> None:
        self.model, self.memory = model, memory
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the weights anew."""
        runtime = runtime_of(self.model)
        self.layers = []
        for module in getattr(runtime.decoder(self.model), runtime.family.layers):
            attention = getattr(module, runtime.family.attention)
            branch = getattr(attention, "memory", None) if self.memory else None
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            dtype = attention.o_proj.weight.dtype
            self.layers.append(
                _Layer(
                    module,
                    attention,
                    branch,
                    _joined(projections, None if branch is None else branch.in_proj.weight.detach()),
                    None if branch is None else (branch.alpha[:, None] * branch.out_proj.weight).to(dtype),
                    _joined([module.mlp.gate_proj, module.mlp.up_proj]),
                )
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        held = [t for layer in self.layers for t in (*layer.inputs, layer.memory_out, *layer.gate_up) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)

    @torch.no_grad()
    def __call__(self, token: Tensor, active: Tensor, cache: AllMemCache) -> Tensor:
        """Take `token` [B, 1] into `cache` in the rows of `active` [B]; the logits [B, V]."""
        runtime = runtime_of(self.model)
        decoder = runtime.decoder(self.model)
        norm = _on(token.device, rms_norm)
        x = decoder.get_input_embeddings()(token[:, 0])
        rotary = getattr(decoder, runtime.family.rotary)
        # The first layer's window moves its positions on: the rotations are made before.
        position = cache.positions[:, None]
        at = rotary(x[:, None], position)
        clamped = None
        if self._clamps_sinks(runtime):
            clamped = rotary(x[:, None], position.clamp(max=runtime.trained_length - 1))
        for layer, state in zip(self.layers, cache.layers, strict=True):
            self._add_mixed(x, layer, state, at, clamped, active, runtime)
            after, mlp = layer.module.post_attention_layernorm, layer.module.mlp
            y = F.linear(norm(x, after.weight, after.variance_epsilon), *layer.gate_up)
            _add_product(x, _on(x.device, gated)(y, mlp.act_fn), mlp.down_proj.weight, mlp.down_proj.bias)
        return F.linear(norm(x, decoder.norm.weight, decoder.norm.variance_epsilon), self.model.get_output_embeddings().weight)

    def _clamps_sinks(self, runtime: Runtime) -> bool:
        return runtime.config.sinks > 0 and runtime.config.sink_positions == "clamped"

    def _add_mixed(
        self, x: Tensor, layer: _Layer, state: Any, at: tuple[Tensor, Tensor], clamped: tuple[Tensor, Tensor] | None, active: Tensor,
        runtime: Runtime,
    ) -> None:  # fmt: skip
        """Attention and memory of one layer, added to the residual stream `x` [B, d_model] in place."""
        attention, before = layer.attention, layer.module.input_layernorm
        D = attention.head_dim
        heads = attention.q_proj.weight.shape[0] // D, attention.k_proj.weight.shape[0] // D
        y = F.linear(_on(x.device, rms_norm)(x, before.weight, before.variance_epsilon), *layer.inputs)
        norms = None
        if hasattr(attention, "q_norm"):
            norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon
        q, k, q_sinks = _on(x.device, rotated_heads)(y, norms, heads, D, at, clamped)
        first, last = sum(heads) * D, (sum(heads) + heads[1]) * D
        v = y[:, None, first:last].unflatten(-1, (heads[1], D))
        o = self._attend(q, k, v, q_sinks, state.window, active, attention.scaling, runtime)
        _add_product(x, o.flatten(1), attention.o_proj.weight, attention.o_proj.bias)
        if layer.branch is not None and runtime.memory:
            readout = layer.branch.step_readout(y[:, None, last:], state.memory, active)
            _add_product(x, readout[:, 0], layer.memory_out, None)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, window: Any, active: Tensor, scale: float, runtime: Runtime
    ) -> Tensor:
        """[B, 1, HQ, D]; the token is put into `window`."""
        return swa_step(q, k, v, window, scale=scale, q_sinks=q_sinks, active=active, impl=runtime.config.impl)


def _add_product(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x += y @ weight.T + bias, in the product's epilogue."""
    if bias is not None:
        x += bias
    x.addmm_(y, weight.T)


def fits(model: nn.Module) -> bool:
    """Whether every layer has the parts that `PackedStep` puts together."""
    runtime = runtime_of(model)
    layers = getattr(runtime.decoder(model), runtime.family.layers)
    parts = ("input_layernorm.variance_epsilon", "post_attention_layernorm.variance_epsilon", "mlp.gate_proj.weight", "mlp.up_proj.weight",
             "mlp.down_proj.weight", "mlp.act_fn")  # fmt: skip
    return all(_has(layer, part) for layer in layers for part in parts)


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True
