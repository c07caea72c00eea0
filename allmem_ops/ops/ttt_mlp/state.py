"""`MemoryState`: what the memory carries from token to token, in constant bytes."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from allmem_ops._impl import resolve_impl
from allmem_ops._validation import (
    MATMUL_DTYPES,
    check_bool,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_shape,
    fail,
    short,
)
from allmem_ops.ops.precision import accumulator_dtype, ieee_float32
from allmem_ops.ops.state import RowState, Shared
from allmem_ops.ops.ttt_mlp.reference import Carry, Options, row_norms
from allmem_ops.ops.ttt_mlp.registration import ttt_mlp_folded_triton
from allmem_ops.ops.ttt_mlp.slots import covers
from allmem_ops.ops.ttt_mlp.tail import TAIL_TOKENS, Tail, empty_tail, is_empty, tail_gradient

NORMS = ("pre_write", "post_write", "none")
MATRICES = ("gate", "up", "down")
_DTYPES = {short(dtype): dtype for dtype in MATMUL_DTYPES}


def check_options(chunk_size: int, norm: str, residual: bool, grad_clip: float | None, eps: float) -> None:
    """Raise `ValueError` for an option that `ttt_mlp` does not know."""
    check_int("chunk_size", chunk_size, 1)
    check_choice("norm", norm, NORMS)
    check_bool("residual", residual)
    if grad_clip is not None:
        check_float("grad_clip", grad_clip, above=0.0)
    check_float("eps", eps, minimum=0.0)


def check_weights(w_gate: Tensor, w_up: Tensor, w_down: Tensor, known: dict[str, int], kind: str = "w") -> None:
    """Shapes [H, h, d], [H, h, d], [H, d, h] with the sizes in `known`, one device, float32 or float64 alike."""
    for matrix, w, dims in (("gate", w_gate, "H h d"), ("up", w_up, "H h d"), ("down", w_down, "H d h")):
        name = f"{kind}_{matrix}"
        check_shape(name, w, dims, known)
        check_dtype(name, w, (torch.float32, torch.float64), "the memory's weights are its state")
        check_dtype(name, w, w_gate.dtype, f"the dtype of `{kind}_gate`")
        check_device(name, w, w_gate.device, f"{kind}_gate")


@dataclass(eq=False)
class MemoryState(RowState):
    """The state of `ttt_mlp` for N sequences: fp32 (float64 for float64 inputs), per-sequence positions, constant bytes.

    Made by `MemoryState.initial` or by `ttt_mlp(..., output_final_state=True)`; `ttt_mlp_step` changes it in place,
    `ttt_mlp` never does. Gradients reach weights and momentum alone.

    With a half-precision `dtype` it also holds the weights rounded to that dtype, half the bytes of what a step has to read.
    They are made from the weights when the state is and follow every change that a method or an operator makes; whoever
    writes into the weights by other means calls `refresh`.

    Args:
        w_gate, w_up, w_down: weights [N, H, h, d], [N, H, h, d], [N, H, d, h].
        m_gate, m_up, m_down: momentum, of the same shapes.
        n_gate, n_up, n_down: row norms N of the initial weights [N, H, h], [N, H, h], [N, H, d].
        g_gate, g_up, g_down: gradient sums G of the open chunk, shaped as the weights.
        mu_sum: sum of mu over the open chunk [N, H].
        tail_k, tail_v: [N, H, 64, d] in `dtype`, tail_eta [N, H, 64, 3]: the open chunk's newest tokens, which G does not hold yet.
        tail: int64 [N], how many of them count. Only the decode kernels leave any; `folded` is the state without them.
        count: int64 [N], the tokens in the open chunk: 0 to chunk_size - 1.
        position: int64 [N], the tokens read so far.
        initial_gate, initial_up, initial_down: the initial weights [H, ...], shared by all rows and with the caller:
            what `reset` returns to. They are not part of `nbytes`.
        chunk_size, norm, residual, grad_clip, eps: the options of `ttt_mlp`.
        dtype: name of the dtype of q, k, v that the state goes with, e.g. "bfloat16".
    """

    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    m_gate: Tensor
    m_up: Tensor
    m_down: Tensor
    n_gate: Tensor
    n_up: Tensor
    n_down: Tensor
    g_gate: Tensor
    g_up: Tensor
    g_down: Tensor
    mu_sum: Tensor
    tail_k: Tensor
    tail_v: Tensor
    tail_eta: Tensor
    tail: Tensor
    count: Tensor
    position: Tensor
    initial_gate: Shared
    initial_up: Shared
    initial_down: Shared
    chunk_size: int
    norm: str
    residual: bool
    grad_clip: float | None
    eps: float
    dtype: str
    _rounded: tuple[Tensor, ...] = field(init=False, repr=False)
    _checked: tuple[object, ...] = field(init=False, repr=False, default=())  # the fields that the last `check` found right

    def __post_init__(self) -> None:
        dtype = _DTYPES.get(self.dtype)  # an unknown one is for `check` to refuse
        rounded = dtype is not None and dtype.itemsize == 2
        weights = (self.w_gate, self.w_up, self.w_down)
        self._rounded = tuple(w.detach().to(dtype, memory_format=torch.contiguous_format) for w in weights) if rounded else ()

    @property
    def rounded(self) -> tuple[Tensor, ...]:
        """The weights in `dtype` where that is half precision, else nothing."""
        return self._rounded

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights again, after a change of them in place."""
        for into, w in zip(self._rounded, (self.w_gate, self.w_up, self.w_down), strict=False):
            into.copy_(w)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows: the same at every position."""
        return super().nbytes + sum(t.numel() * t.element_size() for t in self._rounded)

    def detach(self) -> "MemoryState":
        """The same tensors without their autograd history; storage is shared."""
        made = super().detach()
        made._rounded = self._rounded
        return made

    def copy_(self, rows: Tensor | Sequence[int], other: "MemoryState", other_rows: Tensor | Sequence[int]) -> "MemoryState":
        """Overwrite row `rows[i]` with row `other_rows[i]` of `other`, in place; `rows` are distinct, `other` may be `self`."""
        super().copy_(rows, other, other_rows)
        self.refresh()
        return self

    @classmethod
    def initial(
        cls,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        *,
        batch: int,
        chunk_size: int = 2048,
        norm: str = "pre_write",
        residual: bool = True,
        grad_clip: float | None = None,
        eps: float = 1e-5,
        dtype: torch.dtype | None = None,
    ) -> "MemoryState":
        """The state of `batch` sequences before their first token: the weights as they are, no momentum, an empty chunk.

        Args:
            w_gate, w_up, w_down: [H, h, d], [H, h, d], [H, d, h], float32 or float64; copied, differentiably, for each row.
            batch: number of sequences N.
            chunk_size, norm, residual, grad_clip, eps: as in `ttt_mlp`.
            dtype: dtype of the q, k, v to come; None: that of the weights.

        Raises:
            ValueError: an argument of another type, shape, dtype, device or range.
        """
        known: dict[str, int] = {}
        check_weights(w_gate, w_up, w_down, known)
        check_int("batch", batch, 0)
        check_options(chunk_size, norm, residual, grad_clip, eps)
        dtype = w_gate.dtype if dtype is None else dtype
        if dtype not in MATMUL_DTYPES or accumulator_dtype(dtype) != w_gate.dtype:
            fail("dtype", f"must be one whose state is {short(w_gate.dtype)}, the dtype of the weights", dtype)
        weights = (w_gate, w_up, w_down)
        rows = [w.expand(batch, *w.shape).clone() for w in weights]
        norms = [row_norms(w.detach()).expand(batch, -1, -1).clone() for w in weights]
        zeros = [torch.zeros_like(w, requires_grad=False) for w in (*rows, *rows)]
        heads = known["H"]
        return cls(
            *rows,
            *zeros[:3],
            *norms,
            *zeros[3:],
            w_gate.new_zeros(batch, heads),
            *empty_tail(batch, heads, known["d"], dtype, w_gate.detach()),
            count=torch.zeros(batch, dtype=torch.int64, device=w_gate.device),
            position=torch.zeros(batch, dtype=torch.int64, device=w_gate.device),
            initial_gate=w_gate.detach(),
            initial_up=w_up.detach(),
            initial_down=w_down.detach(),
            chunk_size=chunk_size,
            norm=norm,
            residual=residual,
            grad_clip=grad_clip,
            eps=eps,
            dtype=short(dtype),
        )

    def carry(self) -> Carry:
        """The tensors by their role in the recurrence."""
        return Carry(
            w=(self.w_gate, self.w_up, self.w_down),
            m=(self.m_gate, self.m_up, self.m_down),
            n=(self.n_gate, self.n_up, self.n_down),
            g=(self.g_gate, self.g_up, self.g_down),
            mu_sum=self.mu_sum,
            count=self.count,
        )

    def held_back(self) -> Tail:
        """The tokens that the gradient sums do not hold yet."""
        return Tail(self.tail_k, self.tail_v, self.tail_eta, self.tail)

    @torch.no_grad()
    def folded(self, impl: str = "auto") -> "MemoryState":
        """The same state with an empty tail: new gradient sums, everything else shared. `self` where no row is known to hold any.

        Args:
            impl: "chunk" (plain PyTorch: a row's last bits may vary with the number of rows), "triton" (one kernel, where they do not) or
                "auto": "triton" on CUDA for what the kernels take, else "chunk".
        """
        tail, c = self.held_back(), self.carry()
        if is_empty(tail):
            return self
        chosen = resolve_impl("ttt_mlp_step", impl, tail.k)
        if chosen == "triton" and covers(tail.k.shape[-1], self.w_gate.shape[-2]):
            sums = ttt_mlp_folded_triton(c.w, c.n, c.g, tail, self.norm, self.eps)
        else:
            with ieee_float32():
                found = tail_gradient(c, tail, Options(self.chunk_size, self.norm, self.residual, self.grad_clip, self.eps))
            sums = [g + more for g, more in zip(c.g, found, strict=True)]
        return replace(self, **{f"g_{name}": g for name, g in zip(MATRICES, sums, strict=True)}, tail=torch.zeros_like(self.tail))

    @torch.no_grad()
    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Back to the initial weights, in place, for the given sequences or for all."""
        index = torch.arange(self.batch, device=self.device) if rows is None else self.row_index("rows", rows)
        for name in MATRICES:
            initial = getattr(self, f"initial_{name}")
            for prefix, value in (("w", initial), ("n", row_norms(initial))):
                getattr(self, f"{prefix}_{name}").index_copy_(0, index, value.expand(index.shape[0], *value.shape))
        for name, x in self.tensors().items():
            if name[0] not in "wn":
                x.index_fill_(0, index, 0)
        self.refresh()

    def check(self) -> None:
        """Raise `ValueError` unless options, shapes, dtypes and devices fit together."""
        if torch.compiler.is_compiling():
            self._check_fields()
            return
        # A decode step's check is of the objects of the step before: their shapes took 0.1 ms of host time to look through.
        fields = tuple([getattr(self, name) for name in (*self._row_names, *self._shared_names, *self._option_names)])
        if len(self._checked) != len(fields) or not all(map(operator.is_, fields, self._checked)):
            self._check_fields()
            self._checked = fields
        if self.count.device.type == "cpu":
            counts = self.count.tolist()  # a CPU tensor: nothing to wait for
            if not all(0 <= n < self.chunk_size for n in counts):
                fail("count", f"must lie in [0, {self.chunk_size}), `chunk_size`", counts)
            tails = self.tail.tolist()
            if not all(0 <= n < TAIL_TOKENS and n <= count for n, count in zip(tails, counts, strict=True)):
                fail("tail", f"must lie in [0, {TAIL_TOKENS}) and not exceed `count`={counts}", tails)

    def _check_fields(self) -> None:
        check_options(self.chunk_size, self.norm, self.residual, self.grad_clip, self.eps)
        check_choice("dtype", self.dtype, _DTYPES)
        known: dict[str, int] = {}
        check_weights(self.initial_gate, self.initial_up, self.initial_down, known, "initial")
        dtype = accumulator_dtype(_DTYPES[self.dtype])
        floats = [(f"{prefix}_{m}", dims) for prefix in "wmg" for m, dims in zip(MATRICES, ("N H h d", "N H h d", "N H d h"), strict=True)]
        floats += [("n_gate", "N H h"), ("n_up", "N H h"), ("n_down", "N H d"), ("mu_sum", "N H"), ("tail_eta", f"N H {TAIL_TOKENS} 3")]
        tokens = [("tail_k", f"N H {TAIL_TOKENS} d"), ("tail_v", f"N H {TAIL_TOKENS} d")]
        ints = [("tail", "N"), ("count", "N"), ("position", "N")]
        wanted = [(floats, dtype), (tokens, _DTYPES[self.dtype]), (ints, torch.int64)]
        for name, dims, want in [(*x, want) for group, want in wanted for x in group]:
            x = getattr(self, name)
            check_shape(name, x, dims, known)
            check_dtype(name, x, want)
            check_device(name, x, self.initial_gate.device, "initial_gate")
        check_dtype("initial_gate", self.initial_gate, dtype)
