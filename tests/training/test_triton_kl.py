"""The KL kernel, in the interpreter or on a GPU: values and gradient against float64, masks, strides, determinism, and faults."""

import pytest
import torch

from allmem_ops.testing import assert_within_budget
from allmem_ops.training import forward_kl
from allmem_ops.training import kl as kl_module
from allmem_ops.training.launch_kl import kl_rows

CUDA = torch.cuda.is_available()
SIZES = [(12, 13), (12, 4096), (8, 9001)] + ([(1024, 49152)] if CUDA else [])


def logits(tokens, vocab, device, seed=0):
    """Student and teacher rows as they come: a common offset, a few likely tokens, not far from one another."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(tokens, vocab, generator=generator) - 20
    student = teacher + 0.3 * torch.randn(tokens, vocab, generator=generator)
    return student.to(device), teacher.to(device)


def plain(student, teacher, mask, dtype):
    log_s, log_t = (torch.log_softmax(x.to(dtype), -1) for x in (student, teacher))
    kl = torch.where(mask, (log_t.exp() * (log_t - log_s)).sum(-1), 0.0)
    return kl, torch.where(mask[:, None], log_s.exp() - log_t.exp(), 0.0)


def check(function, tokens, vocab, device):
    student, teacher = logits(tokens, vocab, device)
    mask = torch.arange(tokens, device=device) % 3 != 1
    got = function(student, teacher, mask, torch.float32, True)
    for name, value, exact, same in zip(
        ("kl", "gradient"), got, plain(student, teacher, mask, torch.float64), plain(student, teacher, mask, torch.float32), strict=True
    ):
        assert_within_budget(name, value, same, exact)


@pytest.mark.parametrize(("tokens", "vocab"), SIZES)
def test_values_and_gradient_within_the_budget(device, tokens, vocab):
    check(kl_rows, tokens, vocab, device)


@pytest.mark.parametrize("fault", ["zero kl", "zero gradient", "swapped", "unmasked"])
def test_a_fault_is_found(device, fault):
    def faulted(student, teacher, mask, dtype, grad):
        if fault == "swapped":
            return kl_rows(teacher, student, mask, dtype, grad)
        if fault == "unmasked":
            return kl_rows(student, teacher, torch.ones_like(mask), dtype, grad)
        kl, d = kl_rows(student, teacher, mask, dtype, grad)
        return (kl * 0, d) if fault == "zero kl" else (kl, d * 0)

    with pytest.raises(AssertionError):
        check(faulted, 3, 50, device)


def test_masked_rows_may_hold_anything_and_rows_any_stride(device):
    student, teacher = logits(4, 40, device)
    mask = torch.tensor([True, False, True, True], device=device)
    want = kl_rows(student, teacher, mask, torch.float32, True)
    wide = torch.full((4, 70), float("nan"), device=device)
    wide[:, :40] = student
    wide[1] = float("nan")
    got = kl_rows(wide[:, :40], teacher, mask, torch.float32, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[0][1] == 0 and (got[1][1] == 0).all()
    none = kl_rows(student, teacher, mask, torch.float32, False)
    assert torch.equal(none[0], want[0]) and none[1].numel() == 0


def test_two_runs_are_bitwise_equal(device):
    student, teacher = logits(3, 777, device)
    mask = torch.ones(3, dtype=torch.bool, device=device)
    first, second = (kl_rows(student, teacher, mask, torch.float16, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_loss_takes_it_and_agrees_with_the_plain_path(device, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    student, teacher, head = (torch.randn(*shape, generator=generator).to(device) for shape in ((2, 5, 8), (2, 5, 8), (30, 8)))
    mask = torch.rand(2, 5, generator=generator).to(device) < 0.7
    results = []
    for rows in (kl_module._rows, kl_rows):
        monkeypatch.setattr(kl_module, "_rows", rows)
        x = student.clone().requires_grad_()
        loss = forward_kl(x, teacher, head, mask=mask, chunk_size=4)
        results.append((loss, *torch.autograd.grad(loss, x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.skipif(not CUDA, reason="bfloat16 needs a GPU")
def test_a_whole_loss_in_bfloat16_on_a_gpu(device):
    student, teacher, head = (torch.randn(*shape, device=device).bfloat16() for shape in ((2, 700, 576), (2, 700, 576), (49152, 576)))
    student.requires_grad_()
    loss = forward_kl(student, teacher, head * 0.05)
    (grad,) = torch.autograd.grad(loss, student)
    x = student.detach().double().requires_grad_()
    w = (head * 0.05).double()
    log_s, log_t = (torch.log_softmax(y.flatten(0, 1) @ w.T, -1) for y in (x, teacher.double()))
    exact = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    (want,) = torch.autograd.grad(exact, x)
    assert abs(loss.item() - exact.item()) < 1e-5 * exact.item()
    assert (grad.double() - want).abs().max() <= 0.02 * want.abs().max()
