"""The converted model and the tokenizer that most tests here use."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from allmem_ops.hf import convert
from tests.hf.tiny import VOCAB, awaken, tiny_config, tiny_model


class Bytes:
    """A tokenizer of one token a byte, folded into the tiny models' vocabulary."""

    eos_token_id = 0

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [2 + b % (VOCAB - 2) for b in text.encode()]})

    def convert_tokens_to_ids(self, token):
        return None


def letters_tokenizer():
    """A tokenizer of transformers' own, one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_live():
    """A converted Llama whose memory speaks."""
    return awaken(convert(tiny_model(max_position_embeddings=128), tiny_config()))


@pytest.fixture
def live():
    return make_live()


@pytest.fixture
def tokenizer():
    return Bytes()
