"""Command line: every foreseeable error is one sentence."""

import argparse
import dataclasses
import gc
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from allmem_ops._command_line import Problem, check_installed

NEEDED = ("transformers", "safetensors", "accelerate", "tqdm", "numpy")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="python -m allmem_ops.train",
        description="Distil the memory of a converted causal LM from the same weights with full attention. Only the memory trains. "
        "Call it again with the same arguments to go on after a break. Several processes: accelerate launch -m allmem_ops.train ...",
    )
    made.add_argument("--model", required=True, help="folder, Hub name or .gguf file of a Llama, Mistral, Qwen2 or Qwen3 causal LM")
    made.add_argument("--data", type=Path, required=True, help="token ids: .npy [rows, length] or [tokens], or .npz with ids and mask")
    made.add_argument("--output", type=Path, required=True, help="folder for log.jsonl, checkpoints/ and memory/")
    made.add_argument("--memory", type=Path, help="start from this trained memory (a folder of save_memory) and its config")
    made.add_argument("--seed", type=int, default=0, help="of the memory's first weights, the draws and the order of the data (default: 0)")

    reads = made.add_argument_group("what the student reads with; two numbers are a range to draw from at every step")
    reads.add_argument("--window", type=int, nargs="+", default=[256, 2048], metavar="TOKENS")
    reads.add_argument("--sinks", type=int, nargs="+", default=[0, 128], metavar="TOKENS")
    reads.add_argument(
        "--chunk", type=int, nargs="+", default=[256, 2048], metavar="TOKENS", help="of the memory; never drawn above the window"
    )
    reads.add_argument(
        "--draws", type=int, default=0, metavar="N", help="the steps share N draws, spread over the ranges (default: each has its own)"
    )
    reads.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of AllMemConfig, values in JSON: hidden_dim=256")

    size = made.add_argument_group("size")
    size.add_argument("--length", type=int, help="tokens of a row; cuts longer ones (default: the data's)")
    size.add_argument("--batch", type=int, default=1, help="rows of a step and process (default: 1)")
    amount = size.add_mutually_exclusive_group(required=True)
    amount.add_argument("--steps", type=int)
    amount.add_argument("--tokens", type=float, help="of all processes together; gives the steps")
    size.add_argument("--seconds", type=float, help="save and stop after this time; call again to go on")
    size.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="between checkpoints (default: 200)")

    rates = made.add_argument_group("optimizer")
    rates.add_argument("--lr", type=float, default=1e-4, help="peak rate; alpha has alpha_lr_scale times as much (default: 1e-4)")
    rates.add_argument("--warmup", type=float, default=0.05, metavar="SHARE", help="of the steps (default: 0.05)")
    rates.add_argument("--decay", type=float, default=0.2, metavar="SHARE", help="of the steps (default: 0.2)")
    rates.add_argument("--weight-decay", type=float, default=0.0)
    rates.add_argument("--grad-clip", type=float, default=1.0)

    how = made.add_argument_group("how")
    how.add_argument("--loss", choices=("all", "response"), default="all", help="tokens that count; response: those of the data's mask")
    how.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the frozen weights; the memory is fp32 (default: bfloat16)"
    )
    how.add_argument("--gradient-checkpointing", action="store_true", help="recompute each layer in backward")
    how.add_argument("--compile", action="store_true", help="fuse the frozen norms and MLPs by torch.compile")
    how.add_argument("--cuda-graph", action="store_true", help="replay a CUDA graph for every draw, so that no step waits for Python")
    how.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    how.add_argument("--quiet", action="store_true", help="no progress bar")
    return made


def run(arguments: Sequence[str] | None = None) -> Any:
    """Train as the command line says; the `Distillation`, for who wants to look at it.

    Raises:
        Problem: what stands in the way, as one sentence.
        ValueError: likewise, from the library's own checks.
    """
    options = parser().parse_args(arguments)
    check_installed(NEEDED, "training", 'pip install "allmem-ops[train]"')
    # After the check: these import the extras.
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from allmem_ops.hf.load import checkpoint_layers
    from allmem_ops.train.report import Progress
    from allmem_ops.training import Distillation, TokenRows, compile_blocks, train

    _check(options)
    rows = TokenRows.load(options.data, length=options.length, seed=options.seed)
    if options.loss == "response" and rows.mask is None:
        raise Problem(f"--loss response needs a mask: {options.data} holds ids alone, and an .npz file with `ids` and `mask` is wanted")
    if options.loss == "all":
        rows.mask = None
    accelerator = Accelerator(cpu=options.cpu)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # DeepSpeed asks, and there is no DataLoader that it could read it from
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.batch
    processes = accelerator.num_processes
    rows_per_step = options.batch * processes
    steps = options.steps or math.ceil(options.tokens / (rows_per_step * rows.length))
    recipe, config = _recipe(options, steps), _config(options)
    set_seed(options.seed)
    model = _model(options, config, rows).to(accelerator.device)
    if options.gradient_checkpointing:
        checkpoint_layers(model)
    if options.compile:
        compile_blocks(model)
    run = Distillation(model, recipe, accelerator=accelerator, cuda_graph=options.cuda_graph)
    main = accelerator.is_main_process
    progress = Progress(steps, processes, options.output / "tensorboard" if main else None, shown=main and not options.quiet)
    try:
        outcome = train(
            run,
            rows,
            rows_per_step=rows_per_step,
            output=options.output,
            seconds=options.seconds,
            save_every=options.save_every,
            on_step=progress,
        )
    finally:
        progress.close()
    if main:
        tokens = len(outcome.steps) * rows_per_step * rows.length
        where = (
            f"the memory is in {options.output / 'memory'}" if outcome.finished else f"step {run.index} of {steps}: call it again to go on"
        )
        print(f"{tokens:,} tokens in {outcome.seconds:.0f} s, {outcome.skipped} steps skipped; {where}", flush=True)
    return run


def _check(options: argparse.Namespace) -> None:
    for name in ("batch", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise Problem(f"--{name} must be at least 1; got {getattr(options, name)}")
    for name in ("tokens", "seconds"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            raise Problem(f"--{name} must be greater than 0; got {getattr(options, name)}")
    for name in ("warmup", "decay"):
        if not 0 <= getattr(options, name) <= 1:
            raise Problem(f"--{name} must be a share from 0 to 1; got {getattr(options, name)}")
    if options.warmup + options.decay > 1:
        raise Problem(f"--warmup and --decay must be at most 1 together; got {options.warmup + options.decay}")
    for name in ("window", "sinks", "chunk"):
        if len(getattr(options, name)) > 2:
            raise Problem(f"--{name} takes one number or two; got {len(getattr(options, name))}")
    if options.cuda_graph and not options.draws and any(len(set(x)) > 1 for x in (options.window, options.sinks, options.chunk)):
        raise Problem("--cuda-graph needs --draws N where window, sinks or chunk are drawn: every draw is a graph of its own")
    if options.cuda_graph and (options.cpu or not torch.cuda.is_available()):
        raise Problem("--cuda-graph needs a GPU")
    if options.cuda_graph and options.gradient_checkpointing:
        raise Problem("--cuda-graph and --gradient-checkpointing exclude one another")
    if not options.data.is_file():
        raise Problem(f"--data {options.data} is not there")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"--output {options.output} can't be written: {error.strerror or error}") from error
    if not os.access(options.output, os.W_OK):
        raise Problem(f"--output {options.output} can't be written")


def _config(options: argparse.Namespace) -> Any:
    """The AllMemConfig; None where a trained memory brings its own."""
    from allmem_ops import AllMemConfig

    if options.memory is not None:
        if options.set:
            raise Problem("--set has no place beside --memory, which brings its own config")
        return None
    fields = {"window": options.window[-1], "sinks": options.sinks[-1], "chunk_size": min(options.chunk[-1], options.window[-1])}
    return AllMemConfig(**fields | _fields(options.set))


def _model(options: argparse.Namespace, config: Any, rows: Any) -> Any:
    """The converted model, on the CPU."""
    from allmem_ops.hf import convert, load_memory
    from allmem_ops.hf.load import load_causal_lm

    model = load_causal_lm(options.model, dtype=DTYPES[options.dtype])
    vocabulary = model.get_input_embeddings().num_embeddings
    highest = int(rows.ids.max())
    if highest >= vocabulary:
        raise Problem(f"--data holds the token {highest}, and the model knows {vocabulary}: it was tokenised for another model")
    return convert(model, config) if config is not None else load_memory(model, options.memory)


def _fields(settings: Sequence[str]) -> dict[str, Any]:
    from allmem_ops import AllMemConfig

    known = {field.name for field in dataclasses.fields(AllMemConfig)} - {"window", "sinks", "chunk_size"}
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in known:
            raise Problem(f"--set takes FIELD=VALUE with a field of {', '.join(sorted(known))}; got {setting!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _recipe(options: argparse.Namespace, steps: int) -> Any:
    from allmem_ops.training import Recipe

    window, sinks, chunk = ((x[0], x[-1]) for x in (options.window, options.sinks, options.chunk))
    return Recipe(
        steps=steps,
        lr=options.lr,
        warmup=int(options.warmup * steps),
        decay=int(options.decay * steps),
        weight_decay=options.weight_decay,
        grad_clip=options.grad_clip,
        window=window,
        sinks=sinks,
        chunk_size=chunk,
        distinct_draws=options.draws,
        seed=options.seed,
    )


def finish(run: Any) -> None:
    """End trackers and the process group of a `Distillation`, which can't go on afterwards.

    What wraps the model goes first. DDP's reducer holds the process group too, and where it is the last to let go, under the GIL, Gloo
    joins its threads there, one of which may be waiting for the GIL to give back a collective's tensors: neither goes on.
    `destroy_process_group` lets go without the GIL. (torch 2.13: a reducer kept beyond it hangs every time where a thread still waits.)
    """
    accelerator, run.module = run.accelerator, None
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit status."""
    try:
        finish(run(arguments))
    except (Problem, ValueError) as error:
        print(f"allmem_ops.train: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("allmem_ops.train: the GPU's memory is too small for a step: lower --batch or add --gradient-checkpointing", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
