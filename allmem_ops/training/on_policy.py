"""Offline on-policy distillation: the student answers prompts once, and is then distilled on what it wrote."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from allmem_ops._validation import check_dtype, check_float, check_int, check_shape, fail
from allmem_ops.training.data import response_mask


class Answers(NamedTuple):
    """Prompts with their answers, as a training file holds them.

    Args:
        ids: int64 [N, T], each row a prompt and its answer, then padding.
        mask: bool [N, T], the positions that predict a token of an answer.
        lengths: int64 [N], prompt and answer.
    """

    ids: Tensor
    mask: Tensor
    lengths: Tensor

    def save(self, path: str | os.PathLike[str]) -> Path:
        """An `.npz` file for `TokenRows.load`, and for `python -m allmem_ops.train --loss response`."""
        path = Path(path)
        if path.suffix != ".npz":
            fail("path", "must end in .npz", str(path))
        np.savez_compressed(path, ids=self.ids.numpy().astype(np.int32), mask=self.mask.numpy(), lengths=self.lengths.numpy())
        return path


@torch.no_grad()
def answer_prompts(
    model: Any,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    rows_per_pass: int = 8,
    on_pass: Callable[[int], Any] | None = None,
) -> Answers:
    """Let a converted model, as it stands, answer every prompt by sampling.

    Prompts of one length are answered together. An answer ends with the model's end-of-sequence token, which counts as part of it.

    Args:
        model: a converted model; window, sinks and chunk size in force are those of its answers.
        prompts: int64 [length] each.
        max_new_tokens: the longest answer.
        temperature: of the sampling; 0: the likeliest token.
        seed: of the sampling. The random state of the caller is left as it was.
        rows_per_pass: prompts answered side by side, at most.
        on_pass: called with the number of prompts just answered.

    Returns:
        `Answers`, on the CPU, in the order of the prompts.

    Raises:
        ValueError: no prompt, an empty one, or an argument out of range.
    """
    check_int("max_new_tokens", max_new_tokens, 1)
    check_int("rows_per_pass", rows_per_pass, 1)
    check_float("temperature", temperature, minimum=0.0)
    if not prompts:
        fail("prompts", "must hold at least one prompt", 0)
    for prompt in prompts:
        check_shape("prompts", prompt, "length", {})
        check_dtype("prompts", prompt, torch.int64)
        if not prompt.numel():
            fail("prompts", "must have at least one token each", 0)
    device = model.get_input_embeddings().weight.device
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    )
    ends = _ends(model)
    rows: list[Tensor] = [torch.empty(0)] * len(prompts)
    training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.eval()
        try:
            for group in _groups(prompts, rows_per_pass):
                ids = torch.stack([prompts[i] for i in group]).to(device)
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=min(ends, default=0), **sampling
                )
                for i, row in zip(group, out.cpu(), strict=True):
                    rows[i] = _whole(row, ids.shape[1], ends)
                if on_pass is not None:
                    on_pass(len(group))
        finally:
            model.train(training)
    lengths = torch.tensor([row.numel() for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : row.numel()] = row
    started = torch.tensor([p.numel() for p in prompts])
    return Answers(ids, response_mask(started, lengths, ids.shape[1]), lengths)


def _groups(prompts: Sequence[Tensor], most: int) -> list[list[int]]:
    """Indices of prompts of one length, at most `most` together, the longest first."""
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(prompt.numel(), []).append(i)
    return [group[at : at + most] for _, group in sorted(by_length.items(), reverse=True) for at in range(0, len(group), most)]


def _ends(model: Any) -> set[int]:
    """The tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _whole(row: Tensor, prompt: int, ends: set[int]) -> Tensor:
    """The row up to the first end after the prompt, that token included."""
    for at, token in enumerate(row[prompt:].tolist(), start=prompt):
        if token in ends:
            return row[: at + 1]
    return row
