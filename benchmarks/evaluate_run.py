"""The evaluation of the long run: its memories of all seeds, the adapters and the linear memory, at two windows, from its own token files.

    python -m benchmarks.evaluate_run --data DATA --texts TEXTS.npz                            # once, where the tokenizer is
    python -m benchmarks.evaluate_run --texts TEXTS.npz --runs OUT --output RESULTS            # OUT: of benchmarks.distil_run
    python -m benchmarks.evaluate_run --texts TEXTS.npz --runs OUT --output RESULTS --list     # what it will do, and for how long

Reads OUT/allmem-seed*/memory, OUT/writes-off-seed*/memory (the adapter) and OUT/linear-seed*/memory (other names by --allmem, --adapter,
--linear) at window 512 with chunk 256 and window 1024 with chunk 512, 64 sinks; what it doesn't know is an option of
`python -m allmem_ops.evaluate` (--parts, --model, --needle-repeats, ...). Texts: rows within one held-out file each, at most two of a
file, the standard library's first; rows packed from this repository's files, which no model released before it can have read; held-out
files one after another up to 65,536 tokens a row; the first tokens of each.

The work is cut into pieces, one part of a few arms at one window each, the most telling ones first. A process on every GPU (--workers of
them on each) loads the model once and takes piece after piece, whichever is next; each piece is a file in RESULTS/pieces as soon as it is
done, and RESULTS/window-N/evaluation.json, .md and .png are made of all that are there. So a stopped evaluation loses only what it was at,
and the same command goes on with the rest. A piece that fails is reported and keeps no other from running. With --seconds no piece is
begun that would not be done in time. --warm reads a little with every arm, for the kernels to be compiled, and keeps no result.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allmem_ops._command_line import Problem, load_model
from allmem_ops.demo import smollm2
from allmem_ops.demo.corpus import separator
from allmem_ops.evaluate import __main__ as command
from allmem_ops.evaluate import texts as texts_file
from allmem_ops.evaluation import report
from allmem_ops.evaluation.arms import ADAPTER, ALLMEM, FULL, LINEAR, NO_WRITES, NTK, WINDOW
from allmem_ops.evaluation.run import Texts, merge, run
from allmem_ops.evaluation.table import table

WINDOWS, CHUNKS, SINKS = ("512", "1024"), ("256", "512"), "64"
PER_PASS = "131072"  # the linear memory's chunked form is bound by its launches
ORDER = ("rows", "short", "long", "needles", "speed")
CONTROLS = (FULL, NTK, WINDOW)
# Of one arm with the long run's texts on an H100, once its kernels are compiled.
SECONDS = {"rows": 1.5, "long": 2.0, "needles": 4.5, "short": 0.1, "speed": 6.0}
LINEAR_COST = 3.0  # times as long, in its chunked form: not measured with passes of this size
START = 15.0  # until a process has imported everything and loaded the model
POLL = 0.5

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


@dataclass(frozen=True)
class Piece:
    """One part of the evaluation, at one window, under a few arms."""

    part: str
    window: int
    chunk: int
    arms: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.part}-{self.window}-{'+'.join(self.arms)}".replace("#", ".")

    @property
    def seconds(self) -> float:
        return SECONDS[self.part] * sum(LINEAR_COST if key.startswith(LINEAR) else 1.0 for key in self.arms)


def pieces(options: argparse.Namespace) -> list[Piece]:
    """All of them, the most telling first. Speed is the same for every seed and for a memory that doesn't write; what a memory is whose
    writes were switched off afterwards shows in the rows."""
    groups = [tuple(key for key in CONTROLS if key in options.arms)]
    groups += [(key,) for kind in options.arms if kind not in CONTROLS for key in command.arm_keys(options, kind)]
    groups = [group for group in groups if group]
    firsts = {command.arm_keys(options, kind)[0] for kind in (*CONTROLS, ALLMEM, LINEAR)}
    found: list[Piece] = []
    for part in ORDER:
        for window, chunk in zip(options.window, options.chunk, strict=True):
            for group in groups:
                if (part == "speed" and group[0] not in firsts) or (part != "rows" and group == (NO_WRITES,)) or part not in options.parts:
                    continue
                found.append(Piece(part, window, chunk, group))
    return found


def claimed(folder: Path, piece: Piece) -> bool:
    """Whether the piece is this process's now: not done, and no other has taken it."""
    if (folder / f"{piece.name}.json").is_file():
        return False
    try:
        os.close(os.open(folder / f"{piece.name}.claim", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def work(options: argparse.Namespace, folder: Path, until: float, *, warm: bool) -> None:
    """Take pieces until none is left or the next would last too long."""
    started = time.perf_counter()
    model, tokenizer = load_model(options)
    texts = command.load_texts(options, tokenizer, texts_file)
    command.convert_model(model, options)
    arms: dict[str, Any] = {}
    for kind in options.arms:
        try:
            arms |= {arm.key: arm for arm in command.make_arms(model, argparse.Namespace(**{**vars(options), "arms": [kind]}))}
        except ValueError as error:  # a memory of another form than the first: its pieces fail, the others run
            print(f"{kind}: {error}", flush=True)
    facts = {
        "settings": command.settings(options),
        "environment": command.environment(options),
        "texts": texts_file.describe(texts),
    }
    if warm:
        texts = Texts({name: rows[:1] for name, rows in texts.rows.items()}, texts.long[:1], texts.short[:1], texts.haystack)
    print(f"ready after {time.perf_counter() - started:.1f} s", flush=True)
    for piece in pieces(options):
        if time.time() + piece.seconds > until or not claimed(folder, piece):
            continue
        start = time.perf_counter()
        plan = replace(command.make_plan(options, piece.window, piece.chunk), parts=(piece.part,))
        try:
            found = run(model, [arms[key] for key in piece.arms], tokenizer, texts, plan)
        except Exception:  # whatever a piece fails of: its traceback is kept and printed, and the others run
            (folder / f"{piece.name}.error").write_text(traceback.format_exc())
            print(f"{piece.name}: failed\n{traceback.format_exc()}", flush=True)
            if options.device.startswith("cuda"):
                torch.cuda.synchronize()  # raises where the error has ended the device's context: a new process goes on
            continue
        command.write(folder / f"{piece.name}.json", json.dumps({**facts, **found}))
        print(f"{piece.name}: {time.perf_counter() - start:.1f} s, {piece.seconds:.1f} foreseen", flush=True)


def collect(folder: Path, output: Path) -> list[Path]:
    """Merge what is there, by window; the files written."""
    by_window: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        by_window.setdefault(found["plan"]["window"], []).append(found)
    written = []
    for window, parts in sorted(by_window.items()):
        found = {**{name: parts[0][name] for name in ("settings", "environment", "texts")}, **merge(parts)}
        place = output / f"window-{window}"
        place.mkdir(parents=True, exist_ok=True)
        command.write(place / "evaluation.json", json.dumps(found, indent=1))
        command.write(place / "evaluation.md", report.text(found) + "\n")
        written.append(place / "evaluation.json")
    return written


def devices(options: argparse.Namespace) -> list[dict[str, str]]:
    """The environment of a process on each device: it sees that one alone."""
    if not options.device.startswith("cuda"):
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    _, _, chosen = options.device.partition(":")
    return [{"CUDA_VISIBLE_DEVICES": name} for name in (names if not chosen else [names[int(chosen)]])]


def lead(options: argparse.Namespace, folder: Path, until: float, workers: int, words: Sequence[str], *, keep: bool) -> int:
    """Start the processes, start one again that an error has ended, and merge what they write; the exit status."""
    todo = pieces(options)
    for piece in todo:  # of a call that was stopped
        if not (folder / f"{piece.name}.json").is_file():
            for ending in ("claim", "error"):
                (folder / f"{piece.name}.{ending}").unlink(missing_ok=True)

    def count(ending: str) -> int:
        return sum((folder / f"{piece.name}.{ending}").is_file() for piece in todo)

    def start(place: dict[str, str]) -> tuple[subprocess.Popen, dict[str, str], int]:
        call = [sys.executable, "-m", "benchmarks.evaluate_run", *words, "--worker", str(until)]
        return subprocess.Popen(call, env={**os.environ, **place}), place, count("claim")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the processes end with this one
    running = [start(place) for place in devices(options) for _ in range(workers)]
    merged, status = -1, 0
    try:
        while running:
            for one in list(running):
                process, place, before = one
                if process.poll() is None:
                    continue
                running.remove(one)
                if process.returncode and count("claim") > before:
                    running.append(start(place))
                elif process.returncode:
                    status = process.returncode
            if keep and count("json") != merged:
                merged = count("json")
                collect(folder, options.output)
            time.sleep(POLL)
    finally:
        for process, _, _ in running:
            process.terminate()
    for path in collect(folder, options.output) if keep else ():
        try:
            report.picture(json.loads(path.read_text()), path.with_suffix(".png"))
        except ImportError as error:
            print(error)
        print(f"Written: {path}, .md, .png")
    for piece in todo:
        if not (folder / f"{piece.name}.json").is_file():
            print(f"missing: {piece.name}{', failed' if (folder / f'{piece.name}.error').is_file() else ''}")
            status = status or 1
    return status


def plan_text(todo: list[Piece], processes: int) -> str:
    """What will be done, and how long it is expected to take."""
    rows = []
    for part in dict.fromkeys(piece.part for piece in todo):
        for window in dict.fromkeys(piece.window for piece in todo):
            own = [piece for piece in todo if (piece.part, piece.window) == (part, window)]
            rows.append([part, str(window), str(len(own)), f"{sum(piece.seconds for piece in own):.0f}"])
    whole = START + sum(piece.seconds for piece in todo) / processes
    return f"{table(['part', 'window', 'pieces', 'seconds'], rows)}\n\n{processes} processes: about {whole:.0f} s on H100s"


def arguments(options: argparse.Namespace, more: list[str]) -> list[str]:
    """Those of `python -m allmem_ops.evaluate`."""
    given = ["--texts", str(options.texts), "--output", str(options.output)]
    for kind, name in (("memory", options.allmem), ("adapter", options.adapter), ("linear", options.linear)):
        folders = sorted(options.runs.glob(f"{name}-seed*/memory"))
        if folders:
            given += [f"--{kind}", *map(str, folders)]
    return [*given, "--window", *WINDOWS, "--chunk", *CHUNKS, "--sinks", SINKS, "--tokens-per-pass", PER_PASS, *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of benchmarks.distil_data: make the texts and stop")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--output", type=Path, default=Path("evaluation"))
    for kind, name in ((ALLMEM, "allmem"), (ADAPTER, "writes-off"), (LINEAR, "linear")):
        parser.add_argument(f"--{kind}", default=name, metavar="NAME", help=f"of the runs in --runs (default: {name})")
    parser.add_argument("--workers", type=int, default=1, help="processes on each GPU (default: 1)")
    parser.add_argument("--seconds", type=float, help="of this whole call")
    parser.add_argument("--list", action="store_true", help="print the pieces and what they take, and stop")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    words = sys.argv[1:]
    own, more = parser.parse_known_args(words)
    if own.data:
        weights = smollm2.find_weights()
        texts = build(own.data, smollm2.load_tokenizer(weights))
        texts_file.save(texts, own.texts)
        print(texts_file.describe(texts))
        return
    if own.runs is None:
        parser.error("--runs or --data must be given")
    if own.warm:
        little = [
            "--window",
            WINDOWS[0],
            "--chunk",
            CHUNKS[0],
            "--needle-repeats",
            "1",
            "--needle-lengths",
            "8192",
            "--speed-lengths",
            "8192",
        ]
        more = [*little, *more]
    options = command.parse(arguments(own, more))
    until = time.time() + own.seconds if own.seconds else float("inf")
    folder = own.output / ("warm" if own.warm else "pieces")
    try:
        command.check(options)
        if own.list:
            print(plan_text(pieces(options), own.workers * len(devices(options))))
            return
        folder.mkdir(exist_ok=True)
        if own.worker:
            work(options, folder, own.worker, warm=own.warm)
        else:
            print(f"arms: {', '.join(key for kind in options.arms for key in command.arm_keys(options, kind))}", flush=True)
            sys.exit(lead(options, folder, until, own.workers, words, keep=not own.warm))
    except Problem as problem:
        print(f"evaluate_run: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
