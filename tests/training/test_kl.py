"""The chunked KL equals the plain one, values and gradient, and never keeps a [T, vocab] tensor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allmem_ops.training import forward_kl, token_losses
from allmem_ops.training import kl as kl_module

PROFILE = settings(derandomize=True, max_examples=20, deadline=None)


def make(batch, time, dim=8, vocab=13, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(batch, time, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    head = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype)
    return student.requires_grad_(), teacher, head


def plain(student, teacher, head, mask=None, reduction="mean"):
    """PyTorch's own KL on full logits; the mask as a selection of rows."""
    log_s, log_t = (torch.log_softmax(x @ head.T, dim=-1) for x in (student, teacher))
    mask = torch.ones(student.shape[:2], dtype=torch.bool) if mask is None else mask
    rows = torch.nn.functional.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)[mask]
    return rows.sum() if reduction == "sum" else rows.mean()


def compare(function, reduction="mean", chunk_size=3, masked=True):
    """True when loss and gradient of `function` equal the plain KL."""
    student, teacher, head = make(2, 7)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    loss = function(student, teacher, head, mask=mask, reduction=reduction, chunk_size=chunk_size)
    expected = plain(student, teacher, head, mask, reduction)
    (got,) = torch.autograd.grad(loss * 1.7, student)
    (want,) = torch.autograd.grad(expected * 1.7, student)
    return torch.allclose(loss, expected, atol=1e-12) and torch.allclose(got, want, atol=1e-12)


@PROFILE
@given(
    reduction=st.sampled_from(["mean", "sum"]),
    chunk_size=st.integers(1, 20),
    masked=st.booleans(),
)
def test_chunked_equals_plain(reduction, chunk_size, masked):
    assert compare(forward_kl, reduction, chunk_size, masked)


@pytest.mark.parametrize("fault", ["zero loss", "zero gradient", "reverse KL", "mask ignored", "gradient sign"])
def test_a_fault_is_found(fault, monkeypatch):
    assert compare(forward_kl)
    if fault == "zero loss":
        faulted = lambda *a, **k: forward_kl(*a, **k) * 0  # noqa: E731
    elif fault == "zero gradient":
        faulted = lambda *a, **k: forward_kl(*a, **k).detach() + 0 * a[0].sum()  # noqa: E731
    elif fault == "mask ignored":
        faulted = lambda *a, **k: forward_kl(*a, **(k | {"mask": None}))  # noqa: E731
    elif fault == "gradient sign":
        faulted = lambda s, *a, **k: (lambda loss: 2 * loss.detach() - loss)(forward_kl(s, *a, **k))  # noqa: E731
    else:
        monkeypatch.setattr(kl_module, "_kl", lambda log_t, log_s: (log_s.exp() * (log_s - log_t)).sum(-1))
        faulted = forward_kl
    assert not compare(faulted)


def test_gradcheck():
    student, teacher, head = make(1, 5)
    mask = torch.tensor([[True, False, True, True, False]])
    torch.autograd.gradcheck(lambda s: forward_kl(s, teacher, head, mask=mask, chunk_size=2), (student,))


def test_masked_rows_neither_count_nor_poison():
    student, teacher, head = make(1, 4)
    with torch.no_grad():
        student[0, 2] = float("nan")
    mask = torch.tensor([[True, True, False, True]])
    loss = forward_kl(student, teacher, head, mask=mask)
    (grad,) = torch.autograd.grad(loss, student)
    keep = torch.tensor([0, 1, 3])
    assert torch.allclose(loss, plain(student[:, keep], teacher[:, keep], head))
    assert torch.isfinite(grad).all() and (grad[0, 2] == 0).all() and (grad[0, 3] != 0).any()


def test_an_empty_mask_gives_zero():
    student, teacher, head = make(1, 4)
    assert forward_kl(student, teacher, head, mask=torch.zeros(1, 4, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs_give_an_fp32_loss(dtype):
    student, teacher, head = make(2, 9, dtype=dtype)
    loss = forward_kl(student, teacher, head, chunk_size=4)
    (grad,) = torch.autograd.grad(loss, student)
    exact_student = student.detach().double().requires_grad_()
    exact = plain(exact_student, teacher.double(), head.double())
    (exact_grad,) = torch.autograd.grad(exact, exact_student)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    # The products are exact in fp32, so the loss is far better than the inputs' dtype; the gradient is rounded to it.
    assert abs(loss.item() - exact.item()) < 1e-5 * exact.item()
    assert (grad.double() - exact_grad).abs().max() <= 4 * torch.finfo(dtype).eps * exact_grad.abs().max()


def test_no_full_logits_are_kept_for_backward():
    student, teacher, head = make(1, 64, vocab=512)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        forward_kl(student, teacher, head, chunk_size=16)
    assert saved and max(saved) <= student.numel()


def test_token_losses_equal_plain_and_their_mean_is_the_loss():
    student, teacher, head = make(2, 7)
    targets = torch.randint(0, 13, (2, 7), generator=torch.Generator().manual_seed(2))
    losses = token_losses(student, teacher, head, targets, chunk_size=4)
    expected = torch.nn.functional.cross_entropy((student @ head.T).flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    assert torch.allclose(losses.cross_entropy, expected) and not losses.kl.requires_grad
    assert torch.allclose(losses.kl.mean(), forward_kl(student, teacher, head))
    assert (losses.kl > 0).all()
    assert not torch.allclose(losses.cross_entropy.roll(1, 1), expected)


def test_token_losses_on_a_gpu_equal_those_in_float64(device):
    student, teacher, head = (x.detach() for x in make(2, 7, vocab=5000))
    targets = torch.randint(0, 5000, (2, 7), generator=torch.Generator().manual_seed(2))
    expected = token_losses(student, teacher, head, targets)
    found = token_losses(*(x.float().to(device) for x in (student, teacher, head)), targets.to(device), chunk_size=4)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(2, 6, 8, dtype=torch.float64)}, r"`teacher` must have shape \[B, T, D\] with T=7; got \[2, 6, 8\]"),
        ({"head": torch.zeros(13, 9, dtype=torch.float64)}, r"`head` must have shape \[V, D\] with D=8; got \[13, 9\]"),
        ({"head": torch.zeros(13, 8)}, r"`head` must have dtype float64 \(the dtype of `student`\); got float32"),
        ({"mask": torch.ones(2, 7)}, "`mask` must have dtype bool; got float32"),
        ({"reduction": "none"}, "`reduction` must be one of 'mean', 'sum'; got 'none'"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1; got 0"),
        ({"teacher": torch.zeros(2, 7, 8, dtype=torch.float64, requires_grad=True)}, "`teacher` must not require a gradient"),
    ],
)
def test_bad_arguments_are_named(change, message):
    student, teacher, head = make(2, 7)
    arguments = {"student": student, "teacher": teacher, "head": head} | change
    with pytest.raises(ValueError, match=message):
        forward_kl(**arguments)
