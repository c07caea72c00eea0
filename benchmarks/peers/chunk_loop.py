"""The SwiGLU memory as a plain PyTorch loop over chunks, in LaCT's form: rows normalised after each write, no residual.

What a researcher writes first, and what `torch.compile` makes of it: the peer of `ttt_mlp(norm="post_write", residual=False)`.
Formulas: arXiv 2505.23884, section 3, with momentum; operands in q's dtype, state in fp32.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu


def chunk_loop(
    q: Tensor, k: Tensor, v: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, eta: Tensor, mu: Tensor, chunk_size: int
) -> Tensor:
    """o [X, T, d] of X independent memories.

    Args:
        q, k, v: [X, T, d], T a multiple of `chunk_size`.
        w_gate, w_up, w_down: [X, h, d], [X, h, d], [X, d, h], fp32.
        eta: [X, T, 3], mu: [X, T], fp32.
    """
    weights = [w_gate, w_up, w_down]
    norms = [w.norm(dim=-1, keepdim=True) for w in weights]
    momentum = [torch.zeros_like(w) for w in weights]
    outputs = []
    for start in range(0, q.shape[1], chunk_size):
        chunk = slice(start, start + chunk_size)
        qc, kc, vc, rates = q[:, chunk], k[:, chunk], v[:, chunk], eta[:, chunk].to(q.dtype)
        gate, up, down = (w.to(q.dtype) for w in weights)
        outputs.append(torch.bmm(silu(torch.bmm(qc, gate.mT)) * torch.bmm(qc, up.mT), down.mT))
        a, b, p = torch.bmm(kc, gate.mT), torch.bmm(kc, up.mT), torch.bmm(vc, down)
        s = torch.sigmoid(a)
        silu_a = a * s
        e_gate, e_up, e_down = rates.unbind(-1)
        descent = (
            torch.bmm((p * b * s * (1 + a * (1 - s)) * e_gate[..., None]).mT, kc),
            torch.bmm((p * silu_a * e_up[..., None]).mT, kc),
            torch.bmm(vc.mT, silu_a * b * e_down[..., None]),
        )
        factor = mu[:, chunk].mean(1)[:, None, None]
        momentum = [factor * m + d for m, d in zip(momentum, descent, strict=True)]
        weights = [w + m for w, m in zip(weights, momentum, strict=True)]
        weights = [n * w / (w.norm(dim=-1, keepdim=True) + 1e-5) for n, w in zip(norms, weights, strict=True)]
    return torch.cat(outputs, 1)
