"""The next token from logits, on the device: greedy, or drawn at a temperature from the top k or the top p."""

from dataclasses import dataclass

import torch
from torch import Tensor

from allmem_ops._validation import check_float, check_int, fail


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest; None: among all.
        top_p: draw among the likeliest tokens that reach this probability together, after `top_k`; None: among all.

    Raises:
        ValueError: a value out of range, or `top_k` or `top_p` at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_float("temperature", self.temperature, minimum=0.0)
        if self.top_k is not None:
            check_int("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_float("top_p", self.top_p, above=0.0)
            if self.top_p > 1:
                fail("top_p", "must be at most 1", self.top_p)
        if self.greedy and (self.top_k, self.top_p) != (None, None):
            fail("temperature", "must be above 0 with `top_k` or `top_p`", self.temperature)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """int64 [B] from logits [B, V], with no host synchronisation.

        argmax_i(logits_i / temperature - log E_i) with E_i ~ Exp(1) is a draw from softmax(logits / temperature): no running sum over
        the vocabulary, and what is left out is -inf.

        Args:
            logits: any floating dtype; the arithmetic is float32.
            generator: of the logits' device; None: the device's own.
        """
        if self.greedy:
            return logits.argmax(-1)
        scores, index = logits.float() / self.temperature, None
        if self.top_k is not None:
            scores, index = scores.topk(min(self.top_k, logits.shape[-1]), -1)
        if self.top_p is not None and self.top_p < 1:
            if index is None:
                scores, index = scores.sort(-1, descending=True)
            p = scores.softmax(-1)
            # A token stays while those before it have not reached top_p: the first one always.
            scores = scores.masked_fill(p.cumsum(-1) - p >= self.top_p, -torch.inf)
        noise = torch.empty_like(scores).exponential_(generator=generator)
        choice = (scores - noise.log()).argmax(-1, keepdim=True)
        return (choice if index is None else index.gather(-1, choice))[:, 0]
