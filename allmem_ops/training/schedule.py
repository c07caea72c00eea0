"""The learning-rate schedule of the paper's recipe: warm up, stay, decay (WSD)."""

from allmem_ops._validation import check_float, check_int, fail


def wsd_factor(step: int, *, total: int, warmup: int, decay: int, floor: float = 0.0) -> float:
    """The factor on the peak learning rate at `step` (from 0) of `total` steps.

        warmup   step < warmup             (step + 1) / warmup
        stable                             1
        decay    step >= total - decay     floor + (1 - floor) * (total - step) / (decay + 1)

    Args:
        step: the step, from 0; from `total` on the factor is `floor`.
        total: steps of the run.
        warmup: steps of the linear rise; 0 for none.
        decay: steps of the linear fall; 0 for none. `warmup + decay` is at most `total`.
        floor: the factor after the last step. Default 0.

    Returns:
        The factor, a float in [floor, 1].

    Raises:
        ValueError: for a negative count, more warm-up and decay than steps, or a floor outside [0, 1].

    Examples:
        >>> [round(wsd_factor(step, total=8, warmup=2, decay=3), 2) for step in range(9)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    check_int("step", step, 0)
    check_int("total", total, 1)
    check_int("warmup", warmup, 0)
    check_int("decay", decay, 0)
    check_float("floor", floor, minimum=0.0)
    if warmup + decay > total:
        fail("warmup", f"plus `decay` must be at most total={total}", warmup + decay)
    if floor > 1:
        fail("floor", "must be at most 1", floor)
    if step >= total:
        return floor
    if step < warmup:
        return (step + 1) / warmup
    if step >= total - decay:
        return floor + (1 - floor) * (total - step) / (decay + 1)
    return 1.0
