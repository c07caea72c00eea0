"""`train`: a resumable run over token rows, with a log, checkpoints and a time budget."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allmem_ops._validation import check_int
from allmem_ops.hf import save_memory
from allmem_ops.training.checkpoint import check_recipe, latest_checkpoint, load_checkpoint, save_checkpoint
from allmem_ops.training.engine import Distillation, Launched, Step
from allmem_ops.training.recipe import Recipe
from allmem_ops.training.rows import TokenRows

LOG, CHECKPOINTS, MEMORY, WHERE = "log.jsonl", "checkpoints", "memory", "where.json"


@dataclass(frozen=True)
class Outcome:
    """Where a call of `train` left the run: `steps` are those that it made; `skipped` counts those of the whole run."""

    finished: bool
    steps: list[Step]
    skipped: int
    seconds: float


def train(
    run: Distillation,
    rows: TokenRows,
    *,
    rows_per_step: int,
    output: str | os.PathLike[str],
    seconds: float | None = None,
    save_every: int = 0,
    on_step: Callable[[Step], None] | None = None,
) -> Outcome:
    """Go on with the run in `output` to its end, or to the end of the time: call it again to go on.

        output/log.jsonl      a line a step: index, kl, lr, grad_norm, tokens, seconds, skipped, window, sinks, chunk_size
        output/checkpoints/   the last checkpoint
        output/memory/        `save_memory`, at the end

    A step's numbers are read when the next one has been launched, so that the device never waits for the log. After a break the
    log is cut back to the checkpoint: each step stands in it once.

    Args:
        run: new; goes on from the checkpoint in `output` where there is one.
        rows: the data.
        rows_per_step: of all processes together.
        output: made where it does not exist.
        seconds: stop and save after this much time, the checkpoint's own not counted; None: run to the end.
        save_every: steps between checkpoints; 0: at the end of the call only.
        on_step: called on the main process for each step, in order.

    Returns:
        `Outcome`.

    Raises:
        ValueError: a checkpoint of another run, a number of rows that the processes can't share.
    """
    check_int("rows_per_step", rows_per_step, 1)
    check_int("save_every", save_every, 0)
    output = Path(output)
    place = _Place(run, output)
    skipped = place.resume()
    started = before = time.perf_counter()
    made: list[Step] = []
    pending: Launched | None = None
    log = place.log()

    def read() -> None:
        nonlocal pending, skipped, before
        if pending is None:
            return
        step = pending.read(before)
        before = time.perf_counter()
        pending = None
        made.append(step)
        skipped += step.skipped
        if log is not None:
            log.write(json.dumps(_line(step)) + "\n")
            log.flush()
            if on_step is not None:
                on_step(step)

    try:
        while run.index < run.recipe.steps and not place.out_of_time(started, seconds):
            batch = rows.batch(run.index, rows_per_step, part=place.rank, parts=place.world).to(place.device)
            launched = run.step(batch)
            read()
            pending = launched
            if place.device.type == "cpu":  # the step is over
                read()
            if save_every and run.index % save_every == 0 and run.index < run.recipe.steps:
                read()
                place.save(skipped)
        read()
    finally:
        if log is not None:
            log.close()
    finished = run.index >= run.recipe.steps
    place.save(skipped)
    if finished:
        place.save_memory()
    return Outcome(finished, made, skipped, time.perf_counter() - started)


class _Place:
    """The run's processes and its folder. Only the main process writes, except for what accelerate saves of a sharded run."""

    def __init__(self, run: Distillation, output: Path) -> None:
        self.run, self.output, self.accelerator = run, output, run.accelerator
        self.rank = 0 if self.accelerator is None else self.accelerator.process_index
        self.world = 1 if self.accelerator is None else self.accelerator.num_processes
        self.device = run.model.get_input_embeddings().weight.device if self.accelerator is None else self.accelerator.device
        output.mkdir(parents=True, exist_ok=True)

    def resume(self) -> int:
        """Load the last checkpoint and cut the log to it; the steps skipped before."""
        if self.run.sharded:
            return self._resume_sharded()
        checkpoint = latest_checkpoint(self.output / CHECKPOINTS)
        if checkpoint is None:
            self._cut_log(0)
            return 0
        skipped = load_checkpoint(self.run, checkpoint)["skipped"]
        self._cut_log(self.run.index)
        return skipped

    def _resume_sharded(self) -> int:
        state = self.output / CHECKPOINTS / "sharded"
        if not (state / WHERE).is_file():
            self._cut_log(0)
            return 0
        where = json.loads((state / WHERE).read_text())
        check_recipe(Recipe.from_dict(where["recipe"]), self.run.recipe)
        self.accelerator.load_state(str(state))
        self.run.index = where["index"]
        self._cut_log(self.run.index)
        return where["skipped"]

    def save(self, skipped: int) -> None:
        if self.run.sharded:
            state = self.output / CHECKPOINTS / "sharded"
            self.accelerator.save_state(str(state))
            if self.rank == 0:
                where = {"index": self.run.index, "skipped": skipped, "recipe": self.run.recipe.to_dict()}
                (state / WHERE).write_text(json.dumps(where))
        elif self.rank == 0:
            save_checkpoint(self.run, self.output / CHECKPOINTS, extra={"skipped": skipped})
        self._wait()

    def save_memory(self) -> None:
        self.run.reset_draw()
        with self.run.whole_parameters():
            if self.rank == 0:
                save_memory(self.run.model, self.output / MEMORY)
        self._wait()

    def log(self) -> Any:
        return (self.output / LOG).open("a") if self.rank == 0 else None

    def out_of_time(self, started: float, seconds: float | None) -> bool:
        """The main process's clock decides for all."""
        if seconds is None:
            return False
        over = time.perf_counter() - started >= seconds
        if self.world == 1:
            return over
        return bool(self.accelerator.reduce(torch.tensor(float(over and self.rank == 0), device=self.device), "sum").item())

    def _cut_log(self, index: int) -> None:
        path = self.output / LOG
        if self.rank == 0 and path.is_file():
            kept = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["index"] < index]
            path.write_text("".join(f"{line}\n" for line in kept))
        self._wait()

    def _wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def _line(step: Step) -> dict[str, Any]:
    values = {name: getattr(step, name) for name in ("index", "kl", "lr", "grad_norm", "tokens", "seconds", "skipped")}
    return values | {name: value for name, value in step.draw._asdict().items() if value is not None}
