"""The error budget that every implementation is judged by.

    error <= 2 * (error of the same computation in plain PyTorch at that precision + band)

both against the fp64 reference, in the largest and in the root-mean-square element; band = eps of the
compared dtype times the largest |fp64| value. A zeroed tensor fails unless the fp64 tensor is zero.
"""

import torch


def _error(x: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    diff = (x.double() - exact).abs()
    return (diff.max().item(), diff.square().mean().sqrt().item()) if diff.numel() else (0.0, 0.0)


def assert_within_budget(name: str, got: torch.Tensor, low: torch.Tensor, exact: torch.Tensor) -> None:
    """Fail unless `got` is as good as `low` (plain PyTorch at `got`'s precision), both against `exact` (fp64).

    Compare memories as `o - q`: the residual is larger than the part under test.
    """
    got, low, exact = got.detach().cpu(), low.detach().cpu(), exact.detach().cpu()
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    assert exact.dtype == torch.float64, f"{name}: the reference must be float64, got {exact.dtype}"
    bad = ~torch.isfinite(got)
    assert not bad.any(), f"{name}: {int(bad.sum())} of {got.numel()} elements are not finite, first at {bad.nonzero()[0].tolist()}"
    band = torch.finfo(got.dtype).eps * (exact.abs().max().item() if exact.numel() else 0.0)
    for kind, error, allowed in zip(("max", "rms"), _error(got, exact), _error(low, exact), strict=True):
        if error > 2 * (allowed + band):
            diff = (got.double() - exact).abs()
            where = [int(i) for i in torch.unravel_index(diff.argmax(), diff.shape)]
            raise AssertionError(
                f"{name}: {kind} error {error:.3e} exceeds 2 * ({allowed:.3e} + {band:.3e}); largest at {where}: "
                f"got {got[tuple(where)].item():.6e}, exact {exact[tuple(where)].item():.6e}"
            )


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """|got - exact| / |exact| (Frobenius); infinite for a non-zero `got` where `exact` is zero."""
    exact = exact.detach().double()
    diff = (got.detach().double() - exact).norm().item()
    norm = exact.norm().item()
    return diff / norm if norm else (0.0 if diff == 0 else float("inf"))
