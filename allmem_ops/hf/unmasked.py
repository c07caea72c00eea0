"""Whole rows without padding: no mask is built, and so the device is not asked whether one is needed."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from allmem_ops.hf.attention import NAME, swa_attention
from allmem_ops.hf.runtime import runtime_of

# Attention functions under names for which no mask function is registered: transformers then builds none.
_SWA, _SDPA = "allmem_swa_unmasked", "allmem_sdpa_unmasked"
_TWINS = {NAME: _SWA, "sdpa": _SDPA}


@contextmanager
def unmasked(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside, calls of a converted model read rows without padding, packing or cache, with the same result and no mask.

    To know that a row is one sequence, transformers compares its positions on the device and waits for the answer: the host, which
    could be a whole forward pass ahead, then launches the next one kernel by kernel while the device waits. A teacher with
    sliding windows of its own, or another attention than SDPA, keeps its mask.

    Args:
        model: a converted model, inside `full_attention` or not.
    """
    AttentionInterface.register(_SWA, swa_attention)
    AttentionInterface.register(_SDPA, sdpa_attention_forward)
    before = model.config._attn_implementation
    needs_mask = before != NAME and any(window is not None for window in runtime_of(model).own_windows)
    model.config._attn_implementation = before if needs_mask else _TWINS.get(before, before)
    try:
        yield model
    finally:
        model.config._attn_implementation = before
