"""What every state of a sequence batch can do: rows selected, copied and moved, bytes counted, saved and restored."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor

from allmem_ops._validation import check_device, check_dtype, check_shape, check_tensor, fail

# A field of a state that all rows share: no row dimension, never written, not copied with the rows.
Shared = Annotated[Tensor, "shared by all rows"]


class RowState:
    """Base of the state dataclasses (`@dataclass(eq=False)`).

    A field annotated `Tensor` holds one row a sequence in dim 0, one annotated `Shared` a tensor that is the same for
    all; every other field is an option (int, float, str, bool or None). A subclass adds `reset(rows=None)` and
    `check()`, which raises `ValueError` for a field whose value, shape or dtype is not legal.
    """

    _row_names: ClassVar[tuple[str, ...]]
    _shared_names: ClassVar[tuple[str, ...]]
    _option_names: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        # Sorted here, once, and not by `dataclasses.fields` in the methods: torch.compile cannot trace that on a class.
        hints = {name: hint for name, hint in get_type_hints(cls, include_extras=True).items() if not name.startswith("_")}
        cls._row_names = tuple(name for name, hint in hints.items() if hint is Tensor)
        cls._shared_names = tuple(name for name, hint in hints.items() if hint == Shared)
        cls._option_names = tuple(name for name in hints if name not in cls._row_names + cls._shared_names)

    def check(self) -> None:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name; dim 0 is the sequence."""
        return {name: getattr(self, name) for name in self._row_names}

    def shared(self) -> dict[str, Tensor]:
        """The tensors that all rows share, by name."""
        return {name: getattr(self, name) for name in self._shared_names}

    def options(self) -> dict[str, Any]:
        """The option fields by name."""
        return {name: getattr(self, name) for name in self._option_names}

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return next(iter(self.tensors().values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all rows: the same at every position."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def _map(self, function: Callable[[Tensor], Tensor], shared: Callable[[Tensor], Tensor] = lambda t: t) -> Self:
        rows = {name: function(t) for name, t in self.tensors().items()}
        return type(self)(**rows, **{name: shared(t) for name, t in self.shared().items()}, **self.options())

    def index_select(self, rows: Tensor | Sequence[int]) -> Self:
        """A new state whose row `i` is a copy of row `rows[i]` (beams, forks: a row may be named more than once)."""
        rows = self.row_index("rows", rows)
        return self._map(lambda t: t.index_select(0, rows))

    @torch.no_grad()
    def copy_(self, rows: Tensor | Sequence[int], other: Self, other_rows: Tensor | Sequence[int]) -> Self:
        """Overwrite row `rows[i]` with row `other_rows[i]` of `other`, in place; `rows` are distinct, `other` may be `self`."""
        if type(other) is not type(self):
            fail("other", f"must be a {type(self).__name__}", type(other).__name__)
        if other.options() != self.options():
            fail("other", f"must have the options {self.options()}", other.options())
        # All rows by a range of both: no index goes to the device, which would wait for everything before it, once for each layer.
        whole = isinstance(rows, range) and isinstance(other_rows, range) and rows == other_rows == range(self.batch) == range(other.batch)
        if not whole:
            rows, other_rows = self.row_index("rows", rows), other.row_index("other_rows", other_rows)
            check_shape("other_rows", other_rows, "N", {"N": rows.shape[0]})
        pairs = [(f"other.{name}", mine, getattr(other, name)) for name, mine in self.tensors().items()]
        for name, mine, theirs in pairs:
            if theirs.shape[1:] != mine.shape[1:]:
                fail(name, f"must have rows of shape {list(mine.shape[1:])}", list(theirs.shape[1:]))
            check_dtype(name, theirs, mine.dtype)
            check_device(name, theirs, mine.device, "self")
        for _, mine, theirs in pairs:
            if whole:
                mine.copy_(theirs)
            else:
                mine.index_copy_(0, rows, theirs.index_select(0, other_rows))
        return self

    def clone(self) -> Self:
        """A copy with rows of its own; gradients pass through, as with `Tensor.clone`."""
        return self._map(Tensor.clone)

    def detach(self) -> Self:
        """The same tensors without their autograd history; storage is shared."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> Self:
        """The state on another device. Dtypes are part of a state's meaning and stay."""
        return self._map(lambda t: t.to(device), lambda t: t.to(device))

    def state_dict(self) -> dict[str, Any]:
        """All fields by name, options as plain values. The tensors share storage with the state; `clone()` first for a snapshot."""
        return {name: t.detach() for name, t in (self.tensors() | self.shared()).items()} | self.options()

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """A state from `state_dict()`'s result, whose tensors are copied.

        Raises:
            ValueError: a missing or foreign key, or a value of another type, shape or dtype than the class documents.
        """
        if not isinstance(state, Mapping):
            fail("state", "must be a mapping, as `state_dict()` returns", type(state).__name__)
        known = {*cls._row_names, *cls._shared_names, *cls._option_names}
        if missing := sorted(known - state.keys()):
            fail("state", f"must have the keys of {cls.__name__}", f"a mapping without {', '.join(missing)}")
        if foreign := sorted(map(str, state.keys() - known)):
            fail("state", f"must have only the keys of {cls.__name__}", ", ".join(foreign))
        for name in (*cls._row_names, *cls._shared_names):
            check_tensor(name, state[name])
        for name in cls._option_names:
            if not isinstance(state[name], (int, float, str, type(None))):
                fail(name, "must be a plain value", type(state[name]).__name__)
        made = cls(**state)
        made.check()
        copy = lambda t: t.detach().clone(memory_format=torch.contiguous_format)  # noqa: E731
        return made._map(copy, copy)

    def row_index(self, name: str, rows: Tensor | Sequence[int]) -> Tensor:
        """`rows` as an int64 index on the state's device; its values are checked where that needs no host synchronisation."""
        if not isinstance(rows, Tensor):
            if any(isinstance(r, bool) or not isinstance(r, int) for r in rows):
                fail(name, "must hold ints", rows)
            rows = torch.tensor(rows, dtype=torch.int64)
        check_shape(name, rows, "N", {})
        check_dtype(name, rows, (torch.int32, torch.int64))
        if rows.device.type == "cpu" and rows.numel() and not torch.compiler.is_compiling():
            low, high = (int(x) for x in rows.aminmax())
            if low < 0 or high >= self.batch:
                fail(name, f"must lie in [0, {self.batch})", rows.tolist())
        return rows.to(self.device, torch.int64)
