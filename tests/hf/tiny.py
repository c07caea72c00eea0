"""Tiny random models of every family, big enough that a wrong mask or a lost token changes the logits."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from allmem_ops import AllMemConfig
from allmem_ops.hf import FAMILIES, memory_parameters

VOCAB = 97
FAMILY_NAMES = sorted(FAMILIES)


def tiny_model(family: str = "llama", **overrides):
    """A model of `family` with 3 layers, 6/3 heads of 16 and weights of unit gain."""
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if family == "llama":
        del options["sliding_window"]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**options, **overrides})).eval()


def tiny_config(**overrides) -> AllMemConfig:
    """Window 12, 3 sinks, chunk 7, memory heads of 8."""
    return AllMemConfig(**{"window": 12, "sinks": 3, "chunk_size": 7, "head_dim": 8, "eta_init": 0.05, **overrides})


def awaken(model):
    """Give every parameter of the memory a random value, alpha included, so that it speaks."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in memory_parameters(model).items():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("alpha"):
                p.copy_(0.5 * noise)
            else:
                p.add_(0.1 * noise)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
