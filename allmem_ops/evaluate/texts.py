"""The evaluation's texts: built from Python's standard library and this package's own sources, kept in one file of tokens."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

import allmem_ops
from allmem_ops.demo.corpus import Corpus, packed_rows, standard_library, whole_rows
from allmem_ops.evaluation.run import Texts

STDLIB, OWN = "standard library", "allmem_ops"
LENGTH, LONG, SHORT = 8192, 65536, 384


def own_sources(root: Path | None = None) -> Corpus:
    """This package's sources, all held out: written after the models that it is tried on were trained, so none has seen them."""
    root = Path(allmem_ops.__file__).parent if root is None else root
    return Corpus(root, (), tuple(sorted(p.relative_to(root) for p in root.rglob("*.py") if p.stat().st_size)), ())


def build(
    tokenizer: Any,
    library: Corpus | None = None,
    own: Corpus | None = None,
    *,
    length: int = LENGTH,
    long: int = LONG,
    short: int = SHORT,
    rows: int = 16,
    long_rows: int = 4,
) -> Texts:
    """Rows of the held-out files: each within one file; long rows of files one after another; the first tokens of each file.

    Args:
        tokenizer: a Hugging Face tokenizer.
        library, own: corpora. Default: the standard library's held-out files, and this package.
        length, long, short: tokens a row.
        rows, long_rows: at most so many of a text.
    """
    library = standard_library() if library is None else library
    own = own_sources() if own is None else own
    return Texts(
        rows={
            STDLIB: whole_rows(library, library.held_out, tokenizer, length=length, per_file=4)[:rows],
            OWN: packed_rows(own, own.held_out, tokenizer, length=length)[:rows],
        },
        long=packed_rows(library, library.held_out, tokenizer, length=long)[:long_rows],
        short=whole_rows(library, library.held_out, tokenizer, length=short, per_file=1),
        haystack="".join(library.read(file) for file in library.held_out),
    )


def save(texts: Texts, path: Path) -> None:
    """One `.npz` file, written beside its name and moved into place."""
    arrays = {f"rows {name}": _small(rows) for name, rows in texts.rows.items()}
    for name in ("long", "short"):
        rows = getattr(texts, name)
        if rows is not None:
            arrays[name] = _small(rows)
    arrays["haystack"] = np.frombuffer(texts.haystack.encode(), dtype=np.uint8)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    os.replace(part, path)


def load(path: Path) -> Texts:
    """What `save` wrote."""
    with np.load(path) as file:
        tokens = {name: torch.from_numpy(file[name].astype(np.int64)) for name in file.files if name != "haystack"}
        haystack = file["haystack"].tobytes().decode()
    rows = {name.removeprefix("rows "): value for name, value in tokens.items() if name.startswith("rows ")}
    return Texts(rows, tokens.get("long"), tokens.get("short"), haystack)


def describe(texts: Texts) -> dict[str, Any]:
    """Shapes, and a digest by which two runs can tell that they read the same."""
    named = {**texts.rows, "long": texts.long, "short": texts.short}
    return {name: {"shape": list(x.shape), "sha256": _digest(x.numpy())} for name, x in named.items() if x is not None}


def _small(rows: torch.Tensor) -> np.ndarray:
    array = rows.numpy()
    return array.astype(np.uint16 if array.max(initial=0) < 2**16 else np.uint32)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()[:16]
