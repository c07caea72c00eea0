"""One chunk of `ttt_mlp`, forward and backward, for a batch of memories (README, section Backward).

The memory of one (sequence, head) is one flat row of 3*h*d numbers: Wgate and Wup as [2h, d], then Wdown as [d, h].
`X` counts those rows, (sequence, head) with the head fastest. With D = -G the write reads

    D1 = [e_gate * P * B * S', e_up * P * S]^T K      D2 = V^T (e_down * S * B)      P = V Wdown      M = mu M + clip(D)
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops.ops.precision import matmul


@dataclass(frozen=True)
class Problem:
    """What is the same for every chunk of a call: head width, hidden width, the dtype of q and the options."""

    d: int
    h: int
    dtype: torch.dtype
    chunk_size: int
    norm: str
    residual: bool
    grad_clip: float | None
    eps: float

    @property
    def wide(self) -> torch.dtype:
        """Operands that carry a rate or a gradient: float16 lacks the range for them and is widened."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def matrices(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Views [X, 2h, d] (gate, up) and [X, d, h] (down) of flat rows."""
        cut = 2 * self.h * self.d
        return flat[:, :cut].unflatten(1, (2 * self.h, self.d)), flat[:, cut:].unflatten(1, (self.d, self.h))

    def flat(self, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.cat([gate_up.flatten(1), down.flatten(1)], 1)


# ---- rows: norms over the input dimension


def row_norms(p: Problem, w: Tensor) -> Tensor:
    """|W| by row: [X, 2h + d] (gate, up, down)."""
    gate_up, down = p.matrices(w)
    return torch.cat([torch.linalg.vector_norm(gate_up, dim=-1), torch.linalg.vector_norm(down, dim=-1)], 1)


def scale_rows(p: Problem, w: Tensor, by: Tensor) -> Tensor:
    """Row r of every matrix times by[:, r]."""
    out = torch.empty_like(w)
    for x, y, s in zip(p.matrices(w), p.matrices(out), by.split([2 * p.h, p.d], 1), strict=True):
        torch.mul(x, s.unsqueeze(-1), out=y)
    return out


def shifted(p: Problem, size: Tensor) -> Tensor:
    """|W| + eps; with eps = 0 a zero row stays zero instead of 0 / 0."""
    return size + p.eps if p.eps else size.clamp_min(torch.finfo(size.dtype).tiny)


def normalise(p: Problem, w: Tensor, n: Tensor) -> Tensor:
    """W * N / (|W| + eps)."""
    return scale_rows(p, w, n / shifted(p, row_norms(p, w)))


def normalise_backward(p: Problem, w: Tensor, n: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `w` and `n` of `normalise`; the direction of a zero row has none."""
    size = row_norms(p, w)
    below = shifted(p, size)
    inner = torch.cat([x.sum(-1) for x in p.matrices(w * grad)], 1) / below
    factor = n / below
    along = factor * inner / size.clamp_min(torch.finfo(size.dtype).tiny)
    return scale_rows(p, grad, factor).sub_(scale_rows(p, w, along)), inner


# ---- the recurrence


def write_point(p: Problem, w: Tensor, n: Tensor) -> Tensor:
    """The weights that the gradient of a chunk is taken at and that its momentum is added to."""
    return normalise(p, w, n) if p.norm == "pre_write" else w


def written(p: Problem, at: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """W_j from the write point and M_j."""
    w = at + m
    return normalise(p, w, n) if p.norm == "post_write" else w


def descent(p: Problem, k: Tensor, v: Tensor, eta: Tensor, at: Tensor) -> Tensor:
    """D = -G [X, 3hd] of the tokens k, v [X, c, d], eta [X, c, 3]."""
    gate_up, down = p.matrices(at.to(p.dtype))
    # [X, c, d] @ [X, d, 2h] -> [X, c, 2h];  [X, c, d] @ [X, d, h] -> [X, c, h]
    a, b = matmul(k, gate_up.mT).chunk(2, -1)
    pv = matmul(v, down)
    eta_gate, eta_up, eta_down = eta[..., None, :].unbind(-1)
    s = torch.sigmoid(a)
    silu = s * a
    slope = torch.addcmul(s, silu, 1 - s)
    y = torch.empty((*a.shape[:-1], 2 * p.h), dtype=p.wide, device=k.device)
    torch.mul((pv * b).mul_(slope), eta_gate, out=y[..., : p.h])
    torch.mul(pv.mul_(silu), eta_up, out=y[..., p.h :])
    z = silu.mul_(b).mul_(eta_down).to(p.wide)
    # [X, 2h, c] @ [X, c, d] -> [X, 2h, d];  [X, d, c] @ [X, c, h] -> [X, d, h]
    return p.flat(matmul(y.mT, k.to(p.wide)), matmul(v.to(p.wide).mT, z))


def clip(p: Problem, d: Tensor) -> tuple[Tensor, Tensor | None]:
    """D * min(1, threshold / |D|) for each matrix of each head, and the three norms [X, 3]."""
    if p.grad_clip is None:
        return d, None
    three = d.unflatten(1, (3, -1))
    sizes = torch.linalg.vector_norm(three, dim=-1)
    return (three * (p.grad_clip / sizes).clamp_max(1).unsqueeze(-1)).flatten(1), sizes


def clip_backward(p: Problem, grad: Tensor, clipped: Tensor, sizes: Tensor) -> Tensor:
    """The gradient of D from that of clip(D) = `clipped`: nothing along D where the clip holds."""
    x, c, size = grad.unflatten(1, (3, -1)), clipped.unflatten(1, (3, -1)), sizes.unsqueeze(-1)
    along = (x * c).sum(-1, keepdim=True) / p.grad_clip**2
    return torch.where(size > p.grad_clip, (x - along * c) * (p.grad_clip / size), x).flatten(1)


def read(p: Problem, q: Tensor, w: Tensor) -> Tensor:
    """f(W, Q) [X, c, d] in fp32 for q [X, c, d] and w [X, 3hd] in q's dtype."""
    gate_up, down = p.matrices(w)
    a, b = matmul(q, gate_up.mT).chunk(2, -1)
    o = matmul(torch.nn.functional.silu(a).mul_(b).to(p.dtype), down.mT)
    return o.add_(q) if p.residual else o


def read_backward(p: Problem, q: Tensor, do: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """dQ [X, c, d] and the read's part of dW [X, 3hd], fp32, for q, do [X, c, d] and w [X, 3hd]."""
    q, do = q.to(p.wide), do.to(p.wide)
    gate_up, down = p.matrices(w.to(p.wide))
    a, b = matmul(q, gate_up.mT).chunk(2, -1)
    pq = matmul(do, down)
    s = torch.sigmoid(a)
    silu = s * a
    slope = torch.addcmul(s, silu, 1 - s)
    y = torch.empty((*a.shape[:-1], 2 * p.h), dtype=p.wide, device=q.device)
    torch.mul(slope.mul_(b), pq, out=y[..., : p.h])
    torch.mul(pq, silu, out=y[..., p.h :])
    dq = matmul(y, gate_up)
    dw = p.flat(matmul(y.mT, q), matmul(do.mT, silu.mul_(b).to(p.wide)))
    return (dq.add_(do) if p.residual else dq), dw


class Operands(NamedTuple):
    """The operands of a chunk's second order: what D and the write point multiply with, side by side."""

    k: Tensor  # [X, c, d]
    v: Tensor  # [X, c, d]
    gate_up: Tensor  # [X, 4h, d]: dD1 over the write point's gate and up
    down: Tensor  # [X, d, 2h]: dD2 beside the write point's down


def operands(p: Problem, k: Tensor, v: Tensor, at: Tensor, dd: Tensor) -> Operands:
    gate_up = torch.empty((k.shape[0], 4 * p.h, p.d), dtype=p.wide, device=k.device)
    down = torch.empty((k.shape[0], p.d, 2 * p.h), dtype=p.wide, device=k.device)
    for i, flat in enumerate((dd, at)):
        left, right = p.matrices(flat)
        gate_up[:, 2 * p.h * i : 2 * p.h * (i + 1)] = left
        down[..., p.h * i : p.h * (i + 1)] = right
    return Operands(k.to(p.wide), v.to(p.wide), gate_up, down)


def second_slope(s: Tensor, a: Tensor, silu: Tensor) -> Tensor:
    """SiLU''(A) from s = sigmoid(A) and SiLU(A)."""
    return torch.sub(a, silu, alpha=2).add_(2).mul_(s * (1 - s))


def descent_backward(p: Problem, x: Operands, eta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `descent`: dK, dV [X, c, d], deta [X, c, 3] and that of the write point [X, 3hd], all fp32."""
    # [X, c, d] @ [X, d, 4h] -> [X, c, 4h];  [X, c, d] @ [X, d, 2h] -> [X, c, 2h]
    r_gate, r_up, a, b = matmul(x.k, x.gate_up.mT).chunk(4, -1)
    r_down, pv = matmul(x.v, x.down).chunk(2, -1)
    eta_gate, eta_up, eta_down = eta[..., None, :].unbind(-1)
    s = torch.sigmoid(a)
    silu = s * a
    slope = torch.addcmul(s, silu, 1 - s)
    curve = second_slope(s, a, silu)
    pv_slope, b_slope = pv * slope, b * slope
    y_gate, y_up, z = pv_slope * b, pv * silu, silu * b
    deta = torch.stack([(y_gate * r_gate).sum(-1), (y_up * r_up).sum(-1), (z * r_down).sum(-1)], -1)
    left = torch.empty((*a.shape[:-1], 4 * p.h), dtype=p.wide, device=a.device)
    right = torch.empty((*a.shape[:-1], 2 * p.h), dtype=p.wide, device=a.device)
    torch.mul(y_gate, eta_gate, out=left[..., : p.h])
    torch.mul(y_up, eta_up, out=left[..., p.h : 2 * p.h])
    torch.mul(z, eta_down, out=right[..., : p.h])
    e_gate, e_up, e_down = r_gate * eta_gate, r_up * eta_up, r_down * eta_down
    # the gradients of A, B and P, each into its place beside the factor that multiplies dD
    da = curve.mul_(pv).mul_(b).mul_(e_gate).addcmul_(e_up, pv_slope)
    torch.addcmul(da, e_down, b_slope, out=left[..., 2 * p.h : 3 * p.h])
    torch.addcmul(pv_slope.mul_(e_gate), e_down, silu, out=left[..., 3 * p.h :])
    torch.addcmul(b_slope.mul_(e_gate), e_up, silu, out=right[..., p.h :])
    # [X, c, 4h] @ [X, 4h, d] -> [X, c, d];  [X, c, 2h] @ [X, 2h, d] -> [X, c, d]
    dk, dv = matmul(left, x.gate_up), matmul(right, x.down.mT)
    return dk, dv, deta, p.flat(matmul(left[..., 2 * p.h :].mT, x.k), matmul(x.v.mT, right[..., p.h :]))
