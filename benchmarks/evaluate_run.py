"""The evaluation of the long run: its memories of all seeds, the adapters and the linear memory, at two windows, from its own token files.

    python -m benchmarks.evaluate_run --data DATA --texts TEXTS.npz                            # once, where the tokenizer is
    python -m benchmarks.evaluate_run --texts TEXTS.npz --runs OUT --output RESULTS            # OUT: of benchmarks.distil_run

Reads OUT/allmem-seed*/memory, OUT/writes-off-seed*/memory (the adapter) and OUT/linear-seed*/memory (other names by --allmem, --adapter,
--linear) and calls `python -m allmem_ops.evaluate` at window 512 with chunk 256 and window 1024 with chunk 512, 64 sinks; what it doesn't
know goes on to that command (--parts, --model, --needle-repeats, ...). Texts: rows within one held-out file each, at most two of a file,
the standard library's first; rows packed from this repository's files, which no model released before it can have read; held-out files
one after another up to 65,536 tokens a row; the first tokens of each.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allmem_ops.demo import smollm2
from allmem_ops.demo.corpus import separator
from allmem_ops.evaluate import __main__ as command
from allmem_ops.evaluate import texts as texts_file
from allmem_ops.evaluation.run import Texts

Documents = list[tuple[str, np.ndarray]]


def documents(path: Path) -> Documents:
    """(name, tokens) of each file, the standard library's first."""
    with np.load(path) as file:
        ids, offsets, names = file["ids"].astype(np.int64), file["offsets"], file["names"]
    found = [(str(name), ids[a:b]) for name, a, b in zip(names, offsets[:-1], offsets[1:], strict=True)]
    return sorted(found, key=lambda document: not document[0].startswith("standard library"))


def within(files: Documents, length: int, most: int) -> torch.Tensor:
    """Rows from the start of each file, at most `most` of one."""
    rows = [ids[at : at + length] for _, ids in files for at in range(0, min(len(ids), most * length) - length + 1, length)]
    return torch.from_numpy(np.stack(rows))


def packed(files: Documents, length: int, end: int) -> torch.Tensor:
    """Rows of the files one after another, a separator between two."""
    stream = np.concatenate([x for _, ids in files for x in (ids, [end])])
    return torch.from_numpy(stream[: len(stream) // length * length].reshape(-1, length))


def build(data: Path, tokenizer: Any, *, rows: int = 16, long_rows: int = 4, short_rows: int = 64) -> Texts:
    held_out, unseen = documents(data / "heldout.npz"), documents(data / "unseen.npz")
    end = separator(tokenizer)
    standard = [d for d in held_out if d[0].startswith("standard library")]
    return Texts(
        rows={
            "held out": within(held_out, texts_file.LENGTH, 2)[:rows],
            "unseen": packed(unseen, texts_file.LENGTH, end)[:rows],
        },
        long=packed(held_out, texts_file.LONG, end)[:long_rows],
        short=within(held_out, texts_file.SHORT, 1)[:short_rows],
        haystack="".join(tokenizer.decode(ids) for _, ids in standard),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of benchmarks.distil_data: make the texts and stop")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--output", type=Path, default=Path("evaluation"))
    for kind, name in (("allmem", "allmem"), ("adapter", "writes-off"), ("linear", "linear")):
        parser.add_argument(f"--{kind}", default=name, metavar="NAME", help=f"of the runs in --runs (default: {name})")
    options, more = parser.parse_known_args()
    if options.data:
        weights = smollm2.find_weights()
        texts = build(options.data, smollm2.load_tokenizer(weights))
        texts_file.save(texts, options.texts)
        print(texts_file.describe(texts))
        return
    if options.runs is None:
        parser.error("--runs or --data must be given")
    arguments = ["--texts", str(options.texts), "--output", str(options.output)]
    for kind, name in (("memory", options.allmem), ("adapter", options.adapter), ("linear", options.linear)):
        folders = sorted(options.runs.glob(f"{name}-seed*/memory"))
        print(f"{kind}: {', '.join(folder.parent.name for folder in folders) or 'none'}")
        if folders:
            arguments += [f"--{kind}", *map(str, folders)]
    sys.exit(command.main([*arguments, "--window", "512", "1024", "--chunk", "256", "512", "--sinks", "64", *more]))


if __name__ == "__main__":
    main()
