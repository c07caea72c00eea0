"""The converted model and the tokenizer that most tests here use."""

import pytest

from allmem_ops.hf import convert
from tests.hf.tiny import VOCAB, awaken, tiny_config, tiny_model


class Bytes:
    """A tokenizer of one token a byte, folded into the tiny models' vocabulary."""

    eos_token_id = 0

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [2 + b % (VOCAB - 2) for b in text.encode()]})

    def convert_tokens_to_ids(self, token):
        return None


def make_live():
    """A converted Llama whose memory speaks."""
    return awaken(convert(tiny_model(max_position_embeddings=128), tiny_config()))


@pytest.fixture
def live():
    return make_live()


@pytest.fixture
def tokenizer():
    return Bytes()
