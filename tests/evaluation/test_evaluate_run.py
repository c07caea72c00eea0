"""The long run's evaluation: texts from its token files, and the checkpoints that it hands to the command."""

import argparse
import json
import shutil
import sys

import numpy as np
import pytest

from allmem_ops.evaluate import texts as texts_file
from benchmarks import evaluate_run, evaluation_report
from tests.evaluation.conftest import Bytes

SIZES = [
    "--needle-lengths",
    "420",
    "--needle-repeats",
    "1",
    "--speed-lengths",
    "64",
    "--segment",
    "200",
    "--tokens-per-pass",
    "512",
    "--device",
    "cpu",
]
NAMES = {"allmem": "allmem", "adapter": "writes-off", "linear": "linear"}
LENGTHS = {"standard library: a.py": 70, "packages: b.py": 100, "standard library: c.py": 25}


class Tokenizer(Bytes):
    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def store(path, start):
    ids = [np.arange(start + 1000 * i, start + 1000 * i + n, dtype=np.uint16) for i, n in enumerate(LENGTHS.values())]
    np.savez(path, ids=np.concatenate(ids), offsets=np.cumsum([0, *map(len, ids)]), names=np.array(list(LENGTHS)))


def test_texts(tmp_path, monkeypatch):
    store(tmp_path / "heldout.npz", 0)
    store(tmp_path / "unseen.npz", 30_000)
    for name, value in (("LENGTH", 30), ("LONG", 90), ("SHORT", 20)):
        monkeypatch.setattr(texts_file, name, value)
    texts = evaluate_run.build(tmp_path, Tokenizer())
    # at most two rows of a file, each from its start, the standard library's files first
    assert [row[0].item() for row in texts.rows["held out"]] == [0, 30, 1000, 1030]
    assert texts.rows["unseen"].shape == (198 // 30, 30) and texts.rows["unseen"].max() >= 30_000
    assert texts.long.shape == (2, 90) and texts.long[0, 70] == 0  # Bytes' separator
    assert [row[0].item() for row in texts.short] == [0, 2000, 1000]
    assert len(texts.haystack) == 95


@pytest.fixture
def words(place, tmp_path):
    """A command line for the tiny model's runs: two seeds, an adapter, a linear memory, at two windows."""
    runs = tmp_path / "runs"
    for name, target in (
        ("allmem-seed0", "run-seed0/memory"),
        ("allmem-seed1", "run-seed1/memory"),
        ("writes-off-seed0", "adapter/memory"),
        ("linear-seed0", "linear"),
    ):
        shutil.copytree(place / target, runs / name / "memory")
    (runs / "hidden-64-seed0").mkdir()
    own = ["--texts", str(place / "texts.npz"), "--runs", str(runs), "--output", str(tmp_path / "found"), "--model", str(place / "model")]
    return [*own, "--window", "12", "24", "--chunk", "7", "8", "--sinks", "3", *SIZES]


def call(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["evaluate_run", *words])
    with pytest.raises(SystemExit) as stop:
        evaluate_run.main()
    return stop.value.code


def test_pieces(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate_run", *words, "--list", "--workers", "2"])
    evaluate_run.main()
    listed = capsys.readouterr().out
    options = evaluate_run.command.parse(["--arms", "full", "ntk", "window", "allmem", "writes-off", "--parts", "speed", "short", "rows"])
    found = evaluate_run.pieces(options)
    assert [piece.name for piece in found] == [
        "rows-512-full+ntk+window", "rows-512-allmem", "rows-512-writes-off",
        "short-512-full+ntk+window", "short-512-allmem", "speed-512-full+ntk+window", "speed-512-allmem",
    ]  # fmt: skip
    # three controls, two seeds, writes-off in the rows alone, adapter, linear; speed: controls, a seed, linear
    pieces_by_part = [line.split("|")[3].strip() for line in listed.splitlines()[2:12]]
    assert pieces_by_part == ["6", "6", "5", "5", "5", "5", "5", "5", "3", "3"]
    assert "2 processes" in listed


def test_the_whole_evaluation_in_two_processes_is_that_of_one_command(place, words, tmp_path, monkeypatch):
    output, one_window = tmp_path / "found", ["--window", "24", "--chunk", "24"]
    monkeypatch.setattr(evaluate_run, "POLL", 0.05)
    assert call(monkeypatch, [*words, *one_window, "--workers", "2"]) == 0
    pieces = sorted(path.name for path in (output / "pieces").glob("*.json"))
    assert len(pieces) == 24 and "rows-24-allmem.allmem-seed1.json" in pieces
    options = argparse.Namespace(texts=place / "texts.npz", output=tmp_path / "one", runs=tmp_path / "runs", **NAMES)
    more = [*words[words.index("--model") :], *one_window, "--parts", "rows", "long", "needles", "short"]
    assert evaluate_run.command.main(evaluate_run.arguments(options, more)) == 0
    split = json.loads((output / "window-24" / "evaluation.json").read_text())
    whole = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert split["labels"] == whole["labels"] and split["texts"] == whole["texts"] and split["rows"] == whole["rows"]
    for part in ("long", "short"):
        del whole[part]["arms"]["writes-off"]
        assert split[part] == whole[part]
    assert split["needles"] == [entry for entry in whole["needles"] if entry["arm"] != "writes-off"]
    assert list(split["speed"]) == ["full", "window", "allmem#allmem-seed0", "linear"]
    assert (output / "window-24" / "evaluation.png").stat().st_size > 30_000
    assert "Over checkpoints" in (output / "window-24" / "evaluation.md").read_text()

    document = tmp_path / "document.md"
    document.write_text(f"before\n{evaluation_report.BEGIN}\nold\n{evaluation_report.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["evaluation_report", str(output), "--write", str(document), "--pictures", str(tmp_path)])
    evaluation_report.main()
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "### Window 24, chunk 24, 3 sinks" in text and "| recovery, a text" in text and "| AllMem: allmem-seed1" in text
    assert "by depth" not in text and "(evaluation-24.png)" in text and (tmp_path / "evaluation-24.png").stat().st_size > 30_000


def test_a_stopped_evaluation_goes_on(words, tmp_path, monkeypatch, capfd):
    pieces = tmp_path / "found" / "pieces"
    rows = [*words, "--parts", "rows", "--arms", "full", "window", "allmem", "adapter"]
    monkeypatch.setattr(evaluate_run, "POLL", 0.05)
    assert call(monkeypatch, [*rows, "--seconds", "0.001"]) == 1  # no time for any
    assert not list(pieces.glob("*.json")) and "missing: rows-12-full+window" in capfd.readouterr().out
    (pieces / "rows-12-adapter.claim").touch()  # of a process that was killed
    (pieces / "rows-12-allmem.allmem-seed0.json").write_text("{}")  # done before: not done again
    with monkeypatch.context() as patched:
        patched.setattr(evaluate_run, "collect", lambda folder, output: [])
        assert call(patched, rows) == 0
    assert len(list(pieces.glob("*.json"))) == 8 and (pieces / "rows-12-allmem.allmem-seed0.json").read_text() == "{}"


def test_pieces_that_fail_keep_no_other_from_running(words, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(evaluate_run, "POLL", 0.05)
    description = tmp_path / "runs" / "writes-off-seed0" / "memory" / "memory.json"
    saved = json.loads(description.read_text())
    saved["config"]["norm"] = "none"  # an adapter of another form than the memories
    description.write_text(json.dumps(saved))
    chosen = [
        "--arms",
        "full",
        "window",
        "adapter",
        "--parts",
        "needles",
        "rows",
        "--needle-lengths",
        "40",
        "--window",
        "24",
        "--chunk",
        "24",
    ]
    assert call(monkeypatch, [*words, *chosen]) == 1
    out = capfd.readouterr().out
    assert "adapter: `directory` must hold a memory of the model's form" in out and "missing: rows-24-adapter, failed" in out
    assert "missing: needles-24-full+window, failed" in out and "`length` must be at least" in out
    found = json.loads((tmp_path / "found" / "window-24" / "evaluation.json").read_text())
    assert set(found["rows"]["a text"]["arms"]) == {"full", "window"} and "needles" not in found


def test_warming_keeps_no_result(words, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_run, "POLL", 0.05)
    assert call(monkeypatch, [*words, "--window", "24", "--chunk", "24", "--warm", "--parts", "rows", "short"]) == 0
    assert not list((tmp_path / "found").glob("window-*")) and not (tmp_path / "found" / "pieces").exists()


def test_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = argparse.Namespace(device="cuda")
    assert evaluate_run.devices(options) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert evaluate_run.devices(options)[1] == {"CUDA_VISIBLE_DEVICES": "7"}
    assert evaluate_run.devices(argparse.Namespace(device="cuda:0")) == [{"CUDA_VISIBLE_DEVICES": "5"}]
