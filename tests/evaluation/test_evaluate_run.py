"""The long run's evaluation: texts from its token files, and the checkpoints that it hands to the command."""

import sys

import numpy as np
import pytest

from allmem_ops.evaluate import texts as texts_file
from benchmarks import evaluate_run
from tests.evaluation.conftest import Bytes

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


def test_the_checkpoints_of_all_seeds_are_handed_on(tmp_path, monkeypatch):
    for name in ("allmem-seed0", "allmem-seed1", "writes-off-seed0", "hidden-64-seed0"):
        (tmp_path / "runs" / name / "memory").mkdir(parents=True)
    given = []
    monkeypatch.setattr(evaluate_run.command, "main", lambda arguments: given.extend(arguments) or 0)
    monkeypatch.setattr(sys, "argv", ["evaluate_run", "--texts", "t.npz", "--runs", str(tmp_path / "runs"), "--parts", "rows"])
    with pytest.raises(SystemExit) as stop:
        evaluate_run.main()
    runs = tmp_path / "runs"
    assert stop.value.code == 0
    memories = given[given.index("--memory") + 1 : given.index("--adapter")]
    assert memories == [str(runs / f"allmem-seed{i}" / "memory") for i in range(2)]
    assert given[given.index("--adapter") + 1] == str(runs / "writes-off-seed0" / "memory") and "--linear" not in given
    assert given[-2:] == ["--parts", "rows"] and given[given.index("--chunk") + 1 :][:2] == ["256", "512"]
