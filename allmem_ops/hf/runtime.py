"""What a converted model carries beside its modules: the config in force, and how to find its parts."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from allmem_ops._validation import fail
from allmem_ops.hf.families import FAMILIES, Family
from allmem_ops.layers.config import AllMemConfig

ATTRIBUTE = "allmem"  # where the decoder keeps it


@dataclass
class Runtime:
    """The state of one converted instance.

    Args:
        config: the AllMemConfig in force; `reconfigure` replaces it.
        model_type: key into `FAMILIES`.
        own_windows: each layer's own sliding window, or None.
        trained_length: P, the longest sequence that the model was trained for (max_position_embeddings).
        base_implementation: the attention implementation before conversion, for `full_attention`.
        enabled: False inside `full_attention`.
        memory: False drops the memory branches: window + sinks alone.
    """

    config: AllMemConfig
    model_type: str
    own_windows: list[int | None]
    trained_length: int
    base_implementation: str | None
    enabled: bool = True
    memory: bool = True

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def window(self, layer: int) -> int:
        """The smaller of the configured window and the layer's own."""
        own = self.own_windows[layer]
        return self.config.window if own is None else min(self.config.window, own)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return getattr(model, self.family.decoder)

    def attentions(self, model: PreTrainedModel) -> list[nn.Module]:
        """The attention modules, layer by layer."""
        layers = getattr(self.decoder(model), self.family.layers)
        return [getattr(layer, self.family.attention) for layer in layers]

    def inv_freq(self, decoder: nn.Module) -> torch.Tensor:
        """RoPE's frequencies, [head_dim/2]."""
        return getattr(decoder, self.family.rotary).inv_freq


def runtime_of(model: PreTrainedModel) -> Runtime:
    """The runtime of a converted model.

    Raises:
        ValueError: the model is not converted.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", None))
    decoder = None if family is None else getattr(model, family.decoder, None)
    runtime = getattr(decoder, ATTRIBUTE, None)
    if runtime is None:
        fail("model", "must be a converted model (allmem_ops.hf.convert)", type(model).__name__)
    return runtime
