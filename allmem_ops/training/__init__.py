"""Memory-efficient fine-tuning: forward-KL distillation of a converted model from the same weights with full attention.

The losses and the recipe need torch alone; what runs a model, and `TokenRows`, need the extra `[hf]` and are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from allmem_ops.training.data import Batch, response_mask
from allmem_ops.training.kl import TokenLosses, forward_kl, token_losses
from allmem_ops.training.recipe import Draw, Recipe
from allmem_ops.training.schedule import wsd_factor

if TYPE_CHECKING:
    from allmem_ops.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
    from allmem_ops.training.compiled import compile_blocks, plain_blocks
    from allmem_ops.training.distill import FineTuneResult, fine_tune
    from allmem_ops.training.engine import Distillation, Step, final_hidden
    from allmem_ops.training.loop import Outcome, train
    from allmem_ops.training.on_policy import Answers, answer_prompts
    from allmem_ops.training.rows import TokenRows

_HOME = {
    "Answers": "on_policy",
    "Distillation": "engine",
    "FineTuneResult": "distill",
    "Outcome": "loop",
    "Step": "engine",
    "TokenRows": "rows",
    "answer_prompts": "on_policy",
    "compile_blocks": "compiled",
    "final_hidden": "engine",
    "fine_tune": "distill",
    "latest_checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "plain_blocks": "compiled",
    "save_checkpoint": "checkpoint",
    "train": "loop",
}

__all__ = [
    "Answers",
    "Batch",
    "Distillation",
    "Draw",
    "FineTuneResult",
    "Outcome",
    "Recipe",
    "Step",
    "TokenLosses",
    "TokenRows",
    "answer_prompts",
    "compile_blocks",
    "final_hidden",
    "fine_tune",
    "forward_kl",
    "latest_checkpoint",
    "load_checkpoint",
    "plain_blocks",
    "response_mask",
    "save_checkpoint",
    "token_losses",
    "train",
    "wsd_factor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"allmem_ops.training.{_HOME[name]}"), name)
