"""`python -m allmem_ops.train.answer`: prompts in, a training file out, errors of one sentence."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from allmem_ops.hf import save_memory
from allmem_ops.train.answer import main, read_prompts
from allmem_ops.training import TokenRows
from tests.training.tiny import VOCAB, llama, make_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answer")
    llama().save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w5").save_pretrained(folder / "model")
    save_memory(make_model(), folder / "memory")
    (folder / "prompts.jsonl").write_text(json.dumps("w7 w8 w9") + "\n\n" + json.dumps({"prompt": "w3 w4"}) + "\n")
    return folder


def arguments(place, **changes):
    options = {"model": place / "model", "memory": place / "memory", "prompts": place / "prompts.jsonl", "output": place / "answers.npz"}
    options |= {"max-new-tokens": 5, "dtype": "float32", "device": "cpu"} | changes
    return [str(x) for name, value in options.items() for x in (f"--{name}", value)]


def test_answers_are_a_training_file(place, capsys):
    assert main(arguments(place)) == 0
    rows = TokenRows.load(place / "answers.npz")
    assert len(rows) == 2 and rows.ids[0, :3].tolist() == [7, 8, 9] and rows.ids[1, :2].tolist() == [3, 4]
    assert rows.mask[0].nonzero()[0][0] == 2 and rows.mask[1].nonzero()[0][0] == 1
    assert "2 answers" in capsys.readouterr().out


def test_errors_are_one_sentence(place, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('"fine"\nnot json\n')
    (tmp_path / "number.jsonl").write_text("3\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    for changes, message in (
        ({"prompts": tmp_path / "none.jsonl"}, "none.jsonl is not there"),
        ({"prompts": tmp_path / "bad.jsonl"}, "line 2: not JSON"),
        ({"prompts": tmp_path / "number.jsonl"}, "line 1: a line is a string"),
        ({"prompts": tmp_path / "empty.jsonl"}, "holds no prompt"),
        ({"output": "answers.txt"}, "--output must end in .npz"),
        ({"memory": tmp_path}, "`directory` must hold memory.safetensors"),
    ):
        assert main(arguments(place, **changes)) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("allmem_ops.train.answer: ") and message in said
    assert read_prompts(place / "prompts.jsonl") == ["w7 w8 w9", "w3 w4"]
