"""`centre_memory`: what all hidden states of a layer have in common drops out of the memory's q, k and v."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allmem_ops._validation import check_shape
from allmem_ops.hf.convert import full_attention
from allmem_ops.hf.runtime import runtime_of


@torch.no_grad()
def centre_memory(model: Any, ids: Tensor) -> Any:
    """Take the direction that a layer's hidden states share out of the memory's q, k and v projections, in place.

    The hidden states of a language model are alike (cosine of two tokens .3 to .6 in SmolLM2, of two keys .7 to .9), so that keys and
    values are nearly parallel, and what is written is mostly one constant. Each row w of the projections becomes w - (w . m) m, m the
    mean of what the layer's attention receives, of length 1. The rows train freely afterwards. For a memory that has not been trained.

    Args:
        model: a converted model.
        ids: [B, T] int64 tokens of any text of the kind that the model reads, a thousand of them or more; read with full attention.

    Returns:
        The same `model`.

    Raises:
        ValueError: `model` is not converted.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from allmem_ops import AllMemConfig
        >>> from allmem_ops.hf import convert
        >>> model = convert(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...     num_attention_heads=4, num_key_value_heads=2)), AllMemConfig(window=4, sinks=0, head_dim=16))
        >>> _ = centre_memory(model, torch.arange(64)[None])
    """
    check_shape("ids", ids, "B T", {})
    means: dict[int, Tensor] = {}

    def keep(_module: nn.Module, args: tuple, kwargs: dict[str, Any], *, index: int) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        means[index] = x.float().mean((0, 1))

    attentions = runtime_of(model).attentions(model)
    hooks = [a.register_forward_pre_hook(partial(keep, index=i), with_kwargs=True) for i, a in enumerate(attentions)]
    training = model.training
    try:
        with full_attention(model):
            model.eval().base_model(input_ids=ids, use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for index, a in enumerate(attentions):
        if hasattr(a, "memory"):
            direction = nn.functional.normalize(means[index], dim=0)
            rows = a.memory.in_proj.weight[: a.memory.splits[0]]
            rows.sub_(torch.outer(rows.float() @ direction, direction).to(rows.dtype))
    return model
