"""`TokenMixer`: AllMem's token mixer as one layer, windowed attention with RoPE and the memory beside it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from allmem_ops._validation import check_bool, check_dtype, check_float, check_int, check_shape, fail
from allmem_ops.layers.config import AllMemConfig
from allmem_ops.layers.memory import MemoryBranch, MemoryBranchState
from allmem_ops.layers.state_group import StateGroup
from allmem_ops.ops.rotary.api import Rotary, rotary, rotary_table
from allmem_ops.ops.swa.api import swa, swa_step
from allmem_ops.ops.swa.cache import WindowCache


@dataclass(eq=False)
class TokenMixerState(StateGroup):
    """What one `TokenMixer` carries from token to token, for N sequences: constant bytes.

    Args:
        window: the keys and values that attention can still see, rotated to their positions.
        memory: the memory branch's.
    """

    window: WindowCache
    memory: MemoryBranchState


class TokenMixer(nn.Module):
    """One token mixer of AllMem (arXiv 2602.13680): a drop-in for a decoder layer's norm and attention.

        y = Linear_o(swa(rope(q), rope(k), v)) + alpha * Memory(RMSNorm(x)),     q, k, v = Linear(RMSNorm(x))

    The residual connection around it is the layer's. alpha starts at zero: a new mixer is windowed attention with sinks.

    Args:
        d_model: width of the hidden state.
        heads, heads_kv, head_dim: of the attention; `heads` is a multiple of `heads_kv`, `head_dim` is even.
        config: window, sinks, and the memory's shape and rules; its `heads` None stands for `heads_kv`.
        rope_theta: base of RoPE's frequencies.
        trained_length: P; with `config.sink_positions="clamped"` a sink outside the window is scored with the query rotated
            at min(position, P - 1). None: positions are never clamped.
        qk_norm: RMSNorm of each head of q and k before RoPE, as Qwen3 has.
        norm_eps: eps of the RMSNorms outside the memory, inside the root.
        device, dtype: of the parameters; the memory's stay float32 (float64 with float64).

    Example:
        >>> mixer = TokenMixer(64, heads=4, heads_kv=2, head_dim=16, config=AllMemConfig(window=8, sinks=2, chunk_size=4))
        >>> x = torch.randn(1, 20, 64)
        >>> y = mixer(x)
        >>> state = mixer.initial_state(batch=1)
        >>> with torch.no_grad():
        ...     parts = [mixer(piece, state=state) for piece in x.split([13, 6, 1], dim=1)]
        >>> torch.allclose(torch.cat(parts, 1), y, atol=1e-5)
        True
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int,
        heads_kv: int,
        head_dim: int,
        config: AllMemConfig,
        rope_theta: float = 10000.0,
        trained_length: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("heads", heads), ("heads_kv", heads_kv), ("head_dim", head_dim)):
            check_int(name, value, 1)
        if heads % heads_kv:
            fail("heads", f"must be a multiple of heads_kv={heads_kv}", heads)
        if head_dim % 2:
            fail("head_dim", "must be even", head_dim)
        if not isinstance(config, AllMemConfig):
            fail("config", "must be an AllMemConfig", type(config).__name__)
        check_float("rope_theta", rope_theta, above=0.0)
        check_bool("qk_norm", qk_norm)
        if trained_length is not None:
            check_int("trained_length", trained_length, 1)
        self.d_model, self.config, self.trained_length = d_model, config, trained_length
        self.shape = (heads, heads_kv, heads_kv), head_dim
        place = {"device": device, "dtype": dtype}
        self.norm = nn.RMSNorm(d_model, eps=norm_eps, **place)
        self.qkv_proj = nn.Linear(d_model, (heads + 2 * heads_kv) * head_dim, bias=False, **place)
        self.q_norm, self.k_norm = (nn.RMSNorm(head_dim, eps=norm_eps, **place) if qk_norm else None for _ in range(2))
        self.o_proj = nn.Linear(heads * head_dim, d_model, bias=False, **place)
        memory_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.memory = MemoryBranch(d_model, config, heads=heads_kv, device=device, dtype=memory_dtype)
        frequencies = rope_theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=memory_dtype) / head_dim)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def initial_state(self, batch: int, dtype: torch.dtype | None = None) -> TokenMixerState:
        """The state of `batch` sequences that have not begun; `dtype` of the activations to come, default that of the projections."""
        (_, heads_kv, _), head_dim = self.shape
        dtype = self.qkv_proj.weight.dtype if dtype is None else dtype
        options = {"window": self.config.window, "sinks": self.config.sinks, "dtype": dtype, "device": self.inv_freq.device}
        return TokenMixerState(WindowCache.empty(batch, heads_kv, head_dim, **options), self.memory.initial_state(batch, dtype))

    def forward(
        self, x: Tensor, *, state: TokenMixerState | None = None, cu_seqlens: Tensor | None = None, active: Tensor | None = None
    ) -> Tensor:
        """What the layer adds to its residual stream.

        Args:
            x: [B, T, d_model], the residual stream.
            state: where the B sequences stand; goes on from there and is updated in place. With T > 1 they have to stand at
                one position, which is read on the host; with T = 1 nothing is.
            cu_seqlens: [N+1] offsets of packed sequences (B = 1, no state), or None.
            active: bool [B], only with a state and T = 1, without gradients: the other rows' state stays and they get zeros.

        Returns:
            [B, T, d_model] in `x`'s dtype.

        Raises:
            ValueError: shapes, dtypes or a state that do not fit; the message names the argument.
        """
        check_shape("x", x, "B T d_model", {"d_model": self.d_model})
        B, T, _ = x.shape
        if state is not None and cu_seqlens is not None:
            fail("cu_seqlens", "must be None with a `state`", "offsets")
        if state is not None and state.batch != B:
            fail("state", f"must hold {B} sequences", state.batch)
        if active is not None:
            if state is None or T != 1:
                fail("active", "needs a `state` and one token", f"{T} tokens" if state is not None else "no state")
            check_shape("active", active, "B", {"B": B})
            check_dtype("active", active, torch.bool)
        x = self.norm(x)
        y = self.o_proj(self._attend(x, state, cu_seqlens, active).flatten(2))
        memory_state = None if state is None else state.memory
        out = self.memory(x, y, state=memory_state, cu_seqlens=cu_seqlens, active=active, overwrite_attn=True)
        return out if active is None else torch.where(active[:, None, None], out, 0)

    def _attend(self, x: Tensor, state: TokenMixerState | None, cu_seqlens: Tensor | None, active: Tensor | None) -> Tensor:
        config, ((heads, heads_kv, _), head_dim) = self.config, self.shape
        qkv = self.qkv_proj(x).unflatten(-1, (heads + 2 * heads_kv, head_dim))
        positions = _positions(x, state, cu_seqlens)
        q, k, v = self._rotary(qkv, positions, heads_kv)
        q_sinks = self._clamped(qkv[:, :, :heads], positions, state)
        if state is None:
            return swa(q, k, v, window=config.window, sinks=config.sinks, q_sinks=q_sinks, cu_seqlens=cu_seqlens, impl=config.impl)
        if x.shape[1] == 1:
            return swa_step(q, k, v, state.window, q_sinks=q_sinks, active=active, impl=config.impl)
        held = state.window.keys_values()
        seen = (torch.cat(pair, 1) for pair in zip(held, (k, v), strict=True))
        o = swa(q, *seen, window=config.window, sinks=config.sinks, q_sinks=q_sinks, impl=config.impl)
        state.window.append(k.detach(), v.detach())
        return o

    def _rotary(self, qkv: Tensor, positions: Tensor, heads_kv: int) -> Rotary:
        """Norm and RoPE of the queries and of `heads_kv` heads of keys."""
        norms: dict[str, Any] = {}
        if self.q_norm is not None:
            norms = {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight if heads_kv else None, "eps": self.q_norm.eps}
        table = rotary_table(positions, self.inv_freq)
        return rotary(qkv, *table, heads=self.shape[0][0], heads_kv=heads_kv, impl=self.config.impl, **norms)

    def _clamped(self, q: Tensor, positions: Tensor, state: TokenMixerState | None) -> Tensor | None:
        """The queries for sinks outside the window; None where no position can pass the trained length or nothing is clamped."""
        last = self.trained_length
        if last is None or not self.config.sinks or self.config.sink_positions != "clamped" or (state is None and q.shape[1] <= last):
            return None
        return self._rotary(q, positions.clamp(max=last - 1), 0).q

    def extra_repr(self) -> str:
        (heads, heads_kv, _), head_dim = self.shape
        return f"d_model={self.d_model}, heads={heads}, heads_kv={heads_kv}, head_dim={head_dim}"


def _positions(x: Tensor, state: TokenMixerState | None, cu_seqlens: Tensor | None) -> Tensor:
    """[B or 1, T]: where each token stands in its sequence, from tensors on the device alone."""
    index = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is not None:
        start = cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]
        return (index - start)[None]
    return index[None] if state is None else state.window.positions[:, None] + index
