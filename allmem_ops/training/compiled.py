"""The frozen parts of a layer by torch.compile: what transformers runs as a dozen passes over the activations."""

from typing import Any

from torch import nn

from allmem_ops.hf.runtime import runtime_of


def compile_blocks(model: Any, **options: Any) -> Any:
    """Let torch.compile fuse the norms and MLPs of a converted model, in place.

    They know nothing of window, sinks or chunk size, so that these stay free from step to step; and all layers share one compiled
    form, so that it is compiled once. The first step takes as long as that takes.

    Args:
        model: a converted model.
        options: of `torch.nn.Module.compile`.

    Returns:
        The same `model`.
    """
    for block in _blocks(model):
        block.compile(**options)
    return model


def plain_blocks(model: Any) -> Any:
    """Undo `compile_blocks`."""
    for block in _blocks(model):
        block._compiled_call_impl = None
    return model


def _blocks(model: Any) -> list[nn.Module]:
    """The norms of the hidden state and the MLPs: a layer's children that are not its attention, and the decoder's last norm."""
    runtime = runtime_of(model)
    family, decoder = runtime.family, runtime.decoder(model)
    layers = getattr(decoder, family.layers)
    others = [child for layer in layers for name, child in layer.named_children() if name != family.attention]
    return [*others, decoder.norm]
