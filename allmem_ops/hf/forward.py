"""The forward of an attention module in a converted model: transformers' own, with norms and RoPE of q and k by `rotary`.

transformers has no hook between an attention's projections and its RoPE, which takes about a third of a converted SmolLM2's forward in
PyTorch's kernels. So the module's `forward` is replaced, on the instance. In half precision `rotary` computes with the model's rounded
cosines and sines what the model does, bit for bit (but for Qwen3's norms, whose float32 sums run in another order).
"""

import torch
from torch import Tensor, nn

from allmem_ops.hf.attention import attend
from allmem_ops.hf.layout import Layout
from allmem_ops.ops.rotary.api import rotary


def attention_forward(
    attention: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: object | None = None,
    *,
    allmem: Layout | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """[B, T, hidden] -> ([B, T, hidden], None); what does not fit `rotary` goes the class's own way."""
    if allmem is None or not _fits(attention, hidden_states, position_embeddings):
        own = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, "past_key_values": past_key_values}
        own |= {} if allmem is None else {"allmem": allmem}
        return type(attention).forward(attention, hidden_states, **own, **kwargs)
    q, k, v = (project(hidden_states).unflatten(-1, (-1, attention.head_dim)) for project in _projections(attention))
    cos, sin = (table[..., : attention.head_dim // 2] for table in position_embeddings)
    q, k = (
        rotary(x, cos, sin, heads=x.shape[2], heads_kv=0, impl=allmem.config.impl, **_norm(attention, name)).q
        for x, name in ((q, "q_norm"), (k, "k_norm"))
    )
    if past_key_values is not None:
        past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), attention.layer_idx)
    o = attend(attention, q, k, v, attention.scaling, allmem)
    return attention.o_proj(o.flatten(2)), None


def _projections(attention: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _norm(attention: nn.Module, name: str) -> dict[str, object]:
    norm = getattr(attention, name, None)
    return {} if norm is None else {"q_norm": norm.weight, "eps": norm.variance_epsilon}


def _fits(attention: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> bool:
    """Whether everything has one dtype and the tables turn whole heads."""
    if position_embeddings is None or torch.is_autocast_enabled(hidden_states.device.type):
        return False
    cos, _ = position_embeddings
    norms = [norm.weight for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None]
    weights = [x.weight for x in _projections(attention) if isinstance(x, nn.Linear)]
    return (
        cos.dim() == 3
        and cos.shape[-1] == attention.head_dim
        and len(weights) == 3
        and all(x.dtype == hidden_states.dtype for x in (cos, *norms, *weights))
    )
