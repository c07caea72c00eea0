"""Real text that every machine has: the source files of Python's own standard library.

The split is by file and depends on a file's path alone. Test suites, bundled wheels and machine-made tables are left out,
and a training file that repeats a good part of a held-out one is dropped.
"""

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allmem_ops._validation import check_int, fail

LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "_bundled",  # wheels of ensurepip
    "encodings",  # code-page tables, one much like the other
}
HELD_OUT_ONE_IN = 10
SHINGLE_LINES = 4
DUPLICATE_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """Files under `root`, in a fixed shuffled order: `train` and `held_out` have none in common."""

    root: Path
    train: tuple[Path, ...]
    held_out: tuple[Path, ...]
    dropped: tuple[Path, ...]

    def summary(self) -> str:
        """One line with file and byte counts."""

        def count(files: Sequence[Path]) -> str:
            return f"{len(files)} files, {sum((self.root / f).stat().st_size for f in files) / 1e6:.2f} MB"

        return f"train {count(self.train)}; held out {count(self.held_out)}; {len(self.dropped)} near-duplicates dropped"

    def read(self, file: Path) -> str:
        """A file's text, decoded as Python decodes it."""
        return _read(self.root / file)


def standard_library(root: Path | None = None) -> Corpus:
    """The corpus of the running interpreter, or of `root`.

    Args:
        root: a directory of Python sources. Default: the standard library's.

    Returns:
        The split files, in the order of a hash of their paths, so that the same library gives the same corpus on every machine.

    Raises:
        ValueError: for a directory without sources.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    files = [p.relative_to(root) for p in root.rglob("*.py")]
    files = [f for f in files if not LEFT_OUT.intersection(f.parts) and not f.name.startswith("_sysconfigdata")]
    texts = {f: text for f in sorted(files, key=_key) if (text := _read(root / f)).strip()}
    if not texts:
        fail("root", "must be a directory with Python source files", root)
    held_out = [f for f in texts if int(_key(f), 16) % HELD_OUT_ONE_IN == 0]
    train = [f for f in texts if int(_key(f), 16) % HELD_OUT_ONE_IN != 0]
    dropped = near_duplicates({f: texts[f] for f in train}, [texts[f] for f in held_out])
    return Corpus(root, tuple(f for f in train if f not in dropped), tuple(held_out), tuple(sorted(dropped)))


def near_duplicates(train: dict[Path, str], held_out: Iterable[str]) -> set[Path]:
    """The training files of which a tenth or more of the runs of four lines also stands in a held-out file, or the reverse."""
    held = [_shingles(text) for text in held_out]
    found = set()
    for file, text in train.items():
        own = _shingles(text)
        if any(len(own & other) >= DUPLICATE_SHARE * min(len(own), len(other)) for other in held if own and other):
            found.add(file)
    return found


def packed_rows(corpus: Corpus, files: Sequence[Path], tokenizer: Any, *, length: int, rows: int | None = None) -> torch.Tensor:
    """Rows of `length` tokens cut from the files one after another, a separator between two files.

    Args:
        corpus: where to read.
        files: which files, in this order.
        tokenizer: a Hugging Face tokenizer (only its call and `eos_token_id`/`convert_tokens_to_ids` are used).
        length: tokens a row.
        rows: how many; None: all full rows. Files are read only as far as needed.

    Returns:
        `[rows, length]` int64.

    Raises:
        ValueError: when the files hold fewer rows.
    """
    check_int("length", length, 1)
    stream: list[int] = []
    for file in files:
        stream += [*tokenizer(corpus.read(file)).input_ids, separator(tokenizer)]
        if rows is not None and len(stream) >= rows * length:
            break
    return _cut(stream, length, rows)


def whole_rows(
    corpus: Corpus, files: Sequence[Path], tokenizer: Any, *, length: int, rows: int | None = None, per_file: int | None = None
) -> torch.Tensor:
    """Rows of `length` tokens, each within one file and counted from its start: every token's context is its own file.

    Args:
        corpus, files, tokenizer, length, rows: as for `packed_rows`.
        per_file: at most so many rows of a file; None: all that are full.

    Returns:
        `[rows, length]` int64.

    Raises:
        ValueError: when the files hold fewer rows.
    """
    check_int("length", length, 1)
    kept: list[int] = []
    for file in files:
        ids = tokenizer(corpus.read(file)).input_ids
        full = len(ids) // length
        kept += ids[: length * (full if per_file is None else min(full, per_file))]
        if rows is not None and len(kept) >= rows * length:
            break
    return _cut(kept, length, rows)


def longest_file(corpus: Corpus, files: Sequence[Path]) -> Path:
    """The file with the most bytes."""
    return max(files, key=lambda f: ((corpus.root / f).stat().st_size, f))


def separator(tokenizer: Any) -> int:
    """`<|endoftext|>`, which parted documents in SmolLM2's pretraining; the end-of-sequence token where a tokenizer lacks it."""
    token = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return tokenizer.eos_token_id if token is None else token


def _cut(ids: list[int], length: int, rows: int | None) -> torch.Tensor:
    full = len(ids) // length
    if full == 0 or (rows is not None and full < rows):
        fail("rows", f"must be at most {full}, the full rows of {length} tokens that the files hold", rows)
    rows = full if rows is None else rows
    return torch.tensor(ids[: rows * length], dtype=torch.int64).view(rows, length)


def _read(path: Path) -> str:
    with tokenize.open(path) as stream:
        return stream.read()


def _key(file: Path) -> str:
    return hashlib.sha256(file.as_posix().encode()).hexdigest()


def _shingles(text: str) -> set[int]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {hash(tuple(lines[i : i + SHINGLE_LINES])) for i in range(len(lines) - SHINGLE_LINES + 1)}
