"""Loading a causal LM the way the command lines do: a folder, a name on the Hub, or one GGUF file."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from allmem_ops._validation import fail


def load_causal_lm(source: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A causal LM in evaluation mode, on the CPU.

    Args:
        source: a folder of `save_pretrained`, a name on the Hugging Face Hub, or a `.gguf` file, which is dequantised.
        dtype: of its weights.

    Raises:
        ValueError: nothing that can be loaded is there; the message is one sentence.
    """
    folder, options = _place(source)
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)  # through weights left in blocks no gradient would pass
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    except (OSError, ValueError) as error:
        fail("source", "must be a folder, a Hub name or a .gguf file of a causal LM", f"{source}: {_first_line(error)}")


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer beside the model of `load_causal_lm`.

    Raises:
        ValueError: none is there.
    """
    folder, options = _place(source)
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        fail("source", "must have a tokenizer beside the model", f"{source}: {_first_line(error)}")


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Recompute each layer in backward instead of keeping its activations."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _place(source: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    path = Path(source)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return str(source), {}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
