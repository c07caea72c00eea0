"""Several states of the same sequences as one."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor

from allmem_ops._validation import fail


class StateGroup:
    """Base of dataclasses (`@dataclass(eq=False)`) whose fields are states of the same N sequences, and flags (bool)."""

    def parts(self) -> dict[str, Any]:
        """The states by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.type is not bool}

    def flags(self) -> dict[str, bool]:
        """The flags by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.type is bool}

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return next(iter(self.parts().values())).batch

    @property
    def nbytes(self) -> int:
        """Bytes of all parts: the same at every position."""
        return sum(part.nbytes for part in self.parts().values())

    def _map(self, function: Callable[[Any], Any]) -> Self:
        return type(self)(**{name: function(part) for name, part in self.parts().items()}, **self.flags())

    def index_select(self, rows: Tensor | Sequence[int]) -> Self:
        """A new state whose row `i` is a copy of row `rows[i]`."""
        return self._map(lambda part: part.index_select(rows))

    def copy_(self, rows: Tensor | Sequence[int], other: Self, other_rows: Tensor | Sequence[int]) -> Self:
        """Overwrite row `rows[i]` with row `other_rows[i]` of `other`, in place."""
        if type(other) is not type(self):
            fail("other", f"must be a {type(self).__name__}", type(other).__name__)
        for name, part in self.parts().items():
            part.copy_(rows, getattr(other, name), other_rows)
        return self

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """The given sequences, or all, back to their start, in place."""
        for part in self.parts().values():
            part.reset(rows)

    def clone(self) -> Self:
        """An independent copy."""
        return self._map(lambda part: part.clone())

    def to(self, device: torch.device | str) -> Self:
        """The state on another device."""
        return self._map(lambda part: part.to(device))

    def state_dict(self) -> dict[str, Any]:
        """The parts' own dictionaries by name, and the flags."""
        return {name: part.state_dict() for name, part in self.parts().items()} | self.flags()

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """A state from `state_dict()`'s result; another key or shape is a ValueError."""
        names = [f.name for f in fields(cls)]
        if not isinstance(state, dict) or set(state) != set(names):
            fail("state", f"must have the keys {', '.join(names)}", sorted(state) if isinstance(state, dict) else type(state).__name__)
        return cls(**{f.name: (bool if f.type is bool else f.type.from_state_dict)(state[f.name]) for f in fields(cls)})
