"""`MemoryBranch`: the whole path around the memory, from the hidden state to what is added to attention's output."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from allmem_ops._impl import resolve_impl
from allmem_ops._validation import check_bool, check_cu_seqlens, check_device, check_dtype, check_int, check_shape, fail
from allmem_ops.layers.branch import BranchParameters, branch, branch_options, branch_readout, kernels_take
from allmem_ops.layers.config import AllMemConfig
from allmem_ops.layers.start import draw_taps, lend
from allmem_ops.layers.state_group import StateGroup
from allmem_ops.ops.eager import direct
from allmem_ops.ops.fusion.api import gated_fusion
from allmem_ops.ops.memory_input.api import MemoryInput, memory_input, memory_input_step
from allmem_ops.ops.memory_input.state import ConvTail
from allmem_ops.ops.ttt_mlp.api import ttt_mlp, ttt_mlp_step
from allmem_ops.ops.ttt_mlp.state import MemoryState

STEP_TOKENS = 256  # the longest segment that `ttt_mlp_step` and `memory_input_step` take


@dataclass(eq=False)
class MemoryBranchState(StateGroup):
    """What one `MemoryBranch` carries from token to token, for N sequences: constant bytes.

    Args:
        memory: weights, momentum and the open chunk.
        conv: the convolution's tail.
        started: whether a token was read; until then gradients reach the initial weights as without a state.
    """

    memory: MemoryState
    conv: ConvTail
    started: bool = False

    def copy_(self, rows: Tensor | Sequence[int], other: "MemoryBranchState", other_rows: Tensor | Sequence[int]) -> "MemoryBranchState":
        """Overwrite row `rows[i]` with row `other_rows[i]` of `other`, in place."""
        super().copy_(rows, other, other_rows)
        self.started |= other.started
        return self

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Back to the initial weights, for the given sequences or for all."""
        super().reset(rows)
        self.started &= rows is not None


class MemoryBranch(nn.Module):
    """The memory of one layer with the path around it (spec, "Path around the memory"; arXiv 2602.13680).

        q, k, v = SiLU(conv(Linear(x)));  q, k: RMSNorm per head, then L2 norm per head
        r = ttt_mlp(q, k, v, w_gate, w_up, w_down, softplus(Linear(x)), sigmoid(Linear(x)))
        y = attn + alpha * Linear_out(sigmoid(Linear_gate(x)) * RMSNorm_per_head(r))

    Usable in any architecture: it needs the hidden state that attention receives and, to add to, attention's output.
    alpha starts at zero, so a new branch returns `attn` bit for bit. Parameters may stay float32 while activations
    are bfloat16: projections run in the activations' dtype, rates, gates, norms and the memory's state in fp32.

    Args:
        d_model: width of the hidden state.
        config: shape and rules; `config.window` and `config.sinks` are attention's business and not read here.
        heads: memory heads H where `config.heads` is None.
        device, dtype: of the parameters; float32 by default.

    Attributes:
        in_proj: weight [3*H*d + H*5, d_model] (q, k, v, then eta of gate/up/down, mu, gate logits; a gate per channel
            has H*d rows, none has no rows); head_bias is the bias of the rows after v.
        writes: False runs the memory with eta = 0: an adapter that never learns from the text.
        recompute: True keeps nothing between forward and backward but `x` and `attn`, and computes the branch once more in backward; calls
            with a state keep everything all the same (its state has moved on by then).

    Example:
        >>> branch = MemoryBranch(64, AllMemConfig(heads=2, head_dim=16, chunk_size=8))
        >>> x, attn = torch.randn(1, 20, 64), torch.randn(1, 20, 64)
        >>> torch.equal(branch(x, attn), attn)  # alpha = 0
        True
        >>> state = branch.initial_state(batch=1)
        >>> parts = [branch(piece, state=state) for piece in x.split([13, 7], dim=1)]
        >>> torch.allclose(torch.cat(parts, 1), branch(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        d_model: int,
        config: AllMemConfig,
        *,
        heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_int("d_model", d_model, 1)
        if not isinstance(config, AllMemConfig):
            fail("config", "must be an AllMemConfig", type(config).__name__)
        heads = config.heads if config.heads is not None else heads
        if heads is None:
            fail("heads", "must be given where `config.heads` is None", None)
        check_int("heads", heads, 1)
        self.d_model, self.config, self.heads = d_model, config, heads
        self.writes, self.recompute = True, False
        d, h = config.head_dim, config.hidden
        gates = {"head": heads, "channel": heads * d, "none": 0}[config.gate]
        self.splits = [3 * heads * d, 3 * heads, heads, gates]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))

        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=False, device=device, dtype=dtype)
        self.head_bias = parameter(sum(self.splits[1:]))
        self.conv_weight = parameter(3 * heads * d, config.conv_size)
        self.q_norm = parameter(d) if config.qk_norm in ("rms+l2", "rms") else None
        self.k_norm = parameter(d) if config.qk_norm in ("rms+l2", "rms") else None
        self.w_gate, self.w_up = parameter(heads, h, d), parameter(heads, h, d)
        self.w_down = parameter(heads, d, h)
        self.readout_norm = parameter(d) if config.readout_norm else None
        self.out_proj = nn.Linear(heads * d, d_model, bias=False, device=device, dtype=dtype)
        self.alpha = parameter(d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew; alpha, the heads' weights and biases and the norms take their start values."""
        config, bias = self.config, self.head_bias
        nn.init.normal_(self.in_proj.weight, std=self.d_model**-0.5)
        self.in_proj.weight[self.splits[0] :].zero_()
        eta_rows = self.splits[1]
        bias[:eta_rows] = math.log(math.expm1(config.eta_init))
        bias[eta_rows : eta_rows + self.heads] = math.log(config.mu_init / (1 - config.mu_init))
        bias[eta_rows + self.heads :] = math.log(config.gate_init / (1 - config.gate_init))
        draw_taps(self.conv_weight, self.splits[0] // 3, config)
        if config.qk_init != "independent":
            q, k = self.in_proj.weight[: 2 * self.splits[0] // 3].chunk(2)
            k.copy_(q)
        for norm in (self.q_norm, self.k_norm, self.readout_norm):
            if norm is not None:
                norm.fill_(1)
        for weight in (self.w_gate, self.w_up, self.w_down):
            nn.init.normal_(weight, std=config.w_init_scale * weight.shape[-1] ** -0.5)
        if config.feature_init == "equal":
            self.w_up.copy_(self.w_gate)
        nn.init.normal_(self.out_proj.weight, std=self.out_proj.in_features**-0.5)
        self.alpha.zero_()

    def start_from(self, weights: Sequence[Tensor], *, head_dim: int) -> None:
        """Take projections from a pretrained attention, by `config.projection_init` (see `layers.start.lend`).

        Args:
            weights: q, k, v and output projection, [HQ*head_dim, d_model], twice [HK*head_dim, d_model], [d_model, HQ*head_dim].
            head_dim: of the attention.
        """
        rows = self.in_proj.weight.data[: self.splits[0]].chunk(3)
        lend(rows, self.out_proj.weight.data, self.config, self.heads, weights, head_dim)

    def initial_state(self, batch: int, dtype: torch.dtype = torch.float32) -> MemoryBranchState:
        """The state of `batch` sequences that have not begun; `dtype` is that of the activations to come."""
        check_int("batch", batch, 1)
        config = self.config
        memory = MemoryState.initial(
            self.w_gate.detach(),
            self.w_up.detach(),
            self.w_down.detach(),
            batch=batch,
            dtype=dtype,
            **self._memory_options(),
        )
        tail = ConvTail.zeros(batch, self.splits[0], config.conv_size, dtype=dtype, device=self.alpha.device)
        return MemoryBranchState(memory, tail)

    def forward(
        self,
        x: Tensor,
        attn: Tensor | None = None,
        *,
        state: MemoryBranchState | None = None,
        cu_seqlens: Tensor | None = None,
        active: Tensor | None = None,
        overwrite_attn: bool = False,
    ) -> Tensor:
        """attn + alpha * Linear_out(readout); without `attn`, the unscaled Linear_out(readout).

        Args:
            x: [B, T, d_model], the hidden state that attention receives (after the input norm).
            attn: [B, T, d_model], attention's output, or None.
            state: where the N sequences stand (N = B, or the packed sequences); goes on from there and is updated in
                place. Gradients do not cross it.
            cu_seqlens: [N+1] offsets of packed sequences (B = 1), or None.
            active: bool [B], only with a state and up to 256 tokens: the other rows' state stays and they get `attn`
                (zeros without `attn`).
            overwrite_attn: `attn` is the caller's no more: without gradients the result may take its memory. Then alpha is folded into
                the output projection, which adds to `attn` as it stores: no further pass over it.

        Returns:
            [B, T, d_model] in `x`'s dtype.

        Raises:
            ValueError: shapes, dtypes or a state that do not fit; the message names the argument.
        """
        known = {"d_model": self.d_model}
        check_shape("x", x, "B T d_model", known)
        if attn is not None:
            check_shape("attn", attn, "B T d_model", known)
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state is not None and state.batch != sequences:
            fail("state", f"must hold {sequences} sequences", state.batch)
        if active is not None:
            if state is None or cu_seqlens is not None or x.shape[1] > STEP_TOKENS:
                fail("active", f"needs a `state`, no `cu_seqlens` and at most {STEP_TOKENS} tokens", f"{x.shape[1]} tokens")
            check_shape("active", active, "B", {"B": x.shape[0]})
            check_dtype("active", active, torch.bool)
        check_bool("overwrite_attn", overwrite_attn)
        steps = state is not None and cu_seqlens is None and x.shape[1] <= STEP_TOKENS and not torch.is_grad_enabled()
        if steps:
            self._check_options(state)
        elif active is not None:
            fail("active", "needs gradients to be disabled (torch.no_grad)", "gradients enabled")
        if self.recompute and state is None and torch.is_grad_enabled():
            return checkpoint(self._run, x, attn, None, cu_seqlens, None, False, False, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, attn, state, cu_seqlens, active, overwrite_attn, steps)

    def _run(
        self,
        x: Tensor,
        attn: Tensor | None,
        state: MemoryBranchState | None,
        cu_seqlens: Tensor | None,
        active: Tensor | None,
        overwrite_attn: bool,
        steps: bool,
    ) -> Tensor:
        """`forward` with arguments that are in order; `steps`: by the step forms."""
        if state is None and (parameters := self._fused(x, attn)) is not None:
            return self._run_fused(x, attn, cu_seqlens, overwrite_attn, parameters)
        inputs = self._read_input(x, state, cu_seqlens, active, steps)
        memory = self._remember(x.dtype, inputs, state, cu_seqlens, active, steps)
        if state is not None:
            if not steps:
                state.conv.inputs.copy_(inputs.state.inputs)
            state.started = True
        readout = self._read_out(x.dtype, inputs, memory)
        if attn is not None and overwrite_attn and self._folds(attn, readout):
            return self._add_folded(attn, readout)
        out = F.linear(readout, self.out_proj.weight.to(x.dtype))
        if active is not None:
            out = torch.where(active[:, None, None], out, 0)
        return out if attn is None else gated_fusion(attn, out, self.alpha, impl=self.config.impl)

    def _fused(self, x: Tensor, attn: Tensor | None) -> BranchParameters | None:
        """The parameters, where the branch may run as one node of autograd (layers/branch.py)."""
        config = self.config
        if config.impl not in ("auto", "triton") or not x.numel() or (attn is not None and attn.dtype != x.dtype):
            return None
        parameters = BranchParameters(
            self.in_proj.weight, self.head_bias, self.conv_weight, self.q_norm, self.k_norm,
            self.w_gate, self.w_up, self.w_down, self.readout_norm, self.out_proj.weight, self.alpha,
        )  # fmt: skip
        given = [p for p in parameters if p is not None]
        if not direct(x, *given) or any(p.dtype != torch.float32 or p.device != x.device for p in given):
            return None
        kernels = kernels_take(config.head_dim, config.hidden) and resolve_impl("ttt_mlp", config.impl, x) == "triton"
        return parameters if kernels and not torch.is_autocast_enabled(x.device.type) else None

    def _run_fused(
        self, x: Tensor, attn: Tensor | None, cu_seqlens: Tensor | None, overwrite_attn: bool, parameters: BranchParameters
    ) -> Tensor:
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x, name="x")
        if attn is not None:
            check_device("attn", attn, x.device, "x")
        config, l2 = self.config, self.config.qk_norm in ("rms+l2", "l2")
        inputs = self.heads, config.qk_activation == "silu", l2, config.norm_eps, config.l2_eps
        options = branch_options(inputs, self._memory_options(), config.norm_eps, gated=self.splits[3] > 0, writes=self.writes)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, attn, *parameters)):
            return branch(x, attn, cu_seqlens, parameters, options)
        readout = branch_readout(x, cu_seqlens, parameters, options)
        if attn is not None and overwrite_attn and self._folds(attn, readout):
            return self._add_folded(attn, readout)
        out = F.linear(readout, parameters.out_proj.to(x.dtype))
        return out if attn is None else gated_fusion(attn, out, parameters.alpha, impl=config.impl)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, heads={self.heads}, head_dim={self.config.head_dim}, hidden={self.config.hidden}"

    def _memory_options(self) -> dict[str, Any]:
        config = self.config
        return {
            "chunk_size": config.chunk_size,
            "norm": config.norm,
            "residual": config.residual,
            "grad_clip": config.grad_clip,
            "eps": config.weight_norm_eps,
        }

    @torch.no_grad()
    def step_readout(self, projected: Tensor, state: MemoryBranchState, active: Tensor | None = None) -> Tensor:
        """What `forward` hands to the output projection, from `projected` = Linear_in(x): for callers that make that product with others.

        Args:
            projected: [B, T, columns of in_proj], T from 1 to 256.
            state, active: as in `forward`; the state is moved on in place. An inactive row's readout is 0.

        Returns:
            [B, T, H*d] in `projected`'s dtype.
        """
        self._check_options(state)
        inputs = self._enter(projected, state, None, active, True)
        memory = self._remember(projected.dtype, inputs, state, None, active, True)
        state.started = True
        return self._read_out(projected.dtype, inputs, memory)

    def _read_out(self, dtype: torch.dtype, inputs: MemoryInput, memory: Tensor) -> Tensor:
        config, gates = self.config, self.splits[3]
        gate = inputs.gate[..., :gates].to(dtype) if gates else None
        return gated_fusion(None, memory, None, gate=gate, norm_weight=self.readout_norm, eps=config.norm_eps, impl=config.impl)

    def _read_input(
        self,
        x: Tensor,
        state: MemoryBranchState | None = None,
        cu_seqlens: Tensor | None = None,
        active: Tensor | None = None,
        steps: bool = False,
    ) -> MemoryInput:
        """One product for everything that is linear in x, then what the memory reads."""
        weight = self.in_proj.weight.to(x.dtype)
        # Rows of whole 16 bytes: with 591 columns (3 heads of 64) cuBLAS takes 272 us for 16k tokens and a d_model of 576, by a kernel of
        # two GPU generations ago. What fills them up are gates that nobody reads.
        idle = -weight.shape[0] % 8 if x.dtype.itemsize == 2 and not steps else 0
        if idle:
            weight = F.pad(weight, (0, 0, 0, idle))
        return self._enter(F.linear(x, weight), state, cu_seqlens, active, steps)

    def _enter(
        self,
        projected: Tensor,
        state: MemoryBranchState | None,
        cu_seqlens: Tensor | None,
        active: Tensor | None,
        steps: bool,
    ) -> MemoryInput:
        """What the memory reads, from everything that is linear in x, with any number of idle columns behind; `steps` moves the
        convolution's tail on."""
        config = self.config
        idle = projected.shape[-1] - sum(self.splits)
        operands = projected, self.conv_weight, F.pad(self.head_bias, (0, idle)) if idle else self.head_bias
        options = {
            "heads": self.heads,
            "q_norm": self.q_norm,
            "k_norm": self.k_norm,
            "l2": config.qk_norm in ("rms+l2", "l2"),
            "qk_activation": config.qk_activation,
            "norm_eps": config.norm_eps,
            "l2_eps": config.l2_eps,
            "impl": config.impl,
        }
        if steps:
            return memory_input_step(*operands, state.conv, active=active, **options)
        tail = None if state is None else state.conv.clone()  # saved for backward, and `forward` moves the state's own on
        return memory_input(*operands, initial_state=tail, output_final_state=state is not None, cu_seqlens=cu_seqlens, **options)

    def _remember(
        self,
        dtype: torch.dtype,
        inputs: MemoryInput,
        state: MemoryBranchState | None,
        cu_seqlens: Tensor | None,
        active: Tensor | None,
        steps: bool,
    ) -> Tensor:
        """Read and write the memory, by the step form for a short segment without gradients."""
        impl = self.config.impl
        q, k, v = (y.to(dtype) for y in (inputs.q, inputs.k, inputs.v))
        eta = inputs.eta if self.writes else torch.zeros_like(inputs.eta)
        if steps:
            return ttt_mlp_step(q, k, v, eta, inputs.mu, state.memory, active=active, impl=impl)
        o, after = ttt_mlp(
            q,
            k,
            v,
            self.w_gate,
            self.w_up,
            self.w_down,
            eta,
            inputs.mu,
            initial_state=state.memory if state is not None and state.started else None,
            output_final_state=state is not None,
            cu_seqlens=cu_seqlens,
            impl=impl,
            **self._memory_options(),
        )
        if state is not None:
            rows = range(state.batch)
            state.memory.copy_(rows, after.detach(), rows)
        return o

    def _folds(self, attn: Tensor, readout: Tensor) -> bool:
        """Whether folding alpha into the output projection is worth it: it costs a pass over the weights and saves three over `attn`."""
        fits = attn.is_contiguous() and attn.dtype == readout.dtype and not torch.is_grad_enabled()
        return fits and attn.shape[0] * attn.shape[1] > self.out_proj.in_features

    def _add_folded(self, attn: Tensor, readout: Tensor) -> Tensor:
        """attn + Linear_out(readout) * alpha, into `attn`: one product whose epilogue adds. An inactive row's readout is 0."""
        weight = (self.alpha[:, None] * self.out_proj.weight).to(attn.dtype)
        attn.flatten(0, 1).addmm_(readout.flatten(0, 1), weight.T)
        return attn

    def _check_options(self, state: MemoryBranchState) -> None:
        for name, value in self._memory_options().items():
            if getattr(state.memory, name) != value:
                fail("state", f"must have been made with {name}={value!r}", repr(getattr(state.memory, name)))
