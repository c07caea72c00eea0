"""`python -m allmem_ops.generate` with a tiny model: what it reads, keeps and writes; and every foreseeable error in one sentence."""

import importlib.util
import io
import sys

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from allmem_ops.demo import smollm2
from allmem_ops.generate.__main__ import main
from allmem_ops.generate.reading import segments, text_blocks
from allmem_ops.hf import AllMemCache, convert, load_cache, save_memory
from allmem_ops.inference import Decoder
from tests.hf.tiny import awaken, tiny_config, tiny_model

TEXT = "".join(f"line {n} says {n * 37 % 101}, é{'!' * (n % 4)}\n" for n in range(40))


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character; what it does not know is token 1."""
    vocab = {"<pad>": 0, "<unk>": 1, "<s>": 2} | {c: i + 3 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz0123456789 ,!\n.?é")}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    if bos:
        model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", bos_token="<s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with its tokenizer, its memory, and a text."""
    folder = tmp_path_factory.mktemp("model")
    base = tiny_model()
    base.save_pretrained(folder / "base")
    tiny_tokenizer(bos=True).save_pretrained(folder / "base")
    save_memory(awaken(convert(base, tiny_config())), folder / "memory")
    (folder / "text").write_text(TEXT, encoding="utf-8")
    return folder


def run(folder, *arguments):
    return main(["--model", str(folder / "base"), "--memory", str(folder / "memory"), "--device", "cpu", "--segment", "64", *arguments])


def expected(folder, text, count):
    """The characters that the library writes after `text`."""
    model = awaken(convert(tiny_model(), tiny_config()))
    tokenizer = tiny_tokenizer(bos=True)
    decoder = Decoder(model)
    decoder.read(torch.tensor([tokenizer(text).input_ids]))
    return tokenizer.decode(decoder.generate(count)[0], skip_special_tokens=True)


def test_reads_a_file_and_goes_on(folder, capsys):
    assert run(folder, "--prompt-file", str(folder / "text"), "--max-new-tokens", "30") == 0
    out, err = capsys.readouterr()
    assert out == expected(folder, TEXT, 30) + "\n"
    assert f"Read {len(TEXT) + 1} tokens" in err and "Wrote 30 tokens" in err
    size = AllMemCache(convert(tiny_model(), tiny_config()), 1).nbytes
    assert f"the cache holds {size} bytes, as it did before the first" in err
    assert "tokens/s, cache" in err  # the progress bar


def test_a_read_file_is_kept_and_asked_twice(folder, capsys, tmp_path):
    state = tmp_path / "read.state"
    assert run(folder, "--prompt-file", str(folder / "text"), "--state-out", str(state), "--max-new-tokens", "0") == 0
    out, err = capsys.readouterr()
    assert out == "" and f"Kept what was read ({len(TEXT) + 1} tokens) in {state}" in err
    for question in ("what does line 3 say?", "and line 9?"):
        assert run(folder, "--state-in", str(state), "--prompt", question, "--max-new-tokens", "12") == 0
        assert capsys.readouterr().out == expected(folder, TEXT + question, 12) + "\n"
    model = awaken(convert(tiny_model(), tiny_config()))
    assert load_cache(model, state).positions.tolist() == [len(TEXT) + 1]


def test_reads_on_from_a_state_and_from_standard_input(folder, capsys, tmp_path, monkeypatch):
    """Two files and a pipe, one after the other, are one text."""
    state, half = tmp_path / "state", len(TEXT) // 2
    (tmp_path / "first").write_text(TEXT[:half], encoding="utf-8")
    quiet = ("--max-new-tokens", "0", "--state-out", str(state))
    assert run(folder, "--prompt-file", str(tmp_path / "first"), *quiet) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT[half:].encode())))
    assert run(folder, "--prompt-file", "-", "--state-in", str(state), *quiet) == 0
    capsys.readouterr()
    assert run(folder, "--state-in", str(state), "--prompt", "so?", "--max-new-tokens", "10") == 0
    assert capsys.readouterr().out == expected(folder, TEXT + "so?", 10) + "\n"


def test_without_a_memory_window_and_sinks_alone(folder, capsys):
    arguments = ["--model", str(folder / "base"), "--device", "cpu", "--window", "12", "--sinks", "3", "--chunk", "7"]
    assert main([*arguments, "--prompt", "hello there", "--max-new-tokens", "5"]) == 0
    model = convert(tiny_model(), tiny_config())
    decoder = Decoder(model)
    decoder.read(torch.tensor([tiny_tokenizer(bos=True)("hello there").input_ids]))
    assert capsys.readouterr().out == tiny_tokenizer().decode(decoder.generate(5)[0], skip_special_tokens=True) + "\n"


def test_draws_are_those_of_the_seed(folder, capsys):
    found = []
    for seed in ("1", "1", "2"):
        sampling = ("--temperature", "1", "--top-k", "20", "--top-p", "0.95", "--seed", seed)
        assert run(folder, "--prompt", "once", "--max-new-tokens", "30", *sampling) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


def test_smollm2_comes_from_the_demos_loader(folder, capsys, monkeypatch):
    """By its name, and as a GGUF file; neither is in reach here, so tiny ones stand in."""
    monkeypatch.setattr(smollm2, "find_weights", lambda: folder / "weights.gguf")
    monkeypatch.setattr(smollm2, "verify", lambda path: path)
    monkeypatch.setattr(smollm2, "load_model", lambda weights, dtype, device: tiny_model().to(device, dtype))
    monkeypatch.setattr(smollm2, "load_tokenizer", lambda weights: tiny_tokenizer())
    for name in ("smollm2", str(folder / "weights.gguf")):
        arguments = ["--model", name, "--memory", str(folder / "memory"), "--device", "cpu", "--prompt", "abc", "--max-new-tokens", "4"]
        assert main(arguments) == 0
        assert len(capsys.readouterr().out) > 0


def problem(capsys, arguments):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("allmem_ops.generate: ")]
    assert out == "" and len(lines) == 1, err
    return lines[0]


def test_errors_are_one_sentence(folder, capsys, tmp_path, monkeypatch):
    base, prompt = ["--model", str(folder / "base"), "--device", "cpu"], ["--prompt", "a"]
    memory = ["--memory", str(folder / "memory")]
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes("Größe\n".encode("latin-1"))
    (tmp_path / "cut").write_bytes(b"not a cache")
    for arguments, message in (
        (base, "there is nothing to read"),
        ([*base, "--state-in", str(tmp_path / "cut")], "--max-new-tokens needs a text to go on from"),
        ([*base, "--prompt-file", str(tmp_path / "none")], "none is no file"),
        ([*base, *prompt, "--state-in", str(tmp_path / "none")], "--state-in"),
        ([*base, *prompt, "--state-out", str(tmp_path / "no" / "file")], "can't be written"),
        ([*base, *prompt, "--memory", str(tmp_path)], "holds no memory.safetensors"),
        ([*base, *prompt, "--segment", "0"], "--segment must be at least 1; got 0"),
        ([*base, *prompt, "--max-new-tokens", "-1"], "--max-new-tokens must be at least 0; got -1"),
        ([*base, *prompt, "--temperature", "-1"], "`temperature` must be at least 0"),
        ([*base, *prompt, "--top-k", "5"], "`temperature` must be above 0 with `top_k`"),
        (["--model", str(tmp_path / "nothing"), *prompt, "--device", "cpu"], "can't be loaded"),
        ([*base[:2], *prompt, "--device", "tpu9"], "--device must be cpu or cuda; got 'tpu9'"),
        ([*base, "--prompt-file", str(tmp_path / "empty")], "is empty"),
        ([*base, "--prompt-file", str(tmp_path / "latin")], "must be UTF-8 text"),
        ([*base, *memory, *prompt, "--state-in", str(tmp_path / "cut")], "must be an undamaged file that `save_cache` wrote"),
    ):
        tail = ["--window", "12", "--sinks", "3", "--chunk", "7"] if "--memory" not in arguments else []
        assert message in problem(capsys, [*arguments, *tail]), arguments
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "torch sees 0 CUDA devices" in problem(capsys, [*base[:2], *prompt, "--device", "cuda"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("tqdm", "gguf") else find(name))
    assert "this needs tqdm: pip install" in problem(capsys, [*base, *prompt])
    assert "this needs tqdm, gguf: pip install" in problem(capsys, ["--model", "smollm2", *prompt])


def test_a_state_of_another_memory_is_refused(folder, capsys, tmp_path):
    state = tmp_path / "state"
    run(folder, "--prompt", "abc", "--state-out", str(state), "--max-new-tokens", "0", "--prompt-file", str(folder / "text"))
    capsys.readouterr()
    arguments = ["--model", str(folder / "base"), "--window", "12", "--sinks", "3", "--chunk", "7", "--device", "cpu"]
    assert "must have the config that the file was written with" in problem(capsys, [*arguments, "--state-in", str(state), "--prompt", "a"])


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 100, 1 << 20])
def test_blocks_and_segments_are_the_text(block_bytes):
    for text in (TEXT, "é" * 50, "no line ends here but words do " * 5, "", "\n\n\n", "a€😀b" * 20):
        blocks = list(text_blocks(io.BytesIO(text.encode()), block_bytes))
        assert "".join(blocks) == text
        assert all(blocks)
    tokenizer = tiny_tokenizer()
    found = list(segments(io.BytesIO(TEXT.encode()), tokenizer, 64, first=False, block_bytes=block_bytes))
    assert torch.equal(torch.cat([s.ids for s in found], 1)[0], torch.tensor(tokenizer(TEXT).input_ids))
    assert {s.ids.shape[1] for s in found[:-1]} == {64}
    assert found[-1].consumed == len(TEXT.encode())
