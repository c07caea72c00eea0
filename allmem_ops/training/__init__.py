"""Memory-efficient fine-tuning: forward-KL distillation of a converted model from the same weights with full attention.

The losses and the schedule need torch alone; `fine_tune` needs the extra `[hf]` and is loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from allmem_ops.training.kl import TokenLosses, forward_kl, token_losses
from allmem_ops.training.schedule import wsd_factor

if TYPE_CHECKING:
    from allmem_ops.training.distill import FineTuneResult, Step, final_hidden, fine_tune

_DISTILL = ("FineTuneResult", "Step", "final_hidden", "fine_tune")

__all__ = ["FineTuneResult", "Step", "TokenLosses", "final_hidden", "fine_tune", "forward_kl", "token_losses", "wsd_factor"]


def __getattr__(name: str) -> Any:
    if name not in _DISTILL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("allmem_ops.training.distill"), name)
