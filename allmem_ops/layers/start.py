"""What a memory starts from: the taps of its convolution, and projections that a pretrained attention lends."""

import torch
from torch import Tensor

from allmem_ops._validation import fail
from allmem_ops.layers.config import AllMemConfig


@torch.no_grad()
def draw_taps(weight: Tensor, qk: int, config: AllMemConfig) -> None:
    """Fill the convolution's taps in place by `config.conv_init` and `config.qk_init`.

    Args:
        weight: [C, K], the channels of q (qk of them), then of k (as many), then of v; the last tap is the current token's.
        qk: channels of q.
    """
    taps, shifted = weight.shape[1], config.qk_init == "shifted"
    v, q, k = weight[2 * qk :], weight[:qk], weight[qk : 2 * qk]
    if config.conv_init in ("uniform", "zero_sum"):
        torch.nn.init.uniform_(weight, -(taps**-0.5), taps**-0.5)
    else:
        weight.zero_()
        weight[:, -1] = 1
    if shifted:  # q keeps the oldest tap free, so that k's can see one token less
        weight[: 2 * qk, 0] = 0
    centred = {"zero_sum": (q, k, v), "token_zero_sum": (q, k)}.get(config.conv_init, ())
    for part in centred:
        seen = part[:, 1:] if shifted and part is not v else part
        if seen.shape[1] > 1:
            seen.sub_(seen.mean(-1, keepdim=True))
    if config.qk_init == "tied":
        k.copy_(q)
    elif shifted:
        k.copy_(q.roll(-1, 1))


@torch.no_grad()
def borrow(weight: Tensor, heads: int, head_dim: int, bases: list[Tensor] | None = None) -> Tensor:
    """The rows of a pretrained projection as rows of `heads` heads of `head_dim`, with the norm that a random start has.

    Args:
        weight: [G, D, d_model], G heads of D rows.
        heads, head_dim: of the memory. Its head i reads the pretrained head i * G // heads.
        bases: per memory head [head_dim, D]: which directions of its D it reads; None: all of them, D = head_dim.

    Returns:
        [heads * head_dim, d_model], float32, each head's rows of norm 1 in the root mean square.
    """
    groups, rows, _ = weight.shape
    if bases is None and rows != head_dim:
        fail("bases", f"must be given where a head has {rows} rows and the memory's {head_dim}", None)
    parts = []
    for i in range(heads):
        part = weight[i * groups // heads].float()
        part = part if bases is None else bases[i].to(part.device) @ part
        parts.append(part / part.norm(dim=-1).square().mean().sqrt())
    return torch.cat(parts)


def draw_bases(heads: int, head_dim: int, rows: int) -> list[Tensor] | None:
    """Per memory head [head_dim, rows] with orthonormal rows (columns where head_dim is the larger); None where both are equal."""
    if rows == head_dim:
        return None
    shape = (max(rows, head_dim), min(rows, head_dim))
    bases = [torch.nn.init.orthogonal_(torch.empty(shape)) for _ in range(heads)]
    return [basis if head_dim > rows else basis.T.contiguous() for basis in bases]
