"""`PackedStep`: one token through a converted model, with its weights laid out for that.

A step at batch 1 reads every weight and the whole state once and computes next to nothing, so what counts is the number of kernels and the
bytes. In a layer everything that is linear in the normed input (queries, keys, values, and the memory's whole projection) is one product,
gate and up projections are another, and the outputs of attention, memory and MLP are added to the residual stream by the products that
make them. For one sequence on a GPU these products are kernels of our own, which take norms and activation in (`kernels/linear.py`), and a
layer is one chain of launches; for more they are the library's, torch compiles what stands between them, and the memory runs beside
attention on a stream of its own.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allmem_ops._impl import resolve_impl
from allmem_ops.hf import AllMemCache
from allmem_ops.hf.runtime import Runtime, runtime_of
from allmem_ops.layers.memory import MemoryBranch, MemoryBranchState
from allmem_ops.ops.precision import accumulator_dtype
from allmem_ops.ops.swa.api import MAX_HEAD_DIM, swa_step
from allmem_ops.ops.ttt_mlp.slots import covers


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as the model families round it: in float32, then to `x`'s dtype, then times the weight."""
    y = x.to(accumulator_dtype(x.dtype))
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


def _places(positions: Tensor, last: int | None) -> Tensor:
    """[B, 1 or 2]: the token's position, and where a `last` one is given, the position up to that."""
    return positions[:, None] if last is None else torch.stack([positions, positions.clamp(max=last)], 1)


def rotations(positions: Tensor, inv_freq: Tensor, scaling: float, last: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1 or 2, D] at `_places`, as transformers' rotary modules of fixed angles compute them: one kernel, not fourteen."""
    angles = _places(positions, last)[..., None].float() * inv_freq.float()
    angles = torch.cat([angles, angles], -1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def gated(y: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up for [B, gate and up]."""
    gate, up = y.chunk(2, -1)
    return activation(gate) * up


_FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # rotary modules whose angles do not depend on the text's length
HALVES = torch.bfloat16, torch.float16
_SILU = ("SiLU", "SiLUActivation")


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _on(device: torch.device, function: Callable) -> Callable:
    """`function` as it runs on that device."""
    return _compiled(function) if device.type == "cuda" else function


def _joined(layers: list[nn.Linear], extra: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of several linear layers of one input as one, with the rows `extra` after them.

    Zeros fill up to a multiple of 8 rows: with others, which 3 memory heads give, cuBLAS takes a kernel of an older GPU.
    """
    weights = [layer.weight.detach() for layer in layers]
    rows = [*weights] if extra is None else [*weights, extra.to(weights[0].dtype)]
    count = sum(w.shape[0] for w in rows)
    rows.append(weights[0].new_zeros(-count % 8, weights[0].shape[1]))
    if all(layer.bias is None for layer in layers):
        return torch.cat(rows), None
    biases = [w.new_zeros(w.shape[0]) if layer.bias is None else layer.bias.detach() for w, layer in zip(weights, layers, strict=True)]
    given = sum(w.shape[0] for w in weights)
    return torch.cat(rows), torch.cat([*biases, weights[0].new_zeros(count + -count % 8 - given)])


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
        kernels: in half precision on a GPU, make the products by our own kernels, which True asks for up to 4 sequences and None for one.

    Raises:
        ValueError: `model` is not converted.
    """

    def __init__(self, model: nn.Module, *, memory: bool = True, kernels: bool | None = None) -> None:
        self.model, self.memory, self.kernels = model, memory, kernels
        cuda = memory and model.get_input_embeddings().weight.device.type == "cuda"
        self._side = torch.cuda.Stream(model.get_input_embeddings().weight.device) if cuda else None
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
        x = decoder.get_input_embeddings()(token[:, 0])
        # Before the first layer's window moves its positions on: rotations at the token's position, and at the last trained one.
        rotary = getattr(decoder, runtime.family.rotary)
        last = runtime.trained_length - 1 if self._clamps_sinks(runtime) else None
        if getattr(rotary, "rope_type", None) in _FIXED_ANGLES:
            cos, sin = _on(x.device, rotations)(cache.positions, rotary.inv_freq, rotary.attention_scaling, last, x.dtype)
        else:
            cos, sin = rotary(x[:, None], _places(cache.positions, last))
        at = cos[:, :1], sin[:, :1]
        clamped = None if last is None else (cos[:, 1:], sin[:, 1:])
        parts = self._parts(x)
        for layer, state in zip(self.layers, cache.layers, strict=True):
            self._add_mixed(x, layer, state, at, clamped, active, runtime, parts)
            mlp = layer.module.mlp
            y = parts.normed_product(x, layer.module.post_attention_layernorm, *layer.gate_up, ahead=(mlp.down_proj.weight,))
            parts.add_gated_product(x, y, mlp.act_fn, mlp.down_proj)
        forked = self._side is not None and not parts.one_chain and runtime.memory
        if forked and any(layer.branch is not None for layer in self.layers):
            torch.cuda.current_stream(x.device).wait_stream(self._side)  # the last folds
        return self._vocabulary(parts, x, decoder.norm, self.model.get_output_embeddings().weight)

    def _vocabulary(self, parts: "_Plain | _Kernels", x: Tensor, norm: nn.Module, weight: Tensor) -> Tensor:  # noqa: ARG002
        return F.linear(_on(x.device, rms_norm)(x, norm.weight, norm.variance_epsilon), weight)

    def _parts(self, x: Tensor) -> "_Plain | _Kernels":
        """Our kernels where they were asked for and are made for it, else the library's products."""
        first = self.layers[0].module.mlp
        ours = (x.shape[0] == 1 if self.kernels is None else self.kernels) and x.device.type == "cuda" and x.dtype in HALVES
        ours = ours and type(first.act_fn).__name__ in _SILU
        widest = max(first.down_proj.weight.shape[1], self.layers[0].attention.o_proj.weight.shape[1], x.shape[1])
        return _Kernels() if ours and _Kernels.cover(x.shape[0], widest) else _Plain()

    def _clamps_sinks(self, runtime: Runtime) -> bool:
        return runtime.config.sinks > 0 and runtime.config.sink_positions == "clamped"

    def _add_mixed(
        self, x: Tensor, layer: _Layer, state: Any, at: tuple[Tensor, Tensor], clamped: tuple[Tensor, Tensor] | None, active: Tensor,
        runtime: Runtime, parts: "_Plain | _Kernels",
    ) -> None:  # fmt: skip
        """Attention and memory of one layer, added to the residual stream `x` [B, d_model] in place."""
        attention = layer.attention
        D = attention.head_dim
        heads = attention.q_proj.weight.shape[0] // D, attention.k_proj.weight.shape[0] // D
        y = parts.normed_product(x, layer.module.input_layernorm, *layer.inputs)
        first, last = sum(heads) * D, (sum(heads) + heads[1]) * D
        norms = None
        if hasattr(attention, "q_norm"):
            norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon
        q, k, q_sinks = parts.rotated_heads(y, norms, heads, D, at, clamped)
        v = y[:, None, first:last].unflatten(-1, (heads[1], D))
        if layer.branch is None or not runtime.memory:
            o = self._attend(q, k, v, q_sinks, state.window, active, attention.scaling, runtime)
            parts.add_products(x, o.flatten(1), attention.o_proj, None)
            return
        read = functools.partial(
            self._read_memory, y[:, last : last + layer.branch.in_proj.out_features], layer.branch, state.memory, active
        )
        if parts.one_chain and D <= MAX_HEAD_DIM and self._one_kernel(layer.branch, y):
            # The memory beside attention's first kernel, the fold beside the output projection.
            found = []
            o = parts.attend(q, k, v, q_sinks, state.window, active, attention.scaling, lambda: found.append(read(True)))
            [(readout, fold)] = found
        elif self._side is None:
            readout, fold = read(False)
            o = self._attend(q, k, v, q_sinks, state.window, active, attention.scaling, runtime)
        else:
            main = torch.cuda.current_stream(x.device)
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                readout, fold = read(False)
                done = self._side.record_event()
                fold()  # nobody has to wait for it before the step's end
            fold = None
            o = self._attend(q, k, v, q_sinks, state.window, active, attention.scaling, runtime)
            main.wait_event(done)
        parts.add_products(x, o.flatten(1), attention.o_proj, (readout, layer.memory_out))
        if fold is not None:
            fold()

    @staticmethod
    def _one_kernel(branch: MemoryBranch, x: Tensor) -> bool:
        """Whether the memory of a layer is one kernel for activations as `x`."""
        config = branch.config
        if not covers(config.head_dim, config.hidden) or resolve_impl("ttt_mlp_step", config.impl, x) != "triton":
            return False
        from allmem_ops.inference import launch  # noqa: PLC0415 - it imports triton

        return launch.holds(branch, x.dtype)

    def _read_memory(
        self, columns: Tensor, branch: MemoryBranch, state: MemoryBranchState, active: Tensor, beside: bool
    ) -> tuple[Tensor, Callable[[], None]]:
        """The readout [B, H*d] from the memory's columns of the projection, and what is left to do for the state afterwards."""
        if self._one_kernel(branch, columns):
            from allmem_ops.inference import launch  # noqa: PLC0415 - it imports triton

            return launch.memory(columns, branch, state, active, beside=beside)
        return branch.step_readout(columns[:, None], state, active)[:, 0], lambda: None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, window: Any, active: Tensor, scale: float, runtime: Runtime
    ) -> Tensor:
        """[B, 1, HQ, D]; the token is put into `window`."""
        return swa_step(q, k, v, window, scale=scale, q_sinks=q_sinks, active=active, impl=runtime.config.impl)


class _Plain:
    """The products of a layer by the library, the rest compiled where there is a GPU; the memory beside attention on another stream."""

    one_chain = False

    def normed_product(self, x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None, ahead: Sequence[Tensor] = ()) -> Tensor:  # noqa: ARG002
        return F.linear(_on(x.device, rms_norm)(x, norm.weight, norm.variance_epsilon), weight, bias)

    def rotated_heads(self, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        return _on(y.device, rotated_heads)(y, *args)

    def add_gated_product(self, x: Tensor, y: Tensor, activation: Callable[[Tensor], Tensor], down: nn.Linear) -> None:
        self.add_products(x, _on(x.device, gated)(y, activation), down, None)

    def add_products(self, x: Tensor, y: Tensor, layer: nn.Linear, also: tuple[Tensor, Tensor] | None) -> None:
        """x += layer(y) + also[0] @ also[1].T, in the products' epilogues."""
        if layer.bias is not None:
            x += layer.bias
        x.addmm_(y, layer.weight.T)
        if also is not None:
            x.addmm_(also[0], also[1].T)


class _Kernels:
    """The same by `launch`: a product with all that stands around it is one kernel. Each kernel is launched while the one before it runs,
    and the memory and its fold run beside the one that they follow: a second stream would break that chain at its fork and its join."""

    one_chain = True

    def __init__(self) -> None:
        from allmem_ops.inference import launch  # noqa: PLC0415 - it imports triton

        self.launch = launch

    @staticmethod
    def cover(batch: int, widest: int) -> bool:
        from allmem_ops.inference import launch  # noqa: PLC0415 - it imports triton

        return batch <= launch.MAX_BATCH and widest <= launch.MAX_INPUT

    def normed_product(self, x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None, ahead: Sequence[Tensor] = ()) -> Tensor:
        """`ahead`: what the kernel after it reads, on its way to L2."""
        return self.launch.linear(x, weight, bias, norm=(norm.weight, norm.variance_epsilon), ahead=ahead)

    def rotated_heads(self, *args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.launch.heads(*args)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, window: Any, active: Tensor, scale: float, between: Callable[[], Any]
    ) -> Tensor:
        """`swa_step` with the launch of a kernel between its two."""
        from allmem_ops.ops.swa import launch_step  # noqa: PLC0415 - it imports triton

        buffers = window.sink_k, window.sink_v, window.ring_k, window.ring_v, window.positions
        return launch_step.swa_step(q, k, v, q_sinks, active, *buffers, scale, between)

    def add_gated_product(self, x: Tensor, y: Tensor, activation: Callable[[Tensor], Tensor], down: nn.Linear) -> None:  # noqa: ARG002
        self.launch.linear(y, down.weight, down.bias, gated=True, into=x)

    def add_products(self, x: Tensor, y: Tensor, layer: nn.Linear, also: tuple[Tensor, Tensor] | None) -> None:
        self.launch.linear(y, layer.weight, layer.bias, also=also, into=x)


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
