"""Forward KL and per-token losses straight from hidden states: two full [T, vocab] logit tensors never exist."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from allmem_ops._validation import MATMUL_DTYPES, check_choice, check_device, check_dtype, check_int, check_shape, fail
from allmem_ops.ops.precision import matmul

# [1024, 49152] in fp32 is 200 MB; a chunk holds at most four such buffers.
CHUNK_SIZE = 1024


class TokenLosses(NamedTuple):
    """Losses of every position, in nats: `cross_entropy` [B, T] to the next token, `kl` [B, T] to the teacher."""

    cross_entropy: torch.Tensor
    kl: torch.Tensor


def forward_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    head: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """Forward KL divergence KL(teacher || student) between two output distributions on one language-model head.

        logits = hidden @ head^T
        loss   = sum_t mask_t * sum_v p_teacher[t, v] * (log p_teacher[t, v] - log p_student[t, v])

    Args:
        student: `[B, T, D]` final hidden states (after the final norm) of the student.
        teacher: `[B, T, D]`, the teacher's, same dtype; no gradient.
        head: `[V, D]`, the output embedding of both, same dtype; frozen, no gradient.
        mask: `[B, T]` bool, the tokens that count. Default None: all.
        reduction: `"mean"` over the tokens that count (0 when there are none) or `"sum"`.
        chunk_size: tokens whose logits exist at a time. Default 1024.

    Returns:
        The loss, a scalar in fp32 (float64 for float64 inputs).

    The log-softmax is in fp32, the products take the inputs' dtype. Only `student` has a gradient; it is computed with the loss,
    chunk by chunk, so that backward needs no second pass over the vocabulary: what is kept is one tensor of `student`'s size.

    Raises:
        ValueError: for a wrong shape, dtype or device, and for a `head` or `teacher` that requires a gradient.

    Examples:
        >>> hidden = torch.randn(1, 5, 8, requires_grad=True)
        >>> head = torch.randn(11, 8)
        >>> bool(forward_kl(hidden, hidden.detach(), head).abs() < 1e-6)
        True
    """
    _check(student, teacher, head, chunk_size)
    check_choice("reduction", reduction, ("mean", "sum"))
    for name, value in (("teacher", teacher), ("head", head)):
        if value.requires_grad and torch.is_grad_enabled():
            fail(name, "must not require a gradient", "requires_grad=True", "Only the student trains")
    if mask is None:
        mask = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)
    check_shape("mask", mask, "B T", {"B": student.shape[0], "T": student.shape[1]})
    check_dtype("mask", mask, torch.bool)
    check_device("mask", mask, student.device, of="student")
    loss = _ForwardKL.apply(student.flatten(0, 1), teacher.flatten(0, 1), head, mask.flatten(), chunk_size)
    return loss / mask.sum().clamp(min=1) if reduction == "mean" else loss


@torch.no_grad()
def token_losses(
    student: torch.Tensor,
    teacher: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> TokenLosses:
    """Cross-entropy and KL(teacher || student) of every position, for evaluation.

    Args:
        student: `[B, T, D]` final hidden states.
        teacher: `[B, T, D]`, same dtype.
        head: `[V, D]`, same dtype.
        targets: `[B, T]` int64, the token that follows each position.
        chunk_size: tokens whose logits exist at a time. Default 1024.

    Returns:
        `TokenLosses(cross_entropy, kl)`, both `[B, T]` in fp32 (float64 for float64 inputs), without gradients.

    Raises:
        ValueError: for a wrong shape, dtype or device.

    Examples:
        >>> hidden, head = torch.randn(1, 5, 8), torch.randn(11, 8)
        >>> losses = token_losses(hidden, hidden, head, torch.zeros(1, 5, dtype=torch.int64))
        >>> losses.cross_entropy.shape, bool((losses.kl.abs() < 1e-6).all())
        (torch.Size([1, 5]), True)
    """
    _check(student, teacher, head, chunk_size)
    check_shape("targets", targets, "B T", {"B": student.shape[0], "T": student.shape[1]})
    check_dtype("targets", targets, torch.int64)
    check_device("targets", targets, student.device, of="student")
    shape = targets.shape
    cross_entropy, kl = [], []
    chunks = (x.flatten(0, 1).split(chunk_size) for x in (student, teacher, targets))
    for s, t, target in zip(*chunks, strict=True):
        logits = matmul(s, head.T)
        cross_entropy.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        kl.append(_rows(logits, matmul(t, head.T), torch.ones_like(target, dtype=torch.bool), head.dtype, grad=False)[0])
    return TokenLosses(torch.cat(cross_entropy).view(shape), torch.cat(kl).view(shape))


class _ForwardKL(torch.autograd.Function):
    """Sum over the masked tokens of the KL; rows are tokens: student, teacher [N, D], mask [N]."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, mask: torch.Tensor, chunk_size: int
    ) -> torch.Tensor:
        needs_grad = ctx.needs_input_grad[0]
        total = None
        grads = []
        for s, t, m in zip(student.split(chunk_size), teacher.split(chunk_size), mask.split(chunk_size), strict=True):
            kl, difference = _rows(matmul(s, head.T), matmul(t, head.T), m, head.dtype, needs_grad)
            total = kl.sum() if total is None else total + kl.sum()
            if needs_grad:
                # [BT, V] @ [V, D] -> [BT, D]
                grads.append(matmul(difference, head).to(student.dtype))
        if needs_grad:
            ctx.save_for_backward(torch.cat(grads))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (d_student,) = ctx.saved_tensors
        # The factor 1/tokens of a mean is applied here, once: before the product it would be rounded with every entry.
        return (grad * d_student).to(d_student.dtype), None, None, None, None


def _rows(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype, grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL [BT] of logits [BT, V], and the gradient p_student - p_teacher of the student's, in `dtype`; 0 where `mask` is False."""
    if student.is_cuda and student.dtype == torch.float32:
        from allmem_ops.training.launch_kl import kl_rows

        return kl_rows(student, teacher, mask, dtype, grad)
    log_s, log_t = torch.log_softmax(student, dim=-1), torch.log_softmax(teacher, dim=-1)
    kl = torch.where(mask, _kl(log_t, log_s), 0.0)
    return kl, torch.where(mask[:, None], log_s.exp_().sub_(log_t.exp_()), 0.0).to(dtype) if grad else None


def _kl(log_t: torch.Tensor, log_s: torch.Tensor) -> torch.Tensor:
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def _check(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, chunk_size: int) -> None:
    known: dict[str, int] = {}
    check_shape("student", student, "B T D", known)
    check_shape("teacher", teacher, "B T D", known)
    check_shape("head", head, "V D", known)
    check_dtype("student", student, MATMUL_DTYPES)
    if student.shape[0] * student.shape[1] == 0:
        fail("student", "must hold at least one token", list(student.shape))
    for name, value in (("teacher", teacher), ("head", head)):
        check_dtype(name, value, student.dtype, "the dtype of `student`")
        check_device(name, value, student.device, of="student")
    check_int("chunk_size", chunk_size, 1)
