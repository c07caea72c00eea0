"""`Recipe`: everything that decides the steps of a run, so that the same recipe and data give the same run."""

import dataclasses
import math
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

from allmem_ops._validation import check_float, check_int, fail
from allmem_ops.training.kl import CHUNK_SIZE
from allmem_ops.training.schedule import wsd_factor

Range = tuple[int, int]


class Draw(NamedTuple):
    """What the student reads with in one step; None leaves the model's own value."""

    window: int | None
    sinks: int | None
    chunk_size: int | None


NO_DRAW = Draw(None, None, None)


@dataclass(frozen=True)
class Recipe:
    """The steps of a distillation run (arXiv 2602.13680: WSD, window, sinks and chunk size drawn anew at every step).

    Args:
        steps: optimizer steps.
        lr: peak learning rate; alpha has `AllMemConfig.alpha_lr_scale` times as much. [P: 1e-4]
        warmup, decay: steps of the schedule's linear rise and fall.
        weight_decay, betas: AdamW's.
        grad_clip: threshold on the norm of all gradients together.
        window, sinks, chunk_size: (lowest, highest) from which each step draws, both included; None: as the model stands.
            A chunk is never drawn longer than the window: a token in neither would be lost to the student.
        distinct_draws: how many different draws the run has; 0: as many as steps. Few can each be a CUDA graph.
        first_position: the loss counts positions from here on.
        kl_chunk: tokens whose logits exist at a time.
        seed: of the draws and of the order of the data. (The memory's initial weights are drawn by `convert`.)

    Raises:
        ValueError: a field out of range; the message names it.

    Example:
        >>> recipe = Recipe(steps=100, warmup=5, decay=20, window=(256, 2048), chunk_size=(256, 2048), sinks=(0, 128))
        >>> recipe.draw(7) == recipe.draw(7) != recipe.draw(8)
        True
        >>> all(draw.chunk_size <= draw.window for draw in map(recipe.draw, range(100)))
        True
    """

    steps: int
    lr: float = 1e-4
    warmup: int = 0
    decay: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    window: Range | None = None
    sinks: Range | None = None
    chunk_size: Range | None = None
    distinct_draws: int = 0
    first_position: int = 0
    kl_chunk: int = CHUNK_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1)
        check_int("distinct_draws", self.distinct_draws, 0)
        check_int("first_position", self.first_position, 0)
        check_int("kl_chunk", self.kl_chunk, 1)
        check_int("seed", self.seed, 0)
        check_float("lr", self.lr, above=0.0)
        check_float("weight_decay", self.weight_decay, minimum=0.0)
        check_float("grad_clip", self.grad_clip, above=0.0)
        self.factor(0)  # checks warmup and decay
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, lowest in (("window", 1), ("sinks", 0), ("chunk_size", 1)):
            ends = getattr(self, name)
            if ends is None:
                continue
            if len(ends) != 2 or ends[0] > ends[1]:
                fail(name, "must be (lowest, highest)", ends)
            check_int(name, ends[0], lowest)
            object.__setattr__(self, name, tuple(ends))
        if self.window and self.chunk_size and self.chunk_size[0] > self.window[0]:
            fail(
                "chunk_size",
                f"must start at most at the lowest window, {self.window[0]}",
                self.chunk_size[0],
                "No chunk is longer than the window",
            )

    def factor(self, step: int) -> float:
        """The factor on the peak learning rate at `step`."""
        return wsd_factor(step, total=self.steps, warmup=self.warmup, decay=self.decay)

    def draw(self, step: int) -> Draw:
        """Window, sinks and chunk size of `step`: a function of seed and step alone, so that a resumed run draws the same.

        Window and chunk size are uniform in their logarithm: from 256 to 2048 as many steps see 256 to 512 as 1024 to 2048.
        """
        if self.distinct_draws and self.draws:
            epoch, place = divmod(step, self.distinct_draws)
            order = random.Random(f"{self.seed} epoch {epoch}").sample(range(self.distinct_draws), self.distinct_draws)
            return self.all_draws()[order[place]]
        source = random.Random(f"{self.seed} {step}")
        window = _log_uniform(source.random(), *self.window) if self.window else None
        sinks = source.randint(*self.sinks) if self.sinks else None
        return Draw(window, sinks, self._chunk_size(source.random(), window))

    def all_draws(self) -> list[Draw]:
        """The draws of a recipe with `distinct_draws`, or with nothing to draw: every step has one of them, each as often as another.

        Of n draws, one lies in each n-th of every range: window and chunk size by their logarithm, the chunk size below its window.

        Raises:
            ValueError: a recipe that draws anew at every step.
        """
        if not self.draws:
            return [self.draw(0)]
        if not self.distinct_draws:
            fail("distinct_draws", "must be at least 1 where all draws are wanted", 0)
        source, n = random.Random(f"{self.seed} draws"), self.distinct_draws
        places = [[(part + source.random()) / n for part in source.sample(range(n), n)] for _ in range(3)]
        found = []
        for at_window, at_sinks, at_chunk in zip(*places, strict=True):
            window = _log_uniform(at_window, *self.window) if self.window else None
            sinks = self.sinks[0] + int(at_sinks * (self.sinks[1] + 1 - self.sinks[0])) if self.sinks else None
            found.append(Draw(window, sinks, self._chunk_size(at_chunk, window)))
        return found

    def _chunk_size(self, at: float, window: int | None) -> int | None:
        if not self.chunk_size:
            return None
        lowest, highest = self.chunk_size
        return _log_uniform(at, lowest, highest if window is None else min(highest, window))

    @property
    def draws(self) -> bool:
        """Whether anything changes from step to step."""
        return any(ends is not None and ends[0] != ends[1] for ends in (self.window, self.sinks, self.chunk_size))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The recipe of `to_dict`, also after JSON has made lists of its tuples."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _log_uniform(at: float, lowest: int, highest: int) -> int:
    """The number at `at`, from 0 to 1, of a range that is uniform in its logarithm."""
    start, end = math.log(lowest), math.log(highest + 1)
    return min(highest, int(math.exp(start + (end - start) * at)))
