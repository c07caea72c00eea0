"""Tasks of lm-evaluation-harness under every arm, through its own wrapper for Hugging Face models.

A converted model is a Hugging Face model, so the harness's `HFLM` takes it as it is; an arm is the state it is in while a task runs.
Needs the extra `[eval]`. Its tasks fetch their data themselves: LongBench and RULER run where that can be reached.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allmem_ops._validation import check_int, fail
from allmem_ops.evaluation.arms import Arm

Metrics = dict[str, dict[str, float]]


def harness_model(model: Any, tokenizer: Any, *, max_length: int | None = None, batch_size: int = 1) -> Any:
    """The harness's wrapper (`lm_eval.models.huggingface.HFLM`) around a loaded model.

    Args:
        model: a converted model, or any other of transformers.
        tokenizer: its tokenizer.
        max_length: the longest text, in tokens; default: what the model was trained to. A longer one is cut from the left by some tasks
            and refused in others, so give more for an arm that can read more.
        batch_size: texts a call.

    Raises:
        ImportError: the harness is not installed.
    """
    check_int("batch_size", batch_size, 1)
    _, wrapper, _ = _harness()
    return wrapper(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size)


def run_tasks(
    model: Any,
    arms: Sequence[Arm],
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_path: Path | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int = 1,
) -> dict[str, Metrics]:
    """Run tasks under every arm.

    Args:
        model: a converted model.
        arms: how it is read.
        tokenizer: its tokenizer.
        tasks: names that the harness knows, or that `task_path` has.
        task_path: a folder with more tasks (YAML).
        limit: texts a task; None: all.
        max_length, batch_size: of `harness_model`.

    Returns:
        By arm and task, the harness's metrics (with their standard errors where it gives them).

    Raises:
        ImportError: the harness is not installed.
        ValueError: a task that it doesn't know.
    """
    evaluator, _, _ = _harness()
    manager = known_tasks(tasks, task_path)
    found = {}
    for arm in arms:
        wrapped = harness_model(model, tokenizer, max_length=max_length, batch_size=batch_size)
        with arm.enter(model):
            results = evaluator.simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000)
        found[arm.key] = {task: _numbers(metrics) for task, metrics in results["results"].items()}
    return found


def known_tasks(tasks: Sequence[str], task_path: Path | None = None) -> Any:
    """The harness's task manager, when it knows all of `tasks`; raises what `run_tasks` raises."""
    _, _, manager_class = _harness()
    manager = manager_class(include_path=None if task_path is None else str(task_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        fail("tasks", "must be tasks that lm-evaluation-harness knows", ", ".join(unknown), "A folder of your own: task_path")
    return manager


def _harness() -> tuple[Any, Any, Any]:
    try:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('tasks need lm-evaluation-harness: pip install -e ".[eval]" -c constraints.txt') from error
    return evaluator, HFLM, TaskManager


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """`exact_match,none` -> `exact_match`, `exact_match_stderr,none` -> `exact_match_stderr`; what is no metric is left out."""
    return {name.removesuffix(",none"): float(x) for name, x in metrics.items() if "," in name and isinstance(x, int | float)}
