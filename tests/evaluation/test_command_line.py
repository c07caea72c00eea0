"""`python -m allmem_ops.evaluate` from a saved model and checkpoints to three files; every foreseeable error is one sentence."""

import importlib.util
import json

import pytest
import torch

from allmem_ops.demo.corpus import Corpus, standard_library
from allmem_ops.evaluate import __main__ as command
from allmem_ops.evaluate import texts as texts_file
from allmem_ops.hf import convert, save_memory
from tests.evaluation.conftest import MODEL, Bytes
from tests.hf.tiny import tiny_config, tiny_model

SMALL = ["--window", "12", "--sinks", "3", "--chunk", "7", "--segment", "64", "--tokens-per-pass", "512", "--device", "cpu"]


def arguments(place, *more):
    return ["--model", str(place / "model"), "--texts", str(place / "texts.npz"), *SMALL, *more]


def run(place, output, *more):
    return command.main([*arguments(place, *more), "--output", str(output)])


def test_the_whole_command(place, tmp_path, capsys):
    memories = [str(place / name / "memory") for name in ("run-seed0", "run-seed1")]
    options = ["--adapter", str(place / "adapter" / "memory"), "--linear", str(place / "linear"), "--memory", *memories]
    sizes = ["--needle-lengths", "420", "--needle-repeats", "1", "--speed-lengths", "64", "--segment", "200"]
    assert run(place, tmp_path, *options, *sizes) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    keys = ["full", "ntk", "window", "allmem#run-seed0", "allmem#run-seed1", "writes-off", "adapter", "linear"]
    assert list(found["labels"]) == keys and found["settings"]["window"] == [12]
    assert found["texts"]["a text"]["shape"] == [2, 60] and set(found["seconds_of_all"]) == {"load", "texts", "convert", "window 12"}
    losses = [arm["beyond"]["loss"] for arm in found["rows"]["a text"]["arms"].values()]
    assert len(set(losses)) == 7
    report = (tmp_path / "evaluation.md").read_text()
    assert "AllMem: run-seed1" in report and "Over checkpoints" in report and "AllMem, 2" in report
    assert (tmp_path / "evaluation.png").stat().st_size > 30_000
    out = capsys.readouterr().out
    assert report.strip() in out and "needles:" in out


def test_a_fresh_memory_is_the_window(place, tmp_path):
    assert run(place, tmp_path, "--parts", "rows") == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(found["labels"]) == ["full", "ntk", "window", "allmem"]
    arms = found["rows"]["a text"]["arms"]
    assert arms["allmem"]["beyond"] == arms["window"]["beyond"] != arms["full"]["beyond"]


def test_several_windows(place, tmp_path):
    assert run(place, tmp_path, "--parts", "rows", "--arms", "full", "window", "--window", "12", "24", "--chunk", "7", "8") == 0
    found = [json.loads((tmp_path / f"window-{window}" / "evaluation.json").read_text()) for window in (12, 24)]
    assert [(f["plan"]["window"], f["plan"]["chunk_size"]) for f in found] == [(12, 7), (24, 8)]
    assert "0-24" in found[1]["rows"]["a text"]["arms"]["window"]["kl"]


def test_texts_are_built_once_and_read_again(tmp_path):
    library, own = tmp_path / "library", tmp_path / "own"
    for folder, count in ((library, 60), (own, 5)):
        folder.mkdir()
        for i in range(count):
            (folder / f"module_{i}.py").write_text("".join(f"value_{i}_{j} = {i * j}\n" for j in range(20)))
    corpus, mine = standard_library(library), texts_file.own_sources(own)
    assert isinstance(mine, Corpus) and len(mine.held_out) == 5 and mine.train == ()
    built = texts_file.build(Bytes(), corpus, mine, length=128, long=600, short=16)
    assert {name: list(rows.shape)[1] for name, rows in built.rows.items()} == {texts_file.STDLIB: 128, texts_file.OWN: 128}
    assert built.long.shape[1] == 600 and built.short.shape == (len(corpus.held_out), 16) and "value_" in built.haystack
    texts_file.save(built, tmp_path / "texts.npz")
    loaded = texts_file.load(tmp_path / "texts.npz")
    assert texts_file.describe(loaded) == texts_file.describe(built) and loaded.haystack == built.haystack
    assert texts_file.own_sources().held_out


def error(capsys, arguments):
    assert command.main(arguments) == 2
    message = capsys.readouterr().err.rpartition("\r")[2].strip().splitlines()[-1]  # after transformers' own progress bar
    assert message.startswith("allmem_ops.evaluate: ")
    return message


@pytest.mark.parametrize(
    "change, message",
    [
        (["--arms", "dance"], "--arms must be of full, ntk, window, allmem, writes-off, adapter, linear; got 'dance'"),
        (["--parts", "rows", "dance"], "--parts must be of rows, long, short, needles, speed; got 'dance'"),
        (["--arms", "adapter"], "--arms adapter needs --adapter FOLDER"),
        (["--memory", "nowhere"], "--memory nowhere holds no memory.safetensors"),
        (["--chunk", "13"], "--chunk must be from 1 to --window 12"),
        (["--window", "12", "13"], "--window must name each window once, and --chunk one for each; got [12, 13] and [7]"),
        (["--segment", "0"], "--segment must be at least 1; got 0"),
        (["--device", "gpu"], "--device must be cpu or cuda; got 'gpu'"),
        (["--device", "meta"], "--device must be cpu or cuda; got 'meta'"),
        (["--model", "no/such/model", "--parts", "rows"], "--model no/such/model can't be loaded"),
        (["--needle-lengths", "50", "--parts", "needles"], "`length` must be at least"),
        (["--speed-lengths", "4096", "--parts", "speed"], "`speed_lengths` must be at most 200"),
    ],
)
def test_errors(place, tmp_path, capsys, change, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in error(capsys, [*arguments(place, "--output", str(tmp_path)), *change])


def test_no_gpu(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    message = error(capsys, [*arguments(place, "--output", str(tmp_path)), "--device", "cuda"])
    assert "--device cuda is not there: torch sees 0 CUDA devices" in message


def test_a_memory_of_another_base_model(place, tmp_path, capsys):
    torch.manual_seed(5)
    other = tiny_model(**MODEL)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    save_memory(convert(other, tiny_config()), tmp_path / "other")
    message = error(capsys, arguments(place, "--output", str(tmp_path), "--memory", str(tmp_path / "other")))
    assert "must have the base weights that the memory was trained beside" in message


def test_damaged_texts(place, tmp_path, capsys):
    (tmp_path / "texts.npz").write_bytes(b"no archive")
    message = error(capsys, [*arguments(place, "--output", str(tmp_path)), "--texts", str(tmp_path / "texts.npz")])
    assert f"--texts {tmp_path / 'texts.npz'} is not a file of texts" in message


def test_unwritable_output(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "can't be written: Not a directory" in error(capsys, arguments(place, "--output", str(tmp_path / "file" / "folder")))


@pytest.mark.parametrize("missing, more", [("tqdm", []), ("lm_eval", ["--tasks", "x"]), ("gguf", ["--model", "smollm2"])])
def test_missing_extra(place, tmp_path, capsys, monkeypatch, missing, more):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name) or "there")
    message = error(capsys, [*arguments(place, "--output", str(tmp_path)), *more])
    assert f'the evaluation needs {missing}: pip install -e ".[eval]"' in message
