"""The converted model and the tokenizer that most tests here use."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from allmem_ops.evaluate import texts as texts_file
from allmem_ops.evaluation.linear import use_linear_memory
from allmem_ops.evaluation.run import Texts
from allmem_ops.hf import convert, save_memory
from tests.hf.tiny import VOCAB, awaken, tiny_config, tiny_model, tokens

MODEL = {"vocab_size": 257, "max_position_embeddings": 128}


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


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A model with its tokenizer, memories of two seeds, an adapter, a linear memory and a file of texts."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny_model(**MODEL).save_pretrained(root / "model")
    letters_tokenizer().save_pretrained(root / "model")
    for name, scale in (("run-seed0", 1.0), ("run-seed1", 0.5), ("adapter", 0.7)):
        model = awaken(convert(tiny_model(**MODEL), tiny_config(window=20)))
        for layer in model.model.layers:
            layer.self_attn.memory.alpha.data *= scale
        save_memory(model, root / name / "memory")
    save_memory(awaken(use_linear_memory(convert(tiny_model(**MODEL), tiny_config()))), root / "linear")
    texts = Texts({"a text": tokens(2, 60)}, tokens(1, 200, 1), tokens(3, 10, 2), "some text\n" * 100)
    texts_file.save(texts, root / "texts.npz")
    return root
