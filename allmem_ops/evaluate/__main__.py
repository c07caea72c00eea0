"""Command line of the evaluation: every foreseeable error is one sentence."""

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from allmem_ops import AllMemConfig
from allmem_ops._command_line import Problem, check_device, check_installed, check_memory, load_model
from allmem_ops.demo import smollm2

NEEDED = ("transformers", "safetensors", "tqdm", "numpy")
ARM_KEYS = ("full", "ntk", "window", "allmem", "writes-off", "adapter", "linear")
PART_NAMES = ("rows", "long", "short", "needles", "speed")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m allmem_ops.evaluate",
        description="Compare a converted model with other ways to read the same text: loss by position, recovery, retrieval, speed, cache.",
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model", default=smollm2.NAME, help=f"{smollm2.NAME} (default), a GGUF file of it, or a transformers name or directory"
    )
    checkpoint = {"type": Path, "nargs": "+", "default": [], "metavar": "FOLDER"}
    what.add_argument("--memory", **checkpoint, help="what allmem_ops.hf.save_memory wrote, also of several seeds; default: a silent one")
    what.add_argument("--adapter", **checkpoint, help="memories trained with writes off, for the arm 'adapter'")
    what.add_argument("--linear", **checkpoint, help="linear memories, for the arm 'linear'")
    what.add_argument("--arms", nargs="+", default=None, metavar="ARM", help=f"of {', '.join(ARM_KEYS)}; default: all that are given")
    what.add_argument("--parts", nargs="*", default=list(PART_NAMES), metavar="PART", help=f"of {', '.join(PART_NAMES)}; default: all")
    what.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-evaluation-harness, for every arm")
    what.add_argument("--task-path", type=Path, help="a folder with more tasks for it (YAML)")
    what.add_argument("--task-limit", type=int, help="texts a task (default: all)")
    what.add_argument("--task-length", type=int, help="the longest text of a task, in tokens (default: what the model was trained to)")
    how = parser.add_argument_group("how")
    how.add_argument("--window", type=int, nargs="+", default=[512], help="default: 512; with several, one evaluation each")
    how.add_argument("--chunk", type=int, nargs="+", default=[256], help="one for each window (default: 256)")
    how.add_argument("--sinks", type=int, default=64)
    how.add_argument("--ntk-factor", type=float, default=2.0, help="dynamic NTK's factor (default: 2)")
    how.add_argument("--segment", type=int, default=8192, help="tokens that a constant cache reads at a time (default: 8192)")
    how.add_argument("--tokens-per-pass", type=int, default=32768, help="rows are read together up to so many tokens (default: 32768)")
    how.add_argument("--needle-lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    how.add_argument("--needle-repeats", type=int, default=6, help="prompts a kind, length and depth (default: 6)")
    how.add_argument("--speed-lengths", type=int, nargs="+", default=[8192, 65536])
    how.add_argument("--impl", choices=("auto", "chunk", "reference", "triton"), default="auto")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one, else cpu")
    how.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the model; default: bfloat16 on cuda, float32 on cpu")
    how.add_argument("--seed", type=int, default=0, help="of a fresh memory, the needles and the resampling (default: 0)")
    files = parser.add_argument_group("files")
    files.add_argument("--texts", type=Path, help="tokens from this file (.npz); made and written to it where there is none")
    files.add_argument("--output", type=Path, default=Path("allmem_evaluation"), help="folder for evaluation.json, .md and .png")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raise `Problem` for whatever can be known before a model is loaded."""
    needed = NEEDED + (("lm_eval",) if options.tasks else ()) + (("gguf", "accelerate") if smollm2.is_smollm2(options.model) else ())
    check_installed(needed, "the evaluation", 'pip install -e ".[eval]" -c constraints.txt')
    for name, allowed in (("arms", ARM_KEYS), ("parts", PART_NAMES)):
        for value in getattr(options, name) or ():
            if value not in allowed:
                raise Problem(f"--{name} must be of {', '.join(allowed)}; got {value!r}")
    if options.arms is None:
        given = [key for key in ("adapter", "linear") if getattr(options, key)]
        options.arms = ["full", "ntk", "window", "allmem", *(["writes-off"] if options.memory else []), *given]
    for key in ("adapter", "linear"):
        if key in options.arms and not getattr(options, key):
            raise Problem(f"--arms {key} needs --{key} FOLDER")
    for name in ("memory", "adapter", "linear"):
        for folder in getattr(options, name):
            check_memory(name, folder)
    if len(options.chunk) != len(options.window) or len(set(options.window)) != len(options.window):
        raise Problem(f"--window must name each window once, and --chunk one for each; got {options.window} and {options.chunk}")
    for window, chunk in zip(options.window, options.chunk, strict=True):
        if not 1 <= chunk <= window:
            raise Problem(f"--chunk must be from 1 to --window {window}, or a token would be in neither; got {chunk}")
    for name in ("segment", "tokens_per_pass", "needle_repeats"):
        if getattr(options, name) < 1:
            raise Problem(f"--{name.replace('_', '-')} must be at least 1; got {getattr(options, name)}")
    device = check_device(options.device)
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"--output {options.output} can't be written: {error.strerror or error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the evaluation; the exit status."""
    options = parse(arguments)
    try:
        check(options)
        evaluate(options)
    except Problem as problem:
        print(f"allmem_ops.evaluate: {problem}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Load, compare, write."""
    # After the checks: these import the extras.
    from allmem_ops.evaluate import texts as texts_file
    from allmem_ops.evaluation.harness import known_tasks

    laps = _Laps()
    try:
        if options.tasks:
            known_tasks(options.tasks, options.task_path)
    except ValueError as error:
        raise Problem(str(error)) from error
    model, tokenizer = load_model(options)
    laps.end("load")
    texts = load_texts(options, tokenizer, texts_file)
    laps.end("texts")
    try:
        convert_model(model, options)
        arms = make_arms(model, options)
        laps.end("convert")
        facts = {"settings": settings(options), "environment": environment(options), "texts": texts_file.describe(texts)}
        for window, chunk in zip(options.window, options.chunk, strict=True):
            output = options.output if len(options.window) == 1 else options.output / f"window-{window}"
            output.mkdir(exist_ok=True)
            one_window(model, arms, tokenizer, texts, make_plan(options, window, chunk), options, facts, output, laps)
    except ValueError as error:
        raise Problem(str(error)) from error


def one_window(
    model: Any,
    arms: list[Any],
    tokenizer: Any,
    texts: Any,
    plan: Any,
    options: argparse.Namespace,
    facts: dict[str, Any],
    output: Path,
    laps: "_Laps",
) -> None:
    """Evaluate at one window; three files in `output`."""
    from allmem_ops.evaluation import report
    from allmem_ops.evaluation.harness import run_tasks
    from allmem_ops.evaluation.run import run

    def save(found: dict[str, Any]) -> None:
        name, by_arm = list(found["seconds"].items())[-1]
        print(f"{name}: {sum(by_arm.values()):.1f} s ({', '.join(f'{arm} {value:.1f}' for arm, value in by_arm.items())})", flush=True)
        write(output / "evaluation.json", json.dumps({**facts, **found}, indent=1))

    found = {**facts, **run(model, arms, tokenizer, texts, plan, progress=bar, on_part=save)}
    laps.end(f"window {plan.window}")
    if options.tasks:
        limits = {"limit": options.task_limit, "max_length": options.task_length}
        found["tasks"] = run_tasks(model, arms, tokenizer, options.tasks, task_path=options.task_path, **limits)
        laps.end(f"tasks, window {plan.window}")
    found["seconds_of_all"] = dict(laps.seconds)
    write(output / "evaluation.json", json.dumps(found, indent=1))
    text = report.text(found)
    write(output / "evaluation.md", text + "\n")
    print(f"\n{text}\n\nWritten: {output}/evaluation.json, {output}/evaluation.md")
    try:
        image = report.picture(found, output / "evaluation.png")
    except ImportError as error:
        print(error)
    else:
        print(f"Written: {image}" if image else "No picture: nothing to draw")


def make_plan(options: argparse.Namespace, window: int, chunk: int) -> Any:
    from allmem_ops.evaluation.run import Plan

    return Plan(
        window=window,
        sinks=options.sinks,
        chunk_size=chunk,
        parts=tuple(options.parts),
        segment=options.segment,
        tokens_per_pass=options.tokens_per_pass,
        needle_lengths=tuple(options.needle_lengths),
        needle_repeats=options.needle_repeats,
        speed_lengths=tuple(options.speed_lengths),
        seed=options.seed,
    )


class _Laps:
    """Seconds from one call of `end` to the next, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 2), now


def load_texts(options: argparse.Namespace, tokenizer: Any, texts_file: Any) -> Any:
    """The texts of `--texts`, or built."""
    if options.texts is not None and options.texts.is_file():
        try:
            return texts_file.load(options.texts)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise Problem(f"--texts {options.texts} is not a file of texts that this command wrote") from error
    texts = texts_file.build(tokenizer)
    if options.texts is not None:
        try:
            texts_file.save(texts, options.texts)
        except OSError as error:
            raise Problem(f"--texts {options.texts} can't be written: {error.strerror or error}") from error
    return texts


def convert_model(model: Any, options: argparse.Namespace) -> None:
    """With the checkpoint's config, or with a fresh and silent memory."""
    from allmem_ops.hf import convert, load_memory, reconfigure

    torch.manual_seed(options.seed)
    if options.memory:
        load_memory(model, options.memory[0])
        reconfigure(model, impl=options.impl)
    else:
        convert(model, AllMemConfig(window=options.window[0], sinks=options.sinks, chunk_size=options.chunk[0], impl=options.impl))


def make_arms(model: Any, options: argparse.Namespace) -> list[Any]:
    """The arms that were asked for; where there are several checkpoints of a kind, one each."""
    from allmem_ops.evaluation.arms import ARMS, LINEAR, NTK, checkpoint_arm, linear_arm, ntk_arm
    from allmem_ops.evaluation.linear import load_linear
    from allmem_ops.hf.checkpoint import read_memory

    arms = []
    for key in options.arms:
        folders = checkpoints(options, key)
        if key == NTK:
            found = [ntk_arm(options.ntk_factor)]
        elif key in ARMS and len(folders) < 2:
            found = [ARMS[key]]
        elif key == LINEAR:
            found = [linear_arm(load_linear(model, folder)) for folder in folders]
        else:  # on the model's device: an arm is entered once a pass
            parameters = [read_memory(model, folder) for folder in folders]
            found = [checkpoint_arm(key, {name: t.to(model.device) for name, t in each.items()}) for each in parameters]
        arms += [arm if name == key else arm.named(name.partition("#")[2]) for arm, name in zip(found, arm_keys(options, key), strict=True)]
    return arms


def checkpoints(options: argparse.Namespace, key: str) -> list[Path]:
    """The folders that an arm's memories are read from."""
    return {"allmem": options.memory, "adapter": options.adapter, "linear": options.linear}.get(key, [])


def arm_keys(options: argparse.Namespace, key: str) -> list[str]:
    """An arm's names in results: its own, or one for each of several checkpoints."""
    folders = checkpoints(options, key)
    return [f"{key}#{_name(folder)}" for folder in folders] if len(folders) > 1 else [key]


def _name(folder: Path) -> str:
    """`allmem-seed1` for runs/allmem-seed1/memory."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "memory" else folder.name


@contextmanager
def bar(title: str, amount: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar, gone when it is full."""
    from tqdm import tqdm

    with tqdm(total=amount, desc=f"  {title}", unit_scale=True, dynamic_ncols=True, leave=False) as progress:
        yield progress.update


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return json.loads(json.dumps(vars(options), default=str))


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Card, versions, commit."""
    import transformers

    card = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "cpu"
    root = Path(__file__).parents[2]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
    return {"device": card, "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit.stdout.strip() or None}


def write(path: Path, text: str) -> None:
    """Beside its name first, then into place."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
