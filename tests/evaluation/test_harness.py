"""A converted model through lm-evaluation-harness: a task of two files, scored and answered under every arm."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from allmem_ops.evaluation.arms import ALLMEM, ARMS, FULL, LABELS, WINDOW
from allmem_ops.evaluation.harness import harness_model, run_tasks
from allmem_ops.evaluation.report import text
from allmem_ops.hf import convert
from tests.evaluation.conftest import letters_tokenizer
from tests.hf.tiny import awaken, tiny_config, tiny_model

TASKS = Path(__file__).parent / "tasks"
CHOICE, ANSWER = "allmem_recall_choice", "allmem_recall_answer"
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason='lm-evaluation-harness is not installed: pip install -e ".[eval]"')


@pytest.fixture(scope="module")
def letters():
    return letters_tokenizer()


@pytest.fixture
def model():
    return awaken(convert(tiny_model(vocab_size=257), tiny_config()))


@needs_harness
def test_a_task_runs_under_every_arm(model, letters):
    arms = [ARMS[key] for key in (FULL, WINDOW, ALLMEM)]
    found = run_tasks(model, arms, letters, [CHOICE, ANSWER], task_path=TASKS, batch_size=2)
    assert set(found) == {FULL, WINDOW, ALLMEM}
    for by_task in found.values():
        assert 0 <= by_task[CHOICE]["acc"] <= 1 and by_task[ANSWER]["exact_match"] == 0
    report = text({"plan": {"window": 12, "sinks": 3, "chunk_size": 7}, "labels": LABELS, "seconds": {}, "tasks": found})
    accuracy = found[ALLMEM][CHOICE]
    assert f"{accuracy['acc']:.4f} ± {accuracy['acc_stderr']:.4f}" in report and f"{ANSWER}, exact_match" in report


@needs_harness
@pytest.mark.parametrize("key", [FULL, ALLMEM])
def test_the_harness_sees_the_arms_own_likelihoods(model, letters, key):
    from lm_eval.api.instance import Instance

    text, continuation = "The grass is green. The number of anchor is 41.\nThe number of anchor is", " 41"
    with ARMS[key].enter(model):
        request = Instance("loglikelihood", {}, (text, continuation), 0)
        ((found, _),) = harness_model(model, letters).loglikelihood([request])
        ids = torch.tensor([letters(text + continuation).input_ids])
        with torch.no_grad():
            logs = model(ids, use_cache=False).logits.log_softmax(-1)
    expected = logs[0, -4:-1].gather(-1, ids[0, -3:, None]).sum().item()
    assert found == pytest.approx(expected, rel=1e-4)


@needs_harness
def test_an_unknown_task_is_one_sentence(model, letters):
    with pytest.raises(ValueError, match="tasks that lm-evaluation-harness knows; got allmem_dance"):
        run_tasks(model, [ARMS[FULL]], letters, ["allmem_dance"])


def test_a_missing_harness_is_one_sentence(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"need lm-evaluation-harness: pip install"):
        run_tasks(model, [ARMS[FULL]], None, [CHOICE])
