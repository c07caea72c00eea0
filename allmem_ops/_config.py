"""Settings from the environment, read here and nowhere else."""

import os
from dataclasses import dataclass

from allmem_ops._validation import fail


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Args:
        autotune: `ALLMEM_OPS_AUTOTUNE=1`: time the candidate configs of a kernel at its first call for a shape class, instead of
            taking the pinned one. Off by default: no call is ever slowed down by tuning.
        interpret: `TRITON_INTERPRET=1`, Triton's own variable: kernels run in Triton's interpreter, on CPU tensors.
    """

    autotune: bool = False
    interpret: bool = False


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        fail(name, "must be 0 or 1 (environment variable)", repr(value))
    return value == "1"


def settings() -> Settings:
    """The settings of the environment as it is now."""
    return Settings(autotune=_flag("ALLMEM_OPS_AUTOTUNE"), interpret=_flag("TRITON_INTERPRET"))
