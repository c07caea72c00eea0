"""Memory-efficient fine-tuning: forward-KL distillation of a converted model from the same weights with full attention."""

from allmem_ops.training.kl import TokenLosses, forward_kl, token_losses
from allmem_ops.training.schedule import wsd_factor

__all__ = ["TokenLosses", "forward_kl", "token_losses", "wsd_factor"]
