"""The long run and its ablations: SmolLM2's memory distilled at 8192 tokens, with fixed seeds, in as many calls as it takes.

    python -m benchmarks.distil_data --output DATA                                   # once: the token files
    python -m benchmarks.distil_run --data DATA --output OUT --seconds 380           # again and again, until it says "finished"
    python -m benchmarks.distil_run --data DATA --output OUT --tokens 4e6 --name post_write --norm post_write
    python -m benchmarks.distil_run --data DATA --output OUT --tokens 4e6 --seconds 560 --arms benchmarks/distil_arms.txt

An arms file has an arm a line, its name and its flags; what has finished is passed over. OUT/NAME-seedN/ holds what
`allmem_ops.training.train` writes (log.jsonl, checkpoints/, memory/) and result.json: settings, card, tokens a second, peak
memory, and held-out loss and KL beyond the window for full attention, window + the same sinks, the arm, and the arm with its
writes off. The recipe: windows and chunks drawn from 256 to 2048 (no chunk longer than its window), sinks from 0 to 128, forward
KL over all positions, AdamW, WSD. A stopped run goes on exactly where it was; `benchmarks.carry` takes a run to another machine. Arms:

    --no-writes            eta = 0: an adapter beside the window
    --norm post_write      the weights normalised after the write (--norm none: not at all)
    --no-momentum          mu starts at 1e-6 and stays there: its gradient is of that size too
    --hidden 64|128|256    hidden width of the memory's network
    --layers every_second  a memory in the layers 1, 3, 5, ... (--layers 12-25: in those)
    --fixed-start          the initial weights W_0 stay as drawn
    --memory linear        the gated delta rule in the memory's place, with as many parameters
    --memory exact         a control: softmax attention over the whole past in the memory's place; one arm a process
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allmem_ops import AllMemConfig
from allmem_ops.evaluation.arms import ALLMEM, FULL, NO_WRITES, WINDOW
from allmem_ops.evaluation.linear import use_linear_memory
from allmem_ops.evaluation.scoring import evaluate, teacher_hidden
from allmem_ops.hf import centre_memory, convert, memory_mode, memory_parameters, reconfigure
from allmem_ops.layers import memory as memory_layer
from allmem_ops.training import Distillation, Recipe, Step, TokenRows, compile_blocks, plain_blocks, train
from benchmarks.measure import environment
from benchmarks.peers.exact_memory import exact_memory
from benchmarks.training_speed import load_smollm2

# What scoring and saving at the end of a call take on an H100.
MARGIN = 20.0
WINDOWS = ((512, 256), (1024, 512))  # window and chunk of the scores; 64 sinks
# Fields of AllMemConfig that decide how a memory starts
NUMBERS = ("eta_init", "mu_init", "gate_init", "w_init_scale", "alpha_lr_scale")
WORDS = ("qk_init", "conv_init", "projection_init", "feature_init", "qk_activation", "gate")
START = (*NUMBERS, *WORDS, "residual")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--data", type=Path, required=True, help="folder of benchmarks.distil_data")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="GGUF file, or a folder of save_pretrained; default: what the demo finds")
    parser.add_argument("--name", default="allmem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="of this whole call; it stops in time to save")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arms", type=Path, help="a file of arms, run one after the other until --seconds have passed")
    parser.add_argument("--score-rows", type=int, default=16, help="held-out rows scored at the end; 0: none")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--tokens", type=float, default=20_054_016)
    recipe.add_argument("--length", type=int, default=8192)
    recipe.add_argument("--rows", type=int, default=2, help="of a step")
    recipe.add_argument("--lr", type=float, default=2e-3)
    recipe.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    recipe.add_argument("--decay", type=float, default=0.3, help="share of the steps")
    recipe.add_argument("--grad-clip", type=float, default=1.0)
    recipe.add_argument("--window", type=int, nargs=2, default=(256, 2048))
    recipe.add_argument("--chunk", type=int, nargs=2, default=(256, 2048))
    recipe.add_argument("--sinks", type=int, nargs=2, default=(0, 128))
    recipe.add_argument("--save-every", type=int, default=0, help="steps; 0: at the end of a call")
    recipe.add_argument("--draws", type=int, default=0, help="distinct windows, sinks and chunks; 0: drawn anew each step")
    recipe.add_argument("--cuda-graph", action=switch, default=False, help="a CUDA graph for each of --draws")
    recipe.add_argument("--compile", action=switch, default=False, help="norms and MLPs by torch.compile")
    arm = parser.add_argument_group("arm")
    arm.add_argument("--writes", action=switch, default=True)
    arm.add_argument("--norm", choices=("pre_write", "post_write", "none"), default="pre_write")
    arm.add_argument("--momentum", action=switch, default=True)
    arm.add_argument("--hidden", type=int, default=None)
    arm.add_argument("--layers", default="all", help="all, every_second, or the first and the last as in 12-25")
    arm.add_argument("--heads", type=int, default=None)
    arm.add_argument("--fixed-start", action="store_true")
    arm.add_argument("--memory", choices=("allmem", "linear", "exact"), default="allmem")
    arm.add_argument("--impl", choices=("auto", "chunk"), default="auto")
    start = parser.add_argument_group("start, as in AllMemConfig")
    for name in NUMBERS:
        start.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(AllMemConfig, name))
    for name in WORDS:
        start.add_argument(f"--{name.replace('_', '-')}", default=getattr(AllMemConfig, name))
    start.add_argument("--centre", action=switch, default=False, help="centre_memory on a row of the data")
    start.add_argument("--residual", action=switch, default=AllMemConfig.residual)
    return parser.parse_args(words)


def build(base: Any, options: argparse.Namespace) -> Any:
    """The arm's model, on a copy of the base weights."""
    model = copy.deepcopy(base)
    torch.manual_seed(options.seed)
    (window, chunk), layers = WINDOWS[0], model.config.num_hidden_layers
    config = AllMemConfig(
        window=window,
        sinks=64,
        chunk_size=chunk,
        norm=options.norm,
        hidden_dim=options.hidden,
        heads=options.heads,
        memory_layers=chosen_layers(options.layers, layers),
        impl=options.impl,
        **{name: getattr(options, name) for name in START},
    )
    convert(model, config if options.momentum else config.replace(mu_init=1e-6))
    if options.memory == "linear":
        use_linear_memory(model)
    if options.memory == "exact":
        memory_layer.ttt_mlp = exact_memory
        memory_layer.MemoryBranch._fused = lambda *_: None
    if options.fixed_start:
        for name, p in memory_parameters(model).items():
            p.requires_grad_(name.rpartition(".")[2] not in ("w_gate", "w_up", "w_down"))
    return model


def chosen_layers(words: str, layers: int) -> tuple[int, ...] | None:
    if words == "all":
        return None
    if words == "every_second":
        return tuple(range(1, layers, 2))
    first, last = (int(word) for word in words.split("-"))
    return tuple(range(first, last + 1))


def held_out_rows(path: Path, length: int, count: int) -> torch.Tensor:
    """Rows within one held-out file each, at most two of a file, the standard library's first."""
    with np.load(path) as file:
        ids, offsets, names = file["ids"], file["offsets"], file["names"]
    rows = []
    for index in sorted(range(len(names)), key=lambda i: not str(names[i]).startswith("standard library")):
        start, end = offsets[index], offsets[index + 1]
        rows += [ids[at : at + length] for at in range(start, min(end - length + 1, start + 2 * length), length)]
    return torch.from_numpy(np.stack(rows[:count]).astype(np.int64))


def scores(model: Any, rows: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Loss and KL beyond the window, and the share of the window's loss that the arm takes back."""
    model.eval()
    own = ALLMEM if options.writes else NO_WRITES
    arms = (FULL, WINDOW, own) if own == NO_WRITES or options.memory != "allmem" else (FULL, WINDOW, ALLMEM, NO_WRITES)
    found = {}
    teacher = teacher_hidden(model, rows, rows_per_pass=2)
    for window, chunk in WINDOWS:
        reconfigure(model, window=window, chunk_size=chunk, sinks=64)
        result = evaluate(model, rows, teacher, first_position=window, arms=arms, chunk_size=2048, rows_per_pass=2)
        entry = {arm: {"loss": s.loss, "kl": s.kl} for arm, s in result.items()}
        gap = result[WINDOW].loss - result[FULL].loss
        entry["recovery"] = (result[WINDOW].loss - result[own].loss) / gap
        entry["kl recovery"] = 1 - result[own].kl / result[WINDOW].kl
        found[f"window {window}, chunk {chunk}"] = entry
    model.train()
    return found


def main() -> None:
    started = time.perf_counter()
    words = sys.argv[1:]
    options = arguments(words)
    base = load_smollm2(options.weights, torch.bfloat16 if options.device.startswith("cuda") else torch.float32, options.device)
    lines = [["--name", options.name]]
    if options.arms:
        lines = [["--name", *line.split()] for line in options.arms.read_text().splitlines() if line.strip()]
    for line in lines:
        one = arguments([*words, *line])
        left = None if options.seconds is None else options.seconds - (time.perf_counter() - started)
        if left is not None and left < 2 * MARGIN and line is not lines[0]:
            print(f"{one.name}: not started, {left:.0f} s are left", flush=True)
            continue
        run_arm(base, one, left)
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def run_arm(base: Any, options: argparse.Namespace, seconds: float | None) -> None:
    started = time.perf_counter()
    output = options.output / f"{options.name}-seed{options.seed}"
    if (output / "result.json").is_file() and json.loads((output / "result.json").read_text())["finished"]:
        print(f"{output.name}: finished before", flush=True)
        return
    rows = TokenRows.load(options.data / "train.npy", length=options.length, seed=options.seed)
    steps = int(options.tokens) // (options.rows * options.length)
    recipe = Recipe(
        steps=steps,
        lr=options.lr,
        warmup=int(options.warmup * steps),
        decay=int(options.decay * steps),
        grad_clip=options.grad_clip,
        window=tuple(options.window),
        sinks=tuple(options.sinks),
        chunk_size=tuple(options.chunk),
        distinct_draws=options.draws,
        seed=options.seed,
    )
    model = build(base, options)
    if options.centre:
        centre_memory(model, rows.batch(0, 2).ids.to(options.device))
    if options.compile:
        compile_blocks(model)
    run = Distillation(model, recipe, cuda_graph=options.cuda_graph)
    cuda = options.device.startswith("cuda")
    print(
        f"{output.name}: {steps} steps of {options.rows} x {options.length}, built after {time.perf_counter() - started:.1f} s", flush=True
    )
    at = [time.perf_counter(), 0]

    def show(step: Step) -> None:
        at[1] += 1
        if step.index in (0, 4) or (step.index + 1) % 20 == 0 or step.index + 1 == steps:
            now = time.perf_counter()
            speed = at[1] * step.tokens / (now - at[0])
            gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
            print(f"step {step.index + 1}/{steps} KL {step.kl:.4f} norm {step.grad_norm:.3g} {speed:,.0f} tokens/s {gib:.1f} GiB "
                  f"{now - started:.0f} s", flush=True)  # fmt: skip
            at[:] = [now, 0]

    if seconds is not None:
        seconds = max(1.0, seconds - MARGIN - (time.perf_counter() - started))
    with nullcontext() if options.writes else memory_mode(model, "no_writes"):
        outcome = train(run, rows, rows_per_step=options.rows, output=output, seconds=seconds, save_every=options.save_every, on_step=show)
    result = {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
        "recipe": recipe.to_dict(),
        "environment": environment(options.device),
        "added parameters": sum(p.numel() for p in memory_parameters(model).values()),
        "model parameters": sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in memory_parameters(model).values()),
        "steps": run.index,
        "tokens": run.index * options.rows * options.length,
        "skipped": outcome.skipped,
        "finished": outcome.finished,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    }
    if len(outcome.steps) > 10:
        timed = outcome.steps[5:]
        result["tokens_per_second"] = sum(s.tokens for s in timed) / sum(s.seconds for s in timed)
    if options.score_rows:
        plain_blocks(model)
        if cuda:
            torch.cuda.empty_cache()
        held_out = held_out_rows(options.data / "heldout.npz", options.length, options.score_rows).to(options.device)
        result["held-out tokens"] = held_out.numel()
        result["scores"] = scores(model, held_out, options)
        print(json.dumps(result["scores"]), flush=True)
    result["seconds of the last call"] = time.perf_counter() - started
    part = output / "result.part"
    part.write_text(json.dumps(result, indent=1))
    os.replace(part, output / "result.json")
    where = "finished" if outcome.finished else "call it again to go on"
    print(f"{output.name}: {run.index} of {steps} steps, {result['seconds of the last call']:.0f} s: {where}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
