"""The progress line and TensorBoard's scalars."""

import sys
from types import SimpleNamespace

import pytest

from allmem_ops.train.report import Progress
from allmem_ops.training import Step


@pytest.fixture
def board(monkeypatch):
    """Stands where TensorBoard stands when it is installed; what it was given."""
    seen = []

    class Writer:
        def __init__(self, folder):
            seen.append(folder)

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    return seen


def test_scalars_and_a_line(board, tmp_path, capsys):
    progress = Progress(9, 2, tmp_path, shown=True)
    for step in (Step(4, 0.5, 1e-3, 2.0, 100, 0.1, False), Step(5, 0.25, 1e-3, 2.0, 100, 0.1, True)):
        progress(step)
    progress.close()
    assert board[0] == str(tmp_path) and board[-1] == "closed"
    assert ("train/kl", 0.5, 4) in board and ("train/skipped", 1, 5) in board and ("train/lr", 1e-3, 5) in board
    line = capsys.readouterr().err.split("\r")[-1]
    assert "6/9" in line and "KL 0.2500" in line and "tokens/s, 1 skipped" in line


def test_without_tensorboard_or_a_line_nothing_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    progress = Progress(9, 1, tmp_path, shown=False)
    progress(Step(0, 0.5, 1e-3, 2.0, 100, 0.1, False))
    progress.close()
    assert progress.board is None and capsys.readouterr().err == "" and not list(tmp_path.iterdir())
