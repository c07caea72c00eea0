"""Pinned kernel configs: one table a kernel, by (GPU class, shape class); tuning only when asked for.

A shape class is made of what a kernel is compiled for (head dim, hidden width, dtype), never of T, window, sinks or chunk
size: these change from call to call, and a change must neither recompile nor retune.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

from allmem_ops._config import settings
from allmem_ops.ops.kernels.device import GPU_CLASSES


class Config(NamedTuple):
    """Compile-time choices of one kernel.

    Args:
        constants: its `tl.constexpr` arguments that are free to choose (tile sizes), by name.
        num_warps, num_stages: as Triton has them.
        maxnreg: a limit on registers a thread, or None.
    """

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return {**self.constants, **self.launch_options()}

    def launch_options(self) -> dict[str, int]:
        """Those of them that are not arguments of the kernel."""
        launch = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return launch if self.maxnreg is None else {**launch, "maxnreg": self.maxnreg}


Table = Mapping[tuple[str, Hashable], Sequence[Config]]

_tuned: dict[tuple[str, str, Hashable], Config] = {}


def candidates(table: Table, gpu: str, shape: Hashable) -> Sequence[Config]:
    """The configs of a shape class, the pinned one first: those of the newest GPU class at or below `gpu` that has any."""
    for known in reversed(GPU_CLASSES[: GPU_CLASSES.index(gpu) + 1]):
        if (known, shape) in table:
            return table[known, shape]
    raise KeyError(f"no config for shape class {shape} on {gpu}")


def choose(kernel: str, table: Table, gpu: str, shape: Hashable, run: Callable[[Config], None] | None = None) -> Config:
    """The config to launch with: the pinned one, or, with `ALLMEM_OPS_AUTOTUNE=1`, the fastest of the candidates.

    Args:
        kernel: its name, the key of what has been tuned in this process.
        table, gpu, shape: see `candidates`.
        run: launches the kernel with a config; must be repeatable (no in-place update). None: the kernel is never tuned.
    """
    found = candidates(table, gpu, shape)
    if run is None or len(found) == 1 or not settings().autotune:
        return found[0]
    key = kernel, gpu, shape
    if key not in _tuned:
        from triton.testing import do_bench

        _tuned[key] = min(found, key=lambda config: do_bench(lambda: run(config)))
    return _tuned[key]
