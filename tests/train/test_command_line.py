"""`python -m allmem_ops.train` on a tiny model: a run, a break, two processes, and errors of one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from allmem_ops.hf import load_memory, memory_parameters
from allmem_ops.hf.load import load_causal_lm
from allmem_ops.train.__main__ import main, run
from tests.training.tiny import VOCAB, llama

ROOT = Path(__file__).parents[2]
RANGES = ["--window", "6", "20", "--sinks", "0", "3", "--chunk", "3", "20"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("train")
    llama().save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    np.save(folder / "rows.npy", random.integers(0, VOCAB, (12, 40)).astype(np.uint16))
    np.savez(folder / "answers.npz", ids=random.integers(0, VOCAB, (12, 40)), mask=random.random((12, 40)) < 0.4)
    return folder


def arguments(place, output, *more, steps=6, batch=2, data="rows.npy"):
    fixed = ["--model", place / "model", "--data", place / data, "--output", output, "--steps", steps, "--batch", batch]
    options = [*fixed, "--lr", 5e-3, "--dtype", "float32", "--cpu", "--quiet", "--set", "head_dim=16", *RANGES, *more]
    return [str(x) for x in options]


def log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(place):
    """An unbroken run's log."""
    output = place / "whole"
    assert main(arguments(place, output)) == 0
    return log(output)


def test_a_run_writes_its_log_and_a_memory_that_loads(place, whole):
    assert [line["index"] for line in whole] == list(range(6)) and not any(line["skipped"] for line in whole)
    assert {"kl", "lr", "grad_norm", "tokens", "seconds", "window", "sinks", "chunk_size"} <= set(whole[0])
    assert len({line["window"] for line in whole}) > 1 and all(line["chunk_size"] <= line["window"] for line in whole)
    model = load_memory(load_causal_lm(place / "model", dtype=torch.float32), place / "whole" / "memory")
    assert any(p.abs().sum() > 0 for name, p in memory_parameters(model).items() if name.endswith("alpha"))
    assert not list((place / "whole").glob("tensorboard/*"))  # not installed here


def test_a_broken_run_goes_on_as_if_unbroken(place, whole, tmp_path, monkeypatch):
    from allmem_ops.training import Distillation

    plain, calls = Distillation.step, []

    def breaks(self, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "step", breaks)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(place, tmp_path, "--save-every", 2))
    assert (tmp_path / "checkpoints" / "step-0000004" / "run.json").is_file()
    assert main(arguments(place, tmp_path, "--save-every", 2)) == 0
    assert [(line["index"], line["kl"], line["window"]) for line in log(tmp_path)] == [(x["index"], x["kl"], x["window"]) for x in whole]


def test_a_run_out_of_time_stops_with_a_checkpoint_and_goes_on(place, whole, tmp_path, capsys):
    for _ in range(20):
        assert main(arguments(place, tmp_path, "--seconds", 0.05)) == 0
        said = capsys.readouterr().out
        if "call it again" not in said:
            break
        assert not (tmp_path / "memory").exists()
    assert "the memory is in" in said and [line["kl"] for line in log(tmp_path)] == [line["kl"] for line in whole]
    # finished: nothing is left to do
    assert main(arguments(place, tmp_path)) == 0 and len(log(tmp_path)) == 6


def test_the_steps_share_a_few_draws(place, tmp_path):
    assert main(arguments(place, tmp_path, "--draws", 2)) == 0
    draws = [(line["window"], line["sinks"], line["chunk_size"]) for line in log(tmp_path)]
    assert len(draws) == 6 and len(set(draws)) == 2 and all(draws.count(draw) == 3 for draw in draws)


def test_response_tokens_alone(place, tmp_path):
    assert main(arguments(place, tmp_path / "all", data="answers.npz", steps=1)) == 0
    assert main(arguments(place, tmp_path / "response", "--loss", "response", data="answers.npz", steps=1)) == 0
    assert log(tmp_path / "all")[0]["kl"] != log(tmp_path / "response")[0]["kl"]


def test_gradient_checkpointing_gives_the_same_losses(place, whole, tmp_path):
    run(arguments(place, tmp_path, "--gradient-checkpointing"))
    assert [x["kl"] for x in log(tmp_path)] == pytest.approx([x["kl"] for x in whole], rel=1e-5)


def test_a_memory_goes_on_training(place, tmp_path, whole):
    options = [x for x in arguments(place, tmp_path, "--memory", place / "whole" / "memory", steps=1) if x not in ("--set", "head_dim=16")]
    assert main(options) == 0
    assert log(tmp_path)[0]["kl"] != whole[0]["kl"]


def two_processes(script, options, **environment):
    """What `script` says in two processes on this machine's CPU."""
    # accelerate's own launcher starts several CPU processes only through MPI; what torchrun starts, it takes over
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [*launch, str(ROOT / "tests/train" / script), *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=300)
    except BaseException:
        process.terminate()  # torchrun then ends its processes, which are in sessions of their own, and after 30 s kills them
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_two_processes_are_one_with_the_doubled_batch(place, whole):
    """Equal parameters in both, and the losses of the one process that read the same rows."""
    output = place / "two"
    done = two_processes("two_processes.py", arguments(place, output, batch=1))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal parameters") == done.stdout.count("nothing holds the group") == 2
    assert [x["kl"] for x in log(output)] == pytest.approx([x["kl"] for x in whole], rel=1e-5)
    assert [x["window"] for x in log(output)] == [x["window"] for x in whole] and len(log(output)) == 6


def test_parameters_sharded_over_two_processes_break_off_and_go_on(place, whole):
    """FSDP2, by accelerate's own configuration: the same losses across a break, and a whole memory at the end."""
    output = place / "sharded"
    options = arguments(place, output, "--save-every", 2, batch=1)
    environment = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }  # fmt: skip
    assert two_processes("sharded.py", options, **environment, BREAK_AT="5").returncode != 0
    # step 4 stands in the log and not in the checkpoint, which is from before it: it is made again
    assert [x["index"] for x in log(output)] == [0, 1, 2, 3, 4] and not (output / "memory").exists()
    done = two_processes("sharded.py", options, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sharded") >= 2
    assert [x["kl"] for x in log(output)] == pytest.approx([x["kl"] for x in whole], rel=1e-5)
    trained, same = (
        load_memory(load_causal_lm(place / "model", dtype=torch.float32), place / name / "memory") for name in ("sharded", "whole")
    )
    for p, q in zip(memory_parameters(trained).values(), memory_parameters(same).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_zero2_over_two_processes_breaks_off_and_goes_on(place, whole):
    pytest.importorskip("deepspeed", reason="DeepSpeed is no part of the extras; on a CPU it first builds an operator, for minutes")
    output = place / "zero2"
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_GRADIENT_CLIPPING": "1.0",
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    for _ in range(20):
        done = two_processes("zero2.py", arguments(place, output, "--seconds", 0.3, batch=1), **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("by ZeRO-2") == 2
        if "the memory is in" in done.stdout:
            break
    for name in ("kl", "grad_norm"):
        assert [x[name] for x in log(output)] == pytest.approx([x[name] for x in whole], rel=1e-4)
    trained, same = (
        load_memory(load_causal_lm(place / "model", dtype=torch.float32), place / name / "memory") for name in ("zero2", "whole")
    )
    for p, q in zip(memory_parameters(trained).values(), memory_parameters(same).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere.npy"], "--data nowhere.npy is not there"),
        (["--model", "/nowhere/model"], "`source` must be a folder, a Hub name or a .gguf file of a causal LM; got /nowhere/model"),
        (["--loss", "response"], "--loss response needs a mask"),
        (["--length", "41"], "`length` must be at most 40"),
        (["--batch", "0"], "--batch must be at least 1; got 0"),
        (["--warmup", "0.7", "--decay", "0.7"], "--warmup and --decay must be at most 1 together; got 1.4"),
        (["--window", "2", "20"], "`chunk_size` must start at most at the lowest window, 2; got 3"),
        (["--window", "1", "2", "3"], "--window takes one number or two; got 3"),
        (["--cuda-graph"], "--cuda-graph needs --draws N where window, sinks or chunk are drawn"),
        (["--cuda-graph", "--draws", "2"], "--cuda-graph needs a GPU"),
        (["--set", "heads"], "--set takes FIELD=VALUE"),
        (["--set", "gate=none", "norm=sideways"], "`norm` must be one of"),
        (["--output", "/proc/nowhere"], "--output /proc/nowhere can't be written"),
    ],
)
def test_errors_are_one_sentence(place, tmp_path, capsys, change, message):
    assert main([*arguments(place, tmp_path), *change]) == 2
    said = capsys.readouterr().err
    assert said.startswith("allmem_ops.train: ") and message in said and said.count("\n") == 1


def test_tokens_of_another_vocabulary_are_refused(place, tmp_path, capsys):
    np.save(tmp_path / "foreign.npy", np.full((4, 40), VOCAB))
    assert main([*arguments(place, tmp_path / "out"), "--data", str(tmp_path / "foreign.npy")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"allmem_ops.train: --data holds the token {VOCAB}, and the model knows {VOCAB}")


def test_another_recipe_is_not_taken_for_the_same_run(place, whole, capsys):
    assert main([*arguments(place, place / "whole"), "--lr", "1e-3"]) == 2
    assert "`run` must have the recipe of the checkpoint ({'lr': 0.005}); got {'lr': 0.001}" in capsys.readouterr().err
