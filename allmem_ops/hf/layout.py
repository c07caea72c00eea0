"""`Layout`: where the tokens of one forward pass lie, worked out once and handed to every layer."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allmem_ops._validation import check_dtype, check_shape, fail
from allmem_ops.hf.cache import AllMemCache
from allmem_ops.hf.runtime import Runtime
from allmem_ops.layers.config import AllMemConfig
from allmem_ops.ops.precision import accumulator_dtype


@dataclass(frozen=True)
class Layout:
    """The tokens of one call, [B, T].

    Either dense (`cu_seqlens` is None: every token is real), or packed: the real tokens only, one sequence after the other.

    Args:
        config, windows: in force for this call, window by layer (kept here so that a checkpointed layer runs anew
            under the same ones).
        memory: whether the memory branches run.
        cache: goes on from here, or None.
        past: tokens that the cache had seen before, padding included.
        batch, tokens: B and T.
        indices: int64 [n], flat positions of the real tokens in [B*T]; None: every token is real.
        cu_seqlens: int64 [N+1], where each packed sequence lies among them.
        lengths: the sequences' lengths on the host, with a cache.
        active: bool [B], for a single token: the rows that take it in; None: all.
        rotation: (cos, sin) [., ., D/2] that turn a query at its position i to min(i, P-1), or None where no query
            lies past P.
    """

    config: AllMemConfig
    windows: tuple[int, ...]
    memory: bool
    cache: AllMemCache | None
    past: int
    batch: int
    tokens: int
    indices: Tensor | None = None
    cu_seqlens: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    active: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, n, ...], the real tokens."""
        if self.cu_seqlens is None:
            return x
        x = x.flatten(0, 1)
        return (x if self.indices is None else x[self.indices])[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, n, ...] -> [B, T, ...], zeros at padding."""
        if self.cu_seqlens is None:
            return x
        if self.indices is None:
            return x.unflatten(1, (self.batch, self.tokens))[0]
        out = x.new_zeros(self.batch * self.tokens, *x.shape[2:])
        return out.index_copy(0, self.indices, x[0]).unflatten(0, (self.batch, self.tokens))


def make_layout(
    runtime: Runtime,
    inv_freq: Tensor,
    batch: int,
    tokens: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: AllMemCache | None,
    active: Tensor | None = None,
) -> Layout:
    """Read mask, positions and cache of one call; `active`, bool [B], stands for the mask in a step and is never read on the host.

    Raises:
        ValueError: a mask that is not [B, past + T], packed `position_ids` together with a cache, or `active` outside a step.
    """
    past = 0 if cache is None else cache.get_seq_length()
    indices = cu_seqlens = lengths = None
    if active is not None:
        _check_active(active, batch, tokens, attention_mask, cache)
        cache.aligned = False  # which rows go on is known on the device alone
    elif attention_mask is not None:
        real = _real_tokens(attention_mask, batch, tokens, past).to(device)
        if cache is not None and tokens == 1:
            active = real[:, 0]
            cache.aligned = False  # the mask may hold a row back, and to look would be a host synchronisation
        else:
            counts = real.sum(1)
            lengths = tuple(counts.tolist())  # one host read a prompt or training step: the packed form's size depends on it
            if any(n != tokens for n in lengths):
                indices, cu_seqlens = real.flatten().nonzero()[:, 0], _offsets(counts)
    elif position_ids is not None and tokens > 1:
        starts = _sequence_starts(position_ids.to(device), batch)
        if starts is not None:
            if cache is not None:
                fail("position_ids", "must rise by 1 with a cache", "packed sequences", "Pass use_cache=False, or one sequence a row")
            cu_seqlens = starts
    if cache is not None:
        if tokens > 1 and indices is None and not cache.aligned:
            cache.align()
        if tokens > 1 and indices is None and not cache.aligned and batch > 1:
            lengths = (tokens,) * batch
            cu_seqlens = torch.arange(batch + 1, device=device) * tokens
        elif indices is not None:
            cache.aligned = False
    layout = Layout(
        config=runtime.config,
        windows=tuple(runtime.window(i) for i in range(len(runtime.own_windows))),
        memory=runtime.memory,
        cache=cache,
        past=past,
        batch=batch,
        tokens=tokens,
        indices=indices,
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        active=active,
    )
    config = runtime.config
    if config.sinks == 0 or config.sink_positions == "absolute":
        return layout
    if active is None and past + tokens <= runtime.trained_length:  # with `active` the step may be replayed at any position
        return layout
    return replace(layout, rotation=_clamping_rotation(layout, inv_freq, runtime.trained_length))


def own_positions(layout: Layout, attention_mask: Tensor | None) -> Tensor:
    """int64 [B, T]: each token's index in its own sequence, where sequences stand at different ones."""
    before = layout.cache.positions[:, None]
    if attention_mask is None:
        return before + torch.arange(layout.tokens, device=before.device)
    real = _real_tokens(attention_mask, layout.batch, layout.tokens, layout.past).to(before.device)
    return (before + real.cumsum(1) - 1).clamp(min=0)


def _check_active(active: Tensor, batch: int, tokens: int, mask: Tensor | None, cache: AllMemCache | None) -> None:
    if cache is None or tokens != 1 or mask is not None:
        fail("allmem_active", "needs a cache, one token a row and no `attention_mask`", f"{tokens} tokens")
    check_shape("allmem_active", active, "B", {"B": batch})
    check_dtype("allmem_active", active, torch.bool)


def _real_tokens(mask: Tensor, batch: int, tokens: int, past: int) -> Tensor:
    """bool [B, T] of this call's tokens, from a mask over all tokens."""
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] != past + tokens:
        fail("attention_mask", f"must have shape [{batch}, {past + tokens}] (1 for a token, 0 for padding)", list(mask.shape))
    return mask[:, past:].bool()


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _sequence_starts(position_ids: Tensor, batch: int) -> Tensor | None:
    """Offsets of packed sequences over [B*T], where the positions of a row do not rise by one; None where they do."""
    first = torch.ones_like(position_ids, dtype=torch.bool)
    first[:, 1:] = position_ids.diff(dim=1) != 1
    if not first[:, 1:].any():  # one host read where a caller gives positions for a prompt or a training step
        return None
    starts = first.expand(batch, -1).flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_full((1,), batch * position_ids.shape[1])])


def _clamping_rotation(layout: Layout, inv_freq: Tensor, trained_length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles (min(i, P-1) - i) * inv_freq, i a token's index in its own sequence.

    The angles are formed in float64: at a million tokens float32 has lost two digits behind the point.
    """
    device = inv_freq.device
    if layout.cu_seqlens is None:
        index = torch.arange(layout.tokens, device=device)[None]
        if layout.cache is not None:
            index = index + layout.cache.positions[:, None]
    else:
        token = torch.arange(layout.batch * layout.tokens if layout.indices is None else layout.indices.shape[0], device=device)
        sequence = torch.searchsorted(layout.cu_seqlens[1:], token, right=True)
        index = (token - layout.cu_seqlens[sequence])[None]
        if layout.cache is not None:
            index = index + layout.cache.positions[sequence]
    angles = (index.clamp(max=trained_length - 1) - index)[..., None].double() * inv_freq.double()
    dtype = accumulator_dtype(inv_freq.dtype)
    return angles.cos().to(dtype), angles.sin().to(dtype)
