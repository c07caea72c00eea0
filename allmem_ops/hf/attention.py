"""What runs inside a converted model: the attention function, the mask function and the hooks around them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.generation import GenerationMode

from allmem_ops._validation import fail
from allmem_ops.hf.cache import AllMemCache
from allmem_ops.hf.layout import Layout, make_layout, own_positions
from allmem_ops.hf.runtime import ATTRIBUTE, Runtime
from allmem_ops.ops.precision import accumulator_dtype
from allmem_ops.ops.rotary.api import rotary
from allmem_ops.ops.swa.api import swa, swa_step
from allmem_ops.ops.swa.cache import WindowCache

NAME = "allmem_swa"
# positional order of the decoder's forward, the same in every family of the table
_DECODER_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


def register() -> None:
    """Make `NAME` known to transformers. The mask function must stand beside the attention function: without one
    transformers passes no mask at all."""
    AttentionInterface.register(NAME, swa_attention)
    AttentionMaskInterface.register(NAME, padding_mask)


def padding_mask(*args: object, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor | None:
    """The caller's 2D padding mask as it is: window and causality are `swa`'s own."""
    return attention_mask


def prepare_decoder(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before the decoder stack: supply the cache, check the caller's, and work out the layout for all layers."""
    runtime: Runtime = getattr(decoder, ATTRIBUTE)
    if not runtime.enabled:
        return None
    kwargs = {**dict(zip(_DECODER_ARGUMENTS, args, strict=False)), **kwargs}
    active, ended = kwargs.pop("allmem_active", None), kwargs.pop("allmem_ended", None)
    if kwargs.get("output_attentions") or decoder.config.output_attentions:
        fail("output_attentions", "must be False: sliding-window attention never forms the weights", True)
    source = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
    if source is None:
        return None  # the decoder has its own error for a call without input
    batch, tokens = source.shape[:2]
    layers = getattr(decoder, runtime.family.layers)
    inv_freq = runtime.inv_freq(decoder)
    cache = kwargs.get("past_key_values")
    position_ids = kwargs.get("position_ids")
    if cache is not None:
        if not isinstance(cache, AllMemCache):
            fail(
                "past_key_values",
                "must be an AllMemCache: a converted model keeps a window, sinks and a memory, not every key",
                type(cache).__name__,
                "Leave it out, or make one with allmem_ops.hf.AllMemCache(model, batch_size)",
            )
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            fail("past_key_values", "must be None with gradient checkpointing: a layer that runs twice would write twice", "a cache")
        cache.check_fits(runtime.config, len(layers), batch)
    layout = make_layout(runtime, inv_freq, batch, tokens, source.device, kwargs.get("attention_mask"), position_ids, cache, active)
    if cache is None and _wants_cache(decoder, kwargs, layout):
        cache = AllMemCache(_DecoderAsModel(decoder, runtime), batch)
        kwargs["past_key_values"] = cache
        layout = make_layout(runtime, inv_freq, batch, tokens, source.device, kwargs.get("attention_mask"), position_ids, cache)
    if ended is not None:
        layout = ended.leave_out(layout, kwargs.get("input_ids"))
    if position_ids is None and cache is not None and not cache.aligned:
        kwargs["position_ids"] = own_positions(layout, kwargs.get("attention_mask"))
    kwargs["use_cache"] = cache is not None
    kwargs["allmem"] = layout
    return (), kwargs


def _wants_cache(decoder: nn.Module, kwargs: dict[str, Any], layout: Layout) -> bool:
    """Whether to supply a cache: asked for, or left to the model's config where nothing speaks against it."""
    asked = kwargs.get("use_cache")
    packed = layout.cu_seqlens is not None and kwargs.get("attention_mask") is None
    if asked and packed:
        fail("use_cache", "must be False with packed `position_ids`", True)
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        if asked:
            fail("use_cache", "must be False with gradient checkpointing: a layer that runs twice would write twice", True)
        return False
    if asked is None:
        # a training step reads no cache, so none is filled for it
        return bool(decoder.config.use_cache) and not packed and not torch.is_grad_enabled()
    return bool(asked)


class _DecoderAsModel:
    """Lets `AllMemCache` find the layers from inside the decoder's own call."""

    def __init__(self, decoder: nn.Module, runtime: Runtime) -> None:
        self.config = decoder.config
        setattr(self, runtime.family.decoder, decoder)


def swa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    allmem: Layout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, heads, T, D] in, [B, T, HQ, D] out."""
    if allmem is None:
        raise ValueError(f"attention implementation {NAME!r} works only in a model converted by allmem_ops.hf.convert")
    if dropout:
        fail("attention_dropout", "must be 0: `swa` has no dropout", dropout)
    return attend(module, *(x.transpose(1, 2) for x in (query, key, value)), scaling, allmem), None


def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, allmem: Layout) -> Tensor:
    """q [B, T, HQ, D], k and v [B, T, HK, D], turned to their positions -> [B, T, HQ, D]."""
    options = {"scale": scaling, "impl": allmem.config.impl}
    layer = None if allmem.cache is None else allmem.cache.layers[module.layer_idx]
    if layer is not None and allmem.tokens == 1:
        q_sinks = _rotate(q, allmem)
        return swa_step(q, k, v, layer.window, q_sinks=q_sinks, active=allmem.active, **options)
    options |= {"window": allmem.windows[module.layer_idx], "sinks": allmem.config.sinks}
    q, k, v = allmem.pack(q), allmem.pack(k), allmem.pack(v)
    q_sinks = _rotate(q, allmem)
    if layer is None:
        o = swa(q, k, v, q_sinks=q_sinks, cu_seqlens=allmem.cu_seqlens, **options)
    elif allmem.cu_seqlens is None:
        position = allmem.past if allmem.cache.aligned else None
        o = _attend_segment(q, k, v, q_sinks, layer.window, allmem.past, options, position)
    else:
        o = _attend_ragged(q, k, v, q_sinks, layer.window, allmem, options)
    return allmem.unpack(o)


def _attend_segment(
    q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, window: WindowCache, past: int, options: dict[str, Any],
    position: int | None = None,
) -> Tensor:  # fmt: skip
    """A segment after what the window holds; every row at the same position, which is read on the host where it is not given."""
    all_k, all_v = window.keys_values(position, then=(k, v)) if past else (k, v)
    o = swa(q, all_k, all_v, q_sinks=q_sinks, **options)
    window.append(k.detach(), v.detach())
    return o


def _attend_ragged(
    q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, window: WindowCache, layout: Layout, options: dict[str, Any]
) -> Tensor:
    """Rows of different lengths or positions (left padding): one after the other, prompts only."""
    parts, start = [], 0
    for row, length in enumerate(layout.lengths):
        if length == 0:
            continue
        part = slice(start, start + length)
        start += length
        one = window.index_select([row])
        sinks_part = None if q_sinks is None else q_sinks[:, part]
        parts.append(_attend_segment(q[:, part], k[:, part], v[:, part], sinks_part, one, layout.past, options))
        window.copy_([row], one, [0])
    return torch.cat(parts, 1) if parts else torch.zeros_like(q)


def _rotate(q: Tensor, layout: Layout) -> Tensor | None:
    """The queries turned to their clamped positions, in RoPE's half-and-half layout."""
    if layout.rotation is None:
        return None
    table = (t.to(accumulator_dtype(q.dtype)) for t in layout.rotation)
    return rotary(q, *table, heads=q.shape[2], heads_kv=0, impl=layout.config.impl).q


def add_memory(attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> tuple | None:
    """After an attention module: add alpha * memory to its output."""
    layout: Layout | None = kwargs.get("allmem")
    if layout is None or not layout.memory:
        return None
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    state = None if layout.cache is None else layout.cache.layers[attention.layer_idx].memory
    if layout.indices is not None and layout.indices.shape[0] == 0:
        return None
    options = {"state": state, "cu_seqlens": layout.cu_seqlens, "active": layout.active}
    y = attention.memory(layout.pack(x), layout.pack(output[0]), **options, overwrite_attn=True)
    return (layout.unpack(y), *output[1:])


def prepare_cache_for_generation(
    generation_config: Any, model_kwargs: dict[str, Any], generation_mode: GenerationMode, *args: object
) -> None:
    """In the place of `generate`'s own: the decoder supplies the cache at its first call.

    Raises:
        ValueError: a cache implementation, a foreign cache or assisted decoding was asked for.
    """
    if generation_config.cache_implementation is not None:
        fail(
            "cache_implementation",
            "must be None: a converted model has one cache, of constant size",
            repr(generation_config.cache_implementation),
        )
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        raise ValueError("assisted decoding needs to take tokens back, and a memory can't: generate without an assistant or prompt lookup")
    cache = model_kwargs.get("past_key_values")
    if cache is not None:
        if not isinstance(cache, AllMemCache):
            fail("past_key_values", "must be an AllMemCache", type(cache).__name__)
        cache._is_user_defined = True  # generate looks for it, and then slices the prompt by what the cache has seen
    # generate has made both of them for the whole prompt, and may then have dropped a mask that masks nothing.
    whole = [model_kwargs[name] for name in ("attention_mask", "position_ids") if model_kwargs.get(name) is not None]
    ends = generation_config.eos_token_id
    if generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and whole and ends is not None:
        ends = [ends] if isinstance(ends, int) else list(ends)
        model_kwargs["allmem_ended"] = EndedRows(whole[0].shape[1], torch.tensor(ends, device=whole[0].device))


@dataclass
class EndedRows:
    """The sequences of one `generate` call that have met an end token: from there on generate feeds padding, which no row shall take in.

    The end token itself stays out too, as it does where generate stops with it.

    Args:
        prompt: tokens of the prompt, padding included.
        ends: int64 [.], the end tokens.
        rows: bool [B], or None before the first generated token.
    """

    prompt: int
    ends: Tensor
    rows: Tensor | None = None

    def leave_out(self, layout: Layout, ids: Tensor | None) -> Layout:
        """`layout` without the ended rows, where `ids` is a generated token a row."""
        if layout.cache is None or layout.batch == 1 or layout.tokens != 1 or layout.past < self.prompt or ids is None:
            return layout
        ended = (ids == self.ends).any(-1)
        self.rows = ended if self.rows is None else self.rows | ended
        going, layout.cache.aligned = ~self.rows, False
        return replace(layout, active=going if layout.active is None else layout.active & going)


def install(model: PreTrainedModel, runtime: Runtime) -> None:
    """Put the hooks in place: on this instance alone, and picklable (no closures)."""
    decoder = runtime.decoder(model)
    setattr(decoder, ATTRIBUTE, runtime)
    decoder.register_forward_pre_hook(prepare_decoder, with_kwargs=True)
    for attention in runtime.attentions(model):
        if hasattr(attention, "memory"):
            attention.register_forward_hook(add_memory, with_kwargs=True)
    model._prepare_cache_for_generation = prepare_cache_for_generation
