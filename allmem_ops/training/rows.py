"""Token rows for training: where they come from, and which rows a step of a run reads."""

import os
from pathlib import Path

import numpy as np
import torch

from allmem_ops._validation import check_int, fail
from allmem_ops.training.data import Batch


class TokenRows:
    """Rows of tokens in memory or memory-mapped, in an order that depends on the seed alone.

    Step s of a run over n rows a step reads rows s*n to (s+1)*n of an endless sequence: the rows in a random order, epoch after
    epoch, each epoch in another. No position is kept, so a resumed run reads on exactly where it was; of several processes
    each reads its share of the same rows.

    Args:
        ids: integers [N, T].
        mask: bool [N, T] of the positions that count, or None: all.
        seed: of the order.

    Example:
        >>> rows = TokenRows(np.arange(12).reshape(6, 2))
        >>> sorted(rows.batch(0, 4).ids[:, 0].tolist() + rows.batch(1, 2).ids[:, 0].tolist()) != []
        True
        >>> whole, parts = rows.batch(5, 4), [rows.batch(5, 4, part=i, parts=2) for i in range(2)]
        >>> torch.equal(whole.ids, torch.cat([p.ids for p in parts]))
        True
    """

    def __init__(self, ids: np.ndarray, mask: np.ndarray | None = None, *, seed: int = 0) -> None:
        if ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
            fail("ids", "must be integers [N, T]", f"{ids.dtype} {list(ids.shape)}")
        if mask is not None and (mask.shape != ids.shape or mask.dtype != bool):
            fail("mask", f"must be bool {list(ids.shape)}", f"{mask.dtype} {list(mask.shape)}")
        self.ids, self.mask, self.seed = ids, mask, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, length: int | None = None, seed: int = 0) -> "TokenRows":
        """Rows of a file: `.npy` with the ids [N, T] or [tokens] (memory-mapped), or `.npz` with `ids` and `mask` [N, T].

        Args:
            path: the file.
            length: cut the rows to this many tokens; needed for ids [tokens].
            seed: of the order.

        Raises:
            ValueError: no such file, or one of another form.
        """
        path = Path(path)
        if path.suffix not in (".npy", ".npz") or not path.is_file():
            fail("path", "must be a .npy or .npz file", str(path))
        try:
            content = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None)
            ids, mask = (content, None) if path.suffix == ".npy" else (content["ids"], content["mask"])
        except (ValueError, KeyError, OSError) as error:
            fail("path", "must hold token ids (.npy), or `ids` and `mask` (.npz)", f"{path}: {error}")
        if length is not None:
            check_int("length", length, 1)
            if ids.ndim and ids.shape[-1] < length:
                fail("length", f"must be at most {ids.shape[-1]}, the tokens of a row of {path}", length)
            if mask is None:  # every token of a row but the last few is kept
                ids = ids[..., : ids.shape[-1] // length * length].reshape(-1, length)
            else:  # what was cut off a conversation would have lost its prompt
                ids, mask = ids[:, :length], mask[:, :length]
        return cls(ids, mask, seed=seed)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.ids.shape[1]

    def batch(self, step: int, rows: int, *, part: int = 0, parts: int = 1) -> Batch:
        """Part `part` of `parts` of the `rows` rows that `step` reads."""
        if rows % parts:
            fail("rows", f"must be a multiple of parts={parts}", rows)
        each = rows // parts
        first = step * rows + part * each
        chosen = [self._row(i) for i in range(first, first + each)]
        ids = torch.from_numpy(self.ids[chosen].astype(np.int64))
        return Batch(ids, None if self.mask is None else torch.from_numpy(self.mask[chosen]))

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self))
        return int(self._order[place])
