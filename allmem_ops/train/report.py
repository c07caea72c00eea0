"""What a run shows while it goes: a progress bar, and TensorBoard where it is installed."""

import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from allmem_ops.training import Step


class Progress:
    """A bar over the steps of a run, and scalars for TensorBoard; nothing in the processes that are not the main one.

    Args:
        total: steps of the run.
        processes: whose tokens count together.
        folder: where TensorBoard's files go; None: no TensorBoard.
        shown: False hides the bar.
    """

    def __init__(self, total: int, processes: int, folder: Path | None, shown: bool) -> None:
        self.total, self.processes, self.shown = total, processes, shown
        self.board = _board(folder)
        self.bar: tqdm | None = None
        self.started, self.tokens, self.skipped = time.perf_counter(), 0, 0

    def __call__(self, step: Step) -> None:
        if self.bar is None:  # only now is it known where a resumed run stands
            self.bar = tqdm(total=self.total, initial=step.index, desc="train", unit="step", dynamic_ncols=True, disable=not self.shown)
        self.tokens += step.tokens * self.processes
        self.skipped += step.skipped
        speed = self.tokens / (time.perf_counter() - self.started)
        note = f", {self.skipped} skipped" if self.skipped else ""
        self.bar.set_postfix_str(f"KL {step.kl:.4f}, {speed:,.0f} tokens/s{note}", refresh=False)
        self.bar.update()
        if self.board is not None:
            values = {"kl": step.kl, "lr": step.lr, "grad_norm": step.grad_norm, "tokens_per_second": speed, "skipped": self.skipped}
            for name, value in values.items():
                self.board.add_scalar(f"train/{name}", value, step.index)

    def close(self) -> None:
        for part in (self.bar, self.board):
            if part is not None:
                part.close()


def _board(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an optional extra: the JSONL log holds the same numbers
        return None
    return SummaryWriter(str(folder))
