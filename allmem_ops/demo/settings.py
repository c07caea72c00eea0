"""The sizes of a demo run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes of the run; the defaults fit 2 CPU cores and 5 minutes.

    A window of 64 in rows of 512 tokens: long enough for the window to cost something, short enough for two cores to train on. The rates
    are those of tens of short steps, not the recipe's. A chunk of 32 tokens sums a sixteenth of the gradients that one of 512 does, so
    eta is larger. alpha starts slowly: what it lets in is noise at first. Measured after 32 steps, KL on held-out rows (window alone
    0.292): lr 2e-3 with alpha at 10 times that 0.285, lr 4e-3 with alpha at 3 times that 0.281 (writes off 0.291).
    """

    window: int = 64
    sinks: int = 4
    chunk_size: int = 32
    length: int = 512
    steps: int = 28
    held_out_rows: int = 5
    lr: float = 4e-3
    eta_init: float = 0.1
    alpha_lr_scale: float = 3.0
    stream_tokens: int = 9216
    segment: int = 512
    seed: int = 0
