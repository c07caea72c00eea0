"""A tiny converted model and token rows for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allmem_ops import AllMemConfig
from allmem_ops.hf import convert

VOCAB = 48


def llama(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | options))


def make_model(seed=0):
    return convert(llama(seed), AllMemConfig(window=8, sinks=1, chunk_size=8, head_dim=16))


def batches(count, rows=2, length=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (rows, length), generator=generator) for _ in range(count)]
