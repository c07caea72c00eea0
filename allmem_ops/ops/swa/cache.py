"""`WindowCache`: the keys and values that sliding-window attention can still see, in constant memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from allmem_ops._validation import MATMUL_DTYPES, check_device, check_dtype, check_int, check_shape, fail
from allmem_ops.ops.state import RowState


def _put(buffer: Tensor, tokens: Tensor, slots: Tensor, valid: Tensor) -> None:
    """buffer[b, slots[b, t]] = tokens[b, t] where valid[b, t]. The slots of a row are distinct, so the order of writes cannot matter."""
    index = slots[:, :, None, None].expand_as(tokens)
    buffer.scatter_(1, index, torch.where(valid[:, :, None, None], tokens, buffer.gather(1, index)))


@dataclass(eq=False)
class WindowCache(RowState):
    """Keys and values of the first `sinks` tokens and of the last `window` tokens after them, for each sequence of a batch.

    Token `t` of a sequence is kept in `sink_k[:, t]` if `t < sinks`, else in `ring_k[:, (t - sinks) % window]`, where it stays
    until token `t + window` takes its place. Every sequence has its own position. The buffers start as zeros, so that a slot
    that was never written holds finite numbers. Writes take no part in autograd.

    `index_select`, `copy_`, `clone`, `detach`, `to`, `state_dict`, `from_state_dict` and `nbytes` are those of every state.

    **To attend a segment after a prefix** read the prefix first, attend, then append. This is exact for every split:

        kp, vp = cache.keys_values()
        o = swa(q, torch.cat([kp, k], 1), torch.cat([vp, v], 1), window=cache.window, sinks=cache.sinks, q_sinks=q_sinks)
        cache.append(k, v)

    What was dropped in between lies outside every window: inside a window distances are true, and each sink left outside the
    window stays outside. Appending first and attending `keys_values()` alone is exact only for a segment of one token or
    while nothing has been dropped (position <= sinks + window): the segment's first query needs `window - 1` keys before it.

    Attributes:
        sink_k, sink_v: [B, sinks, HK, D], the first tokens.
        ring_k, ring_v: [B, window, HK, D], the tokens after them, as a ring.
        positions: int64 [B], the number of tokens that each sequence has put in; on the device.
        window, sinks: as in `swa`.

    Examples:
        >>> import torch
        >>> from allmem_ops import WindowCache, swa
        >>> q, k, v = torch.randn(3, 2, 20, 4, 16).unbind(0)
        >>> cache = WindowCache.empty(2, 4, 16, window=8, sinks=2, dtype=torch.float32, device="cpu")
        >>> bytes_before = cache.nbytes
        >>> cache.append(k[:, :13], v[:, :13])
        >>> kp, vp = cache.keys_values()
        >>> kp.shape[1]  # 2 sinks and 8 of the window
        10
        >>> o = swa(q[:, 13:], torch.cat([kp, k[:, 13:]], 1), torch.cat([vp, v[:, 13:]], 1), window=8, sinks=2)
        >>> cache.append(k[:, 13:], v[:, 13:])
        >>> torch.allclose(o, swa(q, k, v, window=8, sinks=2)[:, 13:], atol=1e-6)
        True
        >>> cache.nbytes == bytes_before, cache.positions.tolist()
        (True, [20, 20])
    """

    sink_k: Tensor
    sink_v: Tensor
    ring_k: Tensor
    ring_v: Tensor
    positions: Tensor
    window: int
    sinks: int

    @classmethod
    def empty(
        cls, batch: int, heads_kv: int, head_dim: int, *, window: int, sinks: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> Self:
        """A cache that holds no token yet.

        Args:
            batch, heads_kv, head_dim: B, HK and D of the keys and values to come.
            window: at least 1.
            sinks: at least 0, default 0.
            dtype, device: of the keys and values to come.

        Raises:
            ValueError: an argument outside its range.
        """
        for name, value, minimum in (
            ("batch", batch, 1),
            ("heads_kv", heads_kv, 1),
            ("head_dim", head_dim, 1),
            ("window", window, 1),
            ("sinks", sinks, 0),
        ):
            check_int(name, value, minimum)
        if dtype not in MATMUL_DTYPES:
            fail("dtype", f"must be one of {', '.join(map(str, MATMUL_DTYPES))}", dtype)
        buffers = [torch.zeros(batch, n, heads_kv, head_dim, dtype=dtype, device=device) for n in (sinks, sinks, window, window)]
        return cls(*buffers, torch.zeros(batch, dtype=torch.int64, device=device), window, sinks)

    def check(self) -> None:
        """Raise `ValueError` unless shapes, dtypes, devices and options fit together."""
        check_int("window", self.window, 1)
        check_int("sinks", self.sinks, 0)
        known = {"window": self.window, "sinks": self.sinks}
        for name, dims in (
            ("sink_k", "B sinks HK D"),
            ("sink_v", "B sinks HK D"),
            ("ring_k", "B window HK D"),
            ("ring_v", "B window HK D"),
            ("positions", "B"),
        ):
            tensor = getattr(self, name)
            check_shape(name, tensor, dims, known)
            check_device(name, tensor, self.sink_k.device, "sink_k")
            check_dtype(name, tensor, torch.int64 if name == "positions" else MATMUL_DTYPES)
            if name != "positions":
                check_dtype(name, tensor, self.sink_k.dtype, "the dtype of `sink_k`")
        if self.positions.device.type == "cpu" and self.positions.numel() and self.positions.min() < 0:
            fail("positions", "must not be negative", self.positions.tolist())

    def check_tokens(self, name: str, x: Tensor, dims: str, known: dict[str, int]) -> None:
        """Check keys or values that are to go into the cache."""
        check_shape(name, x, dims, known)
        check_dtype(name, x, self.ring_k.dtype, "the dtype of `cache`")
        check_device(name, x, self.device, "cache")

    @property
    def dims(self) -> dict[str, int]:
        """The sizes B, HK and D."""
        batch, _, heads_kv, head_dim = self.ring_k.shape
        return {"B": batch, "HK": heads_kv, "D": head_dim}

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put `T` tokens a sequence into the cache, in place, with no host synchronisation.

        Args:
            k, v: [B, T, HK, D] in the cache's dtype; T is any number, also more than the window.

        Raises:
            ValueError: another shape, dtype or device than the cache's.
        """
        known = self.dims
        self.check_tokens("k", k, "B T HK D", known)
        self.check_tokens("v", v, "B T HK D", known)
        self.write(k, v, None)

    @torch.no_grad()
    def write(self, k: Tensor, v: Tensor, active: Tensor | None) -> None:
        """`append` without checks, in the rows that `active` (bool [B]) names; the others keep every bit."""
        T, position = k.shape[1], self.positions[:, None]

        def put(buffers: tuple[Tensor, Tensor], tokens: slice, first: int, sink: bool) -> None:
            index = position + torch.arange(tokens.start, tokens.stop, device=k.device)
            valid = index < self.sinks if sink else index >= self.sinks
            if active is not None:
                valid = valid & active[:, None]
            slots = (index - first) % buffers[0].shape[1]
            for buffer, x in zip(buffers, (k, v), strict=True):
                _put(buffer, x[:, tokens], slots, valid)

        if self.sinks:
            put((self.sink_k, self.sink_v), slice(0, min(T, self.sinks)), 0, True)
        put((self.ring_k, self.ring_v), slice(max(T - self.window, 0), T), self.sinks, False)
        self.positions += T if active is None else T * active

    def keys_values(self, position: int | None = None, then: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The tokens held, in order: the sinks, then the last `window` of the others; k and v [B, n, HK, D], copies.

        For prompts: the shape of the result depends on the positions, so they are read on the host. `swa_step` does not.

        Args:
            position: that of all sequences, where the caller knows it: nothing is read then, and nothing checked.
            then: keys and values [B, T, HK, D] to set behind them: what a segment attends, made in one pass.

        Raises:
            ValueError: the sequences are at different positions, so that they hold different numbers of tokens.
        """
        if position is None:
            positions = self.positions.tolist()
            if len(set(positions)) > 1:
                hint = "Use index_select(rows) to read rows alone"
                fail("positions", "must be equal to read keys and values as one tensor", positions, hint)
            position = positions[0]
        sinks, ring = min(position, self.sinks), min(max(position - self.sinks, 0), self.window)
        start = (position - self.sinks - ring) % self.window
        ends = start, min(start + ring, self.window), max(start + ring - self.window, 0)

        def joined(sink: Tensor, held: Tensor, more: Sequence[Tensor]) -> Tensor:
            return torch.cat([sink[:, :sinks], held[:, ends[0] : ends[1]], held[:, : ends[2]], *more], 1)

        more = ((), ()) if then is None else ((then[0],), (then[1],))
        return joined(self.sink_k, self.ring_k, more[0]), joined(self.sink_v, self.ring_v, more[1])

    @torch.no_grad()
    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Make the rows (default: all) empty, in place: position 0 and zeros."""
        for tensor in self.tensors().values():
            if rows is None:
                tensor.zero_()
            else:
                tensor.index_fill_(0, self.row_index("rows", rows), 0)
