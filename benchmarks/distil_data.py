"""The token files of the long run: real text from what is installed, split by file, near-duplicates removed.

    python -m benchmarks.distil_data --output DATA [--rows 2448] [--length 8192]

Writes, all uint16 tokens of SmolLM2's tokenizer:

    train.npy      [rows, length]: first rows within one file each, then rows packed from shorter files and what the long ones left over
    heldout.npz    ids [tokens], offsets [files + 1], names [files]: whole held-out files
    unseen.npz     the same of this repository's own files, which no model released before it can have read
    data.json      files, bytes and tokens by source; what was left out; SHA-256 of each array

Sources: Python's standard library (its own split, `allmem_ops.demo.corpus`), .py, .pyi, .md, .rst and .txt files of the packages
installed beside this interpreter, and the .md and .txt files and Perl manuals of the system's packages. Test suites, vendored
copies, tables (few letters, or very long lines) and changelogs are left out. The split of a file depends on a hash of its path. A
training file is dropped when a tenth of its runs of four lines also stands in one held-out file (or the reverse), or when half of
them stand in training files taken before. The same packages give the same arrays; another machine's packages give others, so the
arrays of a run are what is carried.
"""

import argparse
import collections
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allmem_ops.demo import smollm2
from allmem_ops.demo.corpus import DUPLICATE_SHARE, SHINGLE_LINES, separator, standard_library

SKIPPED = {"test", "tests", "testing", "_vendor", "vendored", "_vendored", "__pycache__", "node_modules", "idle_test", "encodings"}
SMALLEST, LARGEST = 2_000, 1_500_000  # bytes of a file
HELD_OUT_ONE_IN = 40
# Bytes of training text that one package may give, so that no single project is the corpus.
MOST_OF_ONE = 14_000_000
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class File:
    """One text: where it comes from, and its runs of four lines."""

    source: str
    name: str
    text: str
    held_out: bool
    runs: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        self.runs = {hash(tuple(lines[i : i + SHINGLE_LINES])) for i in range(len(lines) - SHINGLE_LINES + 1)}

    @property
    def package(self) -> str:
        return f"{self.source}/{Path(self.name).parts[0]}"


def key(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def read(path: Path) -> str | None:
    """The text of a file that is one: decodable, of a sensible size, mostly letters, no very long lines."""
    try:
        if not SMALLEST <= path.stat().st_size <= LARGEST:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    letters = sum(map(str.isalpha, text))
    if letters < 0.45 * len(text.replace(" ", "").replace("\n", "")) or max(map(len, text.splitlines()), default=0) > 2000:
        return None
    return text


def tree(source: str, root: Path, endings: tuple[str, ...]) -> Iterator[File]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix not in endings or SKIPPED.intersection(relative.parts) or path.is_symlink() or not path.is_file():
            continue
        if any(word in str(relative).lower() for word in ("changelog", "top_level.txt", "sources.txt", "record", "entry_points")):
            continue
        text = read(path)
        if text is not None:
            name = relative.as_posix()
            yield File(source, name, text, key(name) % HELD_OUT_ONE_IN == 0)


def library() -> Iterator[File]:
    corpus = standard_library()
    for files, held_out in ((corpus.train, False), (corpus.held_out, True)):
        for file in files:
            yield File("standard library", file.as_posix(), corpus.read(file), held_out)


def repository() -> Iterator[File]:
    for folder in ("allmem_ops", "docs", "tests", "benchmarks"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.suffix in (".py", ".md") and path.stat().st_size >= SMALLEST:
                yield File("this repository", path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8"), True)


def sources() -> Iterator[File]:
    yield from library()
    yield from tree("packages", Path(sysconfig.get_path("purelib")), (".py", ".pyi", ".md", ".rst", ".txt"))
    yield from tree("system documentation", Path("/usr/share/doc"), (".md", ".txt", ".rst"))
    yield from tree("Perl manuals", Path("/usr/share/perl"), (".pod",))


def choose(files: Iterable[File]) -> tuple[list[File], list[File], collections.Counter]:
    """Training files and held-out files in a fixed shuffled order, and how many were dropped for what."""
    files = sorted(files, key=lambda f: key(f"{f.source}/{f.name}"))
    dropped: collections.Counter = collections.Counter()
    held_out, taken = [], set()
    for file in (f for f in files if f.held_out):
        if len(file.runs & taken) > 0.5 * len(file.runs):
            dropped["held-out files that repeat another"] += 1
            continue
        held_out.append(file)
        taken |= file.runs
    where = collections.defaultdict(list)
    for index, file in enumerate(held_out):
        for run in file.runs:
            where[run].append(index)
    train, seen, given = [], set(), collections.Counter()
    # The standard library first: it counts as itself where a package carries a copy.
    for file in sorted((f for f in files if not f.held_out), key=lambda f: f.source != "standard library"):
        shared = collections.Counter(index for run in file.runs for index in where.get(run, ()))
        if any(count >= DUPLICATE_SHARE * min(len(file.runs), len(held_out[index].runs)) for index, count in shared.items()):
            dropped["near-duplicates of a held-out file"] += 1
        elif len(file.runs & seen) >= 0.5 * len(file.runs):
            dropped["near-duplicates of training files"] += 1
        elif given[file.package] > MOST_OF_ONE and file.source == "packages":
            dropped["files beyond a package's share"] += 1
        else:
            train.append(file)
            seen |= file.runs
            given[file.package] += len(file.text.encode())
    return train, held_out, dropped


def encode(files: list[File], tokenizer: Any) -> list[np.ndarray]:
    ids = []
    for start in range(0, len(files), 256):
        batch = [f.text for f in files[start : start + 256]]
        ids += [np.array(x, dtype=np.uint16) for x in tokenizer(batch).input_ids]
        print(f"\r{len(ids)}/{len(files)} files", end="", flush=True)
    print()
    return ids


def rows_of(train: list[np.ndarray], end: int, length: int, rows: int) -> tuple[np.ndarray, int]:
    """`rows` rows, and how many of them lie within one file."""
    whole = [ids[: len(ids) // length * length].reshape(-1, length) for ids in train]
    rest = np.concatenate([x for ids in train for x in (ids[len(ids) // length * length :], np.array([end], dtype=np.uint16))])
    packed = rest[: len(rest) // length * length].reshape(-1, length)
    within = np.concatenate(whole)
    # A row packed from short files has little that only full attention sees; but short files are text too: a quarter of the rows.
    count = min(len(within), rows - min(len(packed), rows // 4))
    if count + len(packed) < rows:
        sys.exit(f"distil_data: --rows must be at most {count + len(packed)}, what the text gives; got {rows}")
    return np.concatenate([within[:count], packed[: rows - count]]), count


def stored(files: list[File], ids: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "ids": np.concatenate(ids),
        "offsets": np.cumsum([0, *map(len, ids)]),
        "names": np.array([f"{f.source}: {f.name}" for f in files]),
    }


def table(files: list[File], ids: list[np.ndarray]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for file, tokens in zip(files, ids, strict=True):
        entry = found.setdefault(file.source, {"files": 0, "bytes": 0, "tokens": 0})
        for name, value in (("files", 1), ("bytes", len(file.text.encode())), ("tokens", len(tokens))):
            entry[name] += value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2448, help="2448 of 8192 tokens: 20.05 M")
    parser.add_argument("--length", type=int, default=8192)
    options = parser.parse_args()
    train, held_out, dropped = choose(sources())
    unseen = list(repository())
    print(f"{len(train)} training files, {len(held_out)} held out; dropped: {dict(dropped)}")
    tokenizer = smollm2.load_tokenizer(smollm2.find_weights())
    train_ids, held_ids, unseen_ids = (encode(files, tokenizer) for files in (train, held_out, unseen))
    rows, within = rows_of(train_ids, separator(tokenizer), options.length, options.rows)
    options.output.mkdir(parents=True, exist_ok=True)
    np.save(options.output / "train.npy", rows)
    facts = {
        "python": sys.version.split()[0],
        "available": {"train": table(train, train_ids), "held out": table(held_out, held_ids), "unseen": table(unseen, unseen_ids)},
        "dropped": dict(dropped),
        "train rows": list(rows.shape),
        "train tokens": int(rows.size),
        "rows within one file": within,
        "sha256": {"train": hashlib.sha256(rows.tobytes()).hexdigest()},
    }
    for name, files, ids in (("heldout", held_out, held_ids), ("unseen", unseen, unseen_ids)):
        arrays = stored(files, ids)
        np.savez_compressed(options.output / f"{name}.npz", **arrays)
        facts["sha256"][name] = hashlib.sha256(arrays["ids"].tobytes()).hexdigest()
    (options.output / "data.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
