"""`convert`: a loaded Hugging Face causal LM becomes an AllMem model, in place and for this instance only."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from allmem_ops._validation import check_choice, check_float, fail
from allmem_ops.hf import attention
from allmem_ops.hf.families import family_of
from allmem_ops.hf.forward import attention_forward
from allmem_ops.hf.runtime import ATTRIBUTE, Runtime, runtime_of
from allmem_ops.layers.config import AllMemConfig
from allmem_ops.layers.memory import MemoryBranch
from allmem_ops.layers.start import rotate_rows

# RoPE variants whose frequencies depend on the length seen: a query can't be turned back to a fixed position
_MOVING_ROPE = ("dynamic", "longrope")


# How many windows back the key stands for which a memory's first queries are turned: 1 to 8 do equally well (docs/results.md)
FAR = 4


def convert(model: PreTrainedModel, config: AllMemConfig) -> PreTrainedModel:
    """Turn a loaded causal LM into an AllMem model: windowed attention with sinks, plus a memory beside every attention.

        attention(x)  becomes  swa(x) + alpha * Memory(x)

    Attention keeps its weights, its RoPE and its parameter names; the memory of a layer is the new submodule
    `self_attn.memory`. Everything but the memory is frozen. alpha starts at zero: until it is trained, the model is
    exactly the original with windowed attention. Without a cache of the caller's, calls make their own where they are
    asked to (`use_cache`) or run without gradients.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal LM from transformers, any dtype; changed in place.
        config: the shape and rules; `heads=None` takes the model's number of key/value heads. A model's own sliding
            window gives the smaller of both.

    Returns:
        The same `model`.

    Raises:
        ValueError: an unknown family, attention dropout, a RoPE whose frequencies move with the length together with
            clamped sinks, layer indices that do not exist, or a model that is converted already.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                                      num_attention_heads=4, num_key_value_heads=2))
        >>> model = convert(model, AllMemConfig(window=16, sinks=2, chunk_size=8, head_dim=16))
        >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)[0]
        'model.layers.0.self_attn.memory.alpha'
    """
    if not isinstance(config, AllMemConfig):
        fail("config", "must be an AllMemConfig", type(config).__name__)
    family = family_of(model)
    decoder = getattr(model, family.decoder)
    if hasattr(decoder, ATTRIBUTE):
        fail("model", "must not be converted yet", "a converted model", "`reconfigure` changes window, sinks and chunk size")
    hf_config = model.config
    if getattr(hf_config, "attention_dropout", 0):
        fail("model", "must have attention_dropout 0: `swa` has no dropout", hf_config.attention_dropout)
    layers = getattr(decoder, family.layers)
    attentions = [getattr(layer, family.attention) for layer in layers]
    chosen = range(len(layers)) if config.memory_layers is None else config.memory_layers
    if any(index >= len(layers) for index in chosen):
        fail("config.memory_layers", f"must lie in [0, {len(layers)})", list(chosen))
    rope_type = (getattr(hf_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.sinks and config.sink_positions == "clamped" and rope_type in _MOVING_ROPE:
        fail(
            "config.sink_positions",
            f"must be 'absolute' with RoPE of type {rope_type!r}, whose frequencies depend on the length",
            "'clamped'",
        )

    _own_config(model)
    runtime = Runtime(
        config=config,
        model_type=hf_config.model_type,
        own_windows=[family.sliding_window(module, hf_config) for module in attentions],
        trained_length=hf_config.max_position_embeddings,
        base_implementation=hf_config._attn_implementation,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for index in chosen:
        module = attentions[index]
        branch = MemoryBranch(hf_config.hidden_size, config, heads=hf_config.num_key_value_heads, device=module.q_proj.weight.device)
        branch.start_from(pretrained_weights(module, runtime.inv_freq(decoder), FAR * config.window), head_dim=module.head_dim)
        module.memory = branch.train(model.training)
    attention.register()
    attention.install(model, runtime)
    for module in attentions:
        module.forward = functools.partial(attention_forward, module)
    model.config._attn_implementation = attention.NAME
    return model


def pretrained_weights(attention: nn.Module, inv_freq: Tensor, distance: int) -> list[Tensor]:
    """What a memory may start from: the projections q, k, v and out of an attention, q turned as for a key `distance` tokens back."""
    q, k, v, o = (getattr(attention, f"{name}_proj").weight.detach() for name in "qkvo")
    return [rotate_rows(q.float(), inv_freq, distance), k, v, o]


def _own_config(model: PreTrainedModel) -> None:
    """Give the instance a config of its own: another model may share the object it was built from."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def memory_branches(model: PreTrainedModel) -> list[MemoryBranch]:
    """The memories of a converted model, by layer; a layer without one is left out."""
    return [module.memory for module in runtime_of(model).attentions(model) if hasattr(module, "memory")]


def reconfigure(
    model: PreTrainedModel,
    *,
    window: int | None = None,
    sinks: int | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> AllMemConfig:
    """Change window, sinks, chunk size or implementation of a converted model: training draws the first three anew at every step.

    Args:
        model: a converted model.
        window, sinks, chunk_size, impl: the new values; None leaves one as it is. A cache made before is refused afterwards.

    Returns:
        The config now in force.

    Raises:
        ValueError: `model` is not converted, or a value out of range.
    """
    runtime = runtime_of(model)
    changes = {"window": window, "sinks": sinks, "chunk_size": chunk_size, "impl": impl}
    runtime.config = runtime.config.replace(**{name: value for name, value in changes.items() if value is not None})
    for branch in memory_branches(model):
        branch.config = runtime.config
    return runtime.config


@contextmanager
def full_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside, the converted model is the original again (the teacher), on the same weights.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...                                      num_attention_heads=4, num_key_value_heads=2)).eval()
        >>> import torch
        >>> ids = torch.arange(20)[None]
        >>> before = model(ids).logits
        >>> _ = convert(model, AllMemConfig(window=4, sinks=0, head_dim=16))
        >>> with full_attention(model):
        ...     torch.equal(model(ids).logits, before)
        True
    """
    runtime = runtime_of(model)
    saved = runtime.enabled, model.config._attn_implementation, model.__dict__.pop("_prepare_cache_for_generation", None)
    runtime.enabled = False
    model.config._attn_implementation = runtime.base_implementation
    try:
        yield model
    finally:
        runtime.enabled, model.config._attn_implementation = saved[:2]
        if saved[2] is not None:
            model._prepare_cache_for_generation = saved[2]


@contextmanager
def memory_mode(model: PreTrainedModel, mode: str) -> Iterator[PreTrainedModel]:
    """Inside, the memory runs in one of three ways, to tell what it contributes.

    Args:
        model: a converted model.
        mode: "on"; "no_writes" (eta = 0: an adapter that never learns from the text); "off" (window + sinks alone).

    Raises:
        ValueError: `model` is not converted, or another `mode`.
    """
    check_choice("mode", mode, ("on", "no_writes", "off"))
    runtime, branches = runtime_of(model), memory_branches(model)
    saved = runtime.memory, [branch.writes for branch in branches]
    runtime.memory = mode != "off"
    for branch in branches:
        branch.writes = mode != "no_writes"
    try:
        yield model
    finally:
        runtime.memory = saved[0]
        for branch, writes in zip(branches, saved[1], strict=True):
            branch.writes = writes


def trainable_parameters(model: PreTrainedModel, *, lr: float = 1e-4) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the memory's parameters alone, alpha at `config.alpha_lr_scale` times `lr`.

    Args:
        model: a converted model.
        lr: learning rate of everything but alpha. [P: 1e-4]

    Returns:
        Two groups, each with `params`, `lr` and `name` ("memory", "alpha").

    Raises:
        ValueError: `model` is not converted, or `lr` is not positive.
    """
    check_float("lr", lr, above=0.0)
    alphas, others = [], []
    for branch in memory_branches(model):
        for name, parameter in branch.named_parameters():
            (alphas if name == "alpha" else others).append(parameter)
    scale = runtime_of(model).config.alpha_lr_scale
    return [{"name": "memory", "params": others, "lr": lr}, {"name": "alpha", "params": alphas, "lr": lr * scale}]


def memory_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The memory's own parameters by their full names in `model`."""
    own = {id(p) for branch in memory_branches(model) for p in branch.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own}
