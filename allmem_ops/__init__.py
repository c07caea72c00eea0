"""Operators, layers and conversion for AllMem (arXiv 2602.13680).

Public names are loaded when first used: importing this package loads neither triton nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "swa": "allmem_ops.ops.swa.api",
    "swa_step": "allmem_ops.ops.swa.api",
    "WindowCache": "allmem_ops.ops.swa.cache",
    "ttt_mlp": "allmem_ops.ops.ttt_mlp.api",
    "ttt_mlp_step": "allmem_ops.ops.ttt_mlp.api",
    "MemoryState": "allmem_ops.ops.ttt_mlp.state",
    "gated_fusion": "allmem_ops.ops.fusion.api",
    "memory_input": "allmem_ops.ops.memory_input.api",
    "memory_input_step": "allmem_ops.ops.memory_input.api",
    "rotary": "allmem_ops.ops.rotary.api",
    "rotary_table": "allmem_ops.ops.rotary.api",
    "AllMemConfig": "allmem_ops.layers.config",
    "MemoryBranch": "allmem_ops.layers.memory",
    "TokenMixer": "allmem_ops.layers.mixer",
    "warmup": "allmem_ops.layers.warmup",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from allmem_ops.layers.config import AllMemConfig
    from allmem_ops.layers.memory import MemoryBranch
    from allmem_ops.layers.mixer import TokenMixer
    from allmem_ops.layers.warmup import warmup
    from allmem_ops.ops.fusion.api import gated_fusion
    from allmem_ops.ops.memory_input.api import memory_input, memory_input_step
    from allmem_ops.ops.rotary.api import rotary, rotary_table
    from allmem_ops.ops.swa.api import swa, swa_step
    from allmem_ops.ops.swa.cache import WindowCache
    from allmem_ops.ops.ttt_mlp.api import ttt_mlp, ttt_mlp_step
    from allmem_ops.ops.ttt_mlp.state import MemoryState


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
