"""What a memory starts from: the taps of its convolution, and projections that a pretrained attention lends."""

from collections.abc import Sequence

import torch
from torch import Tensor

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
def lend(rows: Sequence[Tensor], out: Tensor, config: AllMemConfig, heads: int, weights: Sequence[Tensor], head_dim: int) -> None:
    """Overwrite a memory's projections with those of a pretrained attention, by `config.projection_init`; each keeps a random start's norm.

    A memory head stands for HQ / H query heads (for one where H is larger) and their key/value head. "values": v from the value projection,
    the output projection from its own, summed over those query heads. "attention": also k, and q as their mean; with `qk_init` "tied" or
    "shifted" both are k's. "random": nothing.

    Args:
        rows: the memory's weights of q, k and v, [heads * d, d_model] each.
        out: its output projection, [d_model, heads * d of v].
        heads: H.
        weights: the attention's q [HQ*D, d_model], k and v [HK*D, d_model], o [d_model, HQ*D].
        head_dim: D. A memory head of another width reads as many random directions of its head, or all of them in a wider space.
    """
    if config.projection_init == "random":
        return
    q, k, v, o = (weight.float().view(-1, head_dim, out.shape[0]) for weight in (*weights[:3], weights[3].float().T.contiguous()))
    queries = [range(i * len(q) // heads, max(i * len(q) // heads + 1, (i + 1) * len(q) // heads)) for i in range(heads)]
    group = [own[0] * len(k) // len(q) for own in queries]
    bases = _bases(heads, rows[2].shape[0] // heads, head_dim, v.device)
    rows[2].copy_(_borrow(v[group], bases))
    # an output projection's columns have norm sqrt(d_model / H*d)
    out.copy_(_borrow(torch.stack([o[list(own)].sum(0) for own in queries]), bases).T * (out.shape[0] / out.shape[1]) ** 0.5)
    if config.projection_init == "attention":
        bases = _bases(heads, rows[1].shape[0] // heads, head_dim, v.device)
        rows[1].copy_(_borrow(k[group], bases))
        means = torch.stack([q[list(own)].mean(0) for own in queries])
        rows[0].copy_(rows[1] if config.qk_init != "independent" else _borrow(means, bases))


def _bases(heads: int, width: int, rows: int, device: torch.device) -> Tensor:
    """[heads, width, rows]: which directions of a pretrained head a memory head reads; orthonormal rows, or columns where width > rows."""
    if width == rows:
        return torch.eye(rows, device=device).expand(heads, rows, rows)
    shape = (max(rows, width), min(rows, width))
    bases = torch.stack([torch.nn.init.orthogonal_(torch.empty(shape)) for _ in range(heads)]).to(device)
    return bases if width > rows else bases.mT


def _borrow(weight: Tensor, bases: Tensor) -> Tensor:
    """[heads, D, d_model] -> [heads * width, d_model], each head's rows of norm 1 in the root mean square."""
    parts = bases @ weight
    return (parts / parts.square().sum(-1).mean(-1)[:, None, None].sqrt()).flatten(0, 1)


@torch.no_grad()
def rotate_rows(weight: Tensor, inv_freq: Tensor, distance: float) -> Tensor:
    """Rows [HQ*D, d_model] of a query projection, turned by RoPE (half-and-half layout) as for a key `distance` tokens back.

    With them a product of unrotated query and key is the pretrained attention's at that distance, at every distance: content alone counts.
    """
    D = 2 * inv_freq.shape[0]
    angles = torch.cat([inv_freq, inv_freq]).to(weight.device).double() * distance
    first, second = weight.view(-1, D, weight.shape[-1]).chunk(2, 1)
    turned = torch.cat([-second, first], 1)
    cos, sin = (t.to(weight.dtype)[:, None] for t in (angles.cos(), angles.sin()))
    return (weight.view(-1, D, weight.shape[-1]) * cos + turned * sin).flatten(0, 1)
