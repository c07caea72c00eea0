"""A linear memory in AllMem's place: the gated delta rule, with the same path around it and as many parameters.

A peer for comparison. Its layer stands where `MemoryBranch` stands and trains by the same recipe: `use_linear_memory(model)` after
`convert`, then everything that works on a converted model works on it (`trainable_parameters`, `save_memory`, the cache).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allmem_ops._validation import check_choice, fail
from allmem_ops.hf.checkpoint import read_tensors
from allmem_ops.hf.convert import FAR, pretrained_weights
from allmem_ops.hf.runtime import runtime_of
from allmem_ops.layers.config import AllMemConfig
from allmem_ops.layers.memory import MemoryBranch
from allmem_ops.layers.start import draw_taps, lend
from allmem_ops.layers.state_group import StateGroup
from allmem_ops.ops.memory_input.state import ConvTail
from allmem_ops.ops.state import RowState

CHUNK = 64
RETENTION = (100.0, 10_000.0)  # tokens after which a head's state has fallen to 1/e at the start: from the first head to the last


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;  o_t = S_t q_t, chunk by chunk; a_t = exp(log_decay_t).

    Args:
        q, k: [B, T, H, K], unit vectors. v: [B, T, H, V].
        log_decay, beta: [B, T, H].
        state: [B, H, K, V] in float32, S transposed; None: zeros.
        impl: "fla": fla-core's kernels (CUDA); "chunk": PyTorch; "auto": fla where it is installed and the tensors are on CUDA.

    Returns:
        o [B, T, H, V] in `v`'s dtype, and the state after the last token.

    Raises:
        ImportError: impl="fla" without fla-core.
    """
    check_choice("impl", impl, ("auto", "fla", "chunk"))
    if impl == "fla" or (impl == "auto" and q.is_cuda and _fla_is_installed()):
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        except ImportError as error:
            raise ImportError("the linear memory's kernels need fla-core: pip install fla-core") from error
        dtype = q.dtype if q.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        q_, k_, v_ = (x.to(dtype) for x in (q, k, v))
        o, after = chunk_gated_delta_rule(
            q_, k_, v_, g=log_decay.float(), beta=beta.to(dtype), scale=1.0, initial_state=state, output_final_state=True
        )
        return o.to(v.dtype), after
    return _chunk_gated_delta_rule(q, k, v, log_decay, beta, state)


@cache
def _fla_is_installed() -> bool:
    return find_spec("fla") is not None


def _chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a chunk writes follows from one triangular solve; the chunks are linked by a loop over the state."""
    B, T, H, K = q.shape
    V, dtype = v.shape[-1], v.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    padding = -T % CHUNK  # beta = 0 and a = 1: a padded token changes nothing

    def cut(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, N, CHUNK, ...]
        x = F.pad(x.to(work), (0, 0) * (x.dim() - 2) + (0, padding))
        return x.unflatten(1, (-1, CHUNK)).movedim(3, 1)

    q, k, v = cut(q), cut(k), cut(v)
    g, beta = cut(log_decay).cumsum(-1), cut(beta)
    decay = (g[..., :, None] - g[..., None, :]).tril().exp().tril()  # [.., CHUNK, CHUNK]: from token j to token i >= j
    keys = k * beta[..., None]
    # (I + tril(diag(beta) k k^T * decay, -1)) u = beta v: each write corrects what the ones before it have stored
    system = (keys @ k.mT * decay).tril(-1) + torch.eye(CHUNK, dtype=work, device=q.device)
    right = torch.cat([v * beta[..., None], keys * g.exp()[..., None]], -1)
    u, w = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split([V, K], -1)
    scores = (q @ k.mT) * decay
    read = q * g.exp()[..., None]
    to_end = (g[..., -1:] - g).exp()[..., None] * k
    S = q.new_zeros(B, H, K, V) if state is None else state.to(work)
    outputs = []
    for i in range(g.shape[2]):
        # [CHUNK, K] @ [K, V] -> [CHUNK, V]
        written = u[:, :, i] - w[:, :, i] @ S
        outputs.append(read[:, :, i] @ S + scores[:, :, i] @ written)
        S = g[:, :, i, -1].exp()[..., None, None] * S + to_end[:, :, i].mT @ written
    o = torch.stack(outputs, 2).flatten(2, 3)[:, :, :T].transpose(1, 2)
    return o.to(dtype), S


@dataclass(eq=False)
class LinearState(RowState):
    """S of each sequence, [N, H, K, V] in float32."""

    S: Tensor

    def check(self) -> None:
        if self.S.dim() != 4:
            fail("S", "must have shape [N, H, K, V]", list(self.S.shape))

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Forget the given sequences, or all of them."""
        if rows is None:
            self.S.zero_()
        else:
            self.S.index_fill_(0, self.row_index("rows", rows), 0)


@dataclass(eq=False)
class LinearBranchState(StateGroup):
    """What one `LinearBranch` carries from token to token."""

    memory: LinearState
    conv: ConvTail


class LinearBranch(nn.Module):
    """`MemoryBranch` with the gated delta rule for its memory: the same projections, convolution, norms, gate and alpha.

    The parameters that AllMem has in its initial weights go into wider values, so that both have as many (to about 1 %).

    Args:
        d_model: width of the hidden state.
        config: of the memory whose place it takes: heads, head_dim, convolution and the start of q, k and taps.
        heads: where `config.heads` is None.
        device: of the parameters, which are float32.
    """

    def __init__(self, d_model: int, config: AllMemConfig, *, heads: int | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        H = config.heads if config.heads is not None else heads
        K = config.head_dim
        V = K + round(3 * config.hidden * K / (2 * d_model + config.conv_size) / 8) * 8
        self.d_model, self.config, self.shape, self.writes = d_model, config, (H, K, V), True
        self.splits = [2 * H * K + H * V, H, H, H]  # q, k, v; decay, beta, gate

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device))

        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=False, device=device)
        self.head_bias = parameter(3 * H)
        self.conv_weight = parameter(self.splits[0], config.conv_size)
        self.q_norm, self.k_norm = parameter(K), parameter(K)
        self.readout_norm = parameter(V)
        self.out_proj = nn.Linear(H * V, d_model, bias=False, device=device)
        self.alpha = parameter(d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, as `MemoryBranch` does; a head's decay starts at its share of `RETENTION`, beta at 1/2."""
        H, K, _ = self.shape
        nn.init.normal_(self.in_proj.weight, std=self.d_model**-0.5)
        self.in_proj.weight[self.splits[0] :].zero_()
        self.head_bias.zero_()
        rates = torch.logspace(*(-math.log10(x) for x in RETENTION), H)
        self.head_bias[:H] = torch.log(torch.expm1(rates)).to(self.head_bias.device)
        draw_taps(self.conv_weight, H * K, self.config)
        if self.config.qk_init != "independent":
            self.in_proj.weight[H * K : 2 * H * K].copy_(self.in_proj.weight[: H * K])
        for norm in (self.q_norm, self.k_norm, self.readout_norm):
            norm.fill_(1)
        nn.init.normal_(self.out_proj.weight, std=self.out_proj.in_features**-0.5)
        self.alpha.zero_()

    def start_from(self, weights: Sequence[Tensor], *, head_dim: int) -> None:
        """As `MemoryBranch.start_from`."""
        H, K, V = self.shape
        rows = self.in_proj.weight.data[: self.splits[0]].split([H * K, H * K, H * V])
        lend(rows, self.out_proj.weight.data, self.config, H, weights, head_dim)

    def initial_state(self, batch: int, dtype: torch.dtype = torch.float32) -> LinearBranchState:
        """The state of `batch` sequences that have not begun; `dtype` is that of the activations to come."""
        device = self.alpha.device
        memory = LinearState(torch.zeros(batch, *self.shape, device=device))
        return LinearBranchState(memory, ConvTail.zeros(batch, self.splits[0], self.config.conv_size, dtype=dtype, device=device))

    def forward(
        self,
        x: Tensor,
        attn: Tensor | None = None,
        *,
        state: LinearBranchState | None = None,
        cu_seqlens: Tensor | None = None,
        active: Tensor | None = None,
        overwrite_attn: bool = False,  # noqa: ARG002 - the hook of a converted model passes it
    ) -> Tensor:
        """attn + alpha * Linear_out(readout), [B, T, d_model]; without `attn`, the unscaled Linear_out(readout).

        Args:
            active: bool [B], with a state: the other rows' state stays and they get `attn` (zeros without it).

        Raises:
            NotImplementedError: packed sequences.
        """
        if cu_seqlens is not None:
            raise NotImplementedError("the linear memory reads whole rows only: no packed sequences, no padded prompts")
        if active is not None and not active.all():
            return self._some(x, attn, state, active)
        H, K, V = self.shape
        wide, heads = F.linear(x, self.in_proj.weight.to(x.dtype)).split([self.splits[0], 3 * H], -1)
        before = x.new_zeros(x.shape[0], self.config.conv_size - 1, wide.shape[-1]) if state is None else state.conv.inputs.to(x.dtype)
        wide = torch.cat([before, wide], 1)
        if state is not None:
            state.conv.inputs.copy_(wide[:, wide.shape[1] - before.shape[1] :])
        mixed = F.conv1d(wide.mT, self.conv_weight[:, None].to(x.dtype), groups=wide.shape[-1]).mT
        q, k, v = (part.unflatten(-1, (H, -1)) for part in mixed.split([H * K, H * K, H * V], -1))
        v = F.silu(v)
        if self.config.qk_activation == "silu":
            q, k = F.silu(q), F.silu(k)
        q, k = (F.normalize(F.rms_norm(y.float(), (K,), w, self.config.norm_eps), dim=-1) for y, w in ((q, self.q_norm), (k, self.k_norm)))
        decay, beta, gate = (heads.float() + self.head_bias).chunk(3, -1)
        beta = beta.sigmoid() if self.writes else torch.zeros_like(beta)
        o, after = gated_delta_rule(q.to(x.dtype), k.to(x.dtype), v, -F.softplus(decay), beta, None if state is None else state.memory.S)
        if state is not None:
            state.memory.S.copy_(after)
        readout = F.rms_norm(o.float(), (V,), self.readout_norm, self.config.norm_eps) * gate.sigmoid()[..., None]
        out = F.linear(readout.flatten(2).to(x.dtype), self.out_proj.weight.to(x.dtype))
        return out if attn is None else attn + (self.alpha * out).to(attn.dtype)

    def _some(self, x: Tensor, attn: Tensor | None, state: LinearBranchState, active: Tensor) -> Tensor:
        """The active rows on their own."""
        rows = active.nonzero()[:, 0]
        part = state.index_select(rows)
        out = torch.zeros_like(x) if attn is None else attn.clone()
        if len(rows):
            out[rows] = self(x[rows], None if attn is None else attn[rows], state=part)
            state.copy_(rows, part, torch.arange(len(rows), device=rows.device))
        return out


def linear_branches(model: Any) -> list[LinearBranch]:
    """New linear memories for a converted model, one a layer that has a memory."""
    runtime, found = runtime_of(model), []
    for a in runtime.attentions(model):
        if hasattr(a, "memory"):
            heads, device = model.config.num_key_value_heads, a.memory.alpha.device
            found.append(LinearBranch(a.memory.d_model, runtime.config, heads=heads, device=device))
            weights = pretrained_weights(a, runtime.inv_freq(runtime.decoder(model)), FAR * runtime.config.window)
            found[-1].start_from(weights, head_dim=a.head_dim)
    return found


def use_linear_memory(model: Any) -> Any:
    """Put new linear memories in the place of a converted model's memories, in place; the same model."""
    branches = iter(linear_branches(model))
    for attention in runtime_of(model).attentions(model):
        if isinstance(getattr(attention, "memory", None), MemoryBranch):
            attention.memory = next(branches).train(model.training)
    return model


def load_linear(model: Any, directory: str | os.PathLike[str]) -> list[LinearBranch]:
    """The branches that `save_memory` wrote for a model of `use_linear_memory`; the model stays as it is.

    Raises:
        ValueError: files that are missing or damaged, another base model, or a checkpoint of another memory.
    """
    _, tensors = read_tensors(model, directory)
    branches = linear_branches(model)
    runtime = runtime_of(model)
    layers = [i for i, a in enumerate(runtime.attentions(model)) if hasattr(a, "memory")]
    family = runtime.family
    left = set(tensors)
    for layer, branch in zip(layers, branches, strict=True):
        prefix = f"{family.decoder}.{family.layers}.{layer}.{family.attention}.memory"
        for name, p in branch.named_parameters():
            full = f"{prefix}.{name}"
            if full not in tensors or tensors[full].shape != p.shape:
                fail("directory", f"must hold a linear memory with {full} of shape {list(p.shape)}", f"none in {directory}")
            p.data.copy_(tensors[full])
            left.discard(full)
    if left:
        fail("directory", "must hold a linear memory of the model's layers", f"{len(left)} other tensors, the first {min(left)}")
    return branches
