"""The model families that `convert` knows: where each keeps the parts that a token mixer needs.

To add a family: add one line to `FAMILIES` under its config's `model_type`. Its attention module must apply RoPE, call
`past_key_values.update(k, v, layer_idx)` and then transformers' `AttentionInterface`, and must pass `**kwargs` through
from the model's forward; `tests/hf` runs its whole suite over every family of the table.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from allmem_ops._validation import fail


def _no_window(attention: nn.Module, config: PreTrainedConfig) -> int | None:
    return None


def _window_of_layer(attention: nn.Module, config: PreTrainedConfig) -> int | None:
    return attention.sliding_window


def _window_of_model(attention: nn.Module, config: PreTrainedConfig) -> int | None:
    return config.sliding_window


@dataclass(frozen=True)
class Family:
    """Attribute names inside one family's models.

    Args:
        sliding_window: the model's own window of a layer, or None; (attention module, config) -> int | None.
        decoder: the causal LM's attribute that holds the decoder stack.
        layers, attention, rotary: the decoder's layer list, a layer's attention module, the decoder's RoPE module.
    """

    sliding_window: Callable[[nn.Module, PreTrainedConfig], int | None] = _no_window
    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    rotary: str = "rotary_emb"


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(sliding_window=_window_of_model),
    "qwen2": Family(sliding_window=_window_of_layer),
    "qwen3": Family(sliding_window=_window_of_layer),
}


def family_of(model: PreTrainedModel) -> Family:
    """The family of a loaded causal LM.

    Raises:
        ValueError: not a transformers causal LM, or a family that is not in the table.
    """
    if not isinstance(model, PreTrainedModel):
        fail("model", "must be a transformers causal LM (a PreTrainedModel)", type(model).__name__)
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        fail(
            "model",
            f"must be of a supported family: {', '.join(sorted(FAMILIES))}",
            repr(model.config.model_type),
            "To add one, add a line to FAMILIES in allmem_ops/hf/families.py; its docstring says what a family must do",
        )
    if model.get_output_embeddings() is None or not hasattr(model, family.decoder):
        fail("model", "must have a language-model head (AutoModelForCausalLM)", type(model).__name__)
    return family
