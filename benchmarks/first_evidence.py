"""Does writing into the memory help? SmolLM2 distilled to AllMem arms that differ in one thing each, scored on held-out files.

Prepare once, where the tokenizer and the standard library are (writes `tokens_train.npy` and `tokens_heldout.npy`, uint16):

    python -m benchmarks.first_evidence --prepare --data DATA

Then one process an arm, several at a time on one GPU if it has room. The weights are DATA/SmolLM2-135M-Instruct.Q4_1.gguf if that is there,
else those that the demo finds. A machine without a network needs that file (98 MB; `split -b 60M` and `cat` carry it in parts) and, to read
it, the wheels `gguf` and `accelerate` (`pip install --no-deps`):

    python -m benchmarks.first_evidence --data DATA --output OUT --name eta1e-2 --eta-init 1e-2 --seed 0
    python -m benchmarks.first_evidence --data DATA --output OUT --name no-writes --no-writes --seed 0

Each writes OUT/NAME-seedN.json: settings, throughput, training curve, and held-out loss and KL beyond the window for full attention,
window + the same sinks, the arm, and the arm with its writes switched off after training. It is rewritten after every evaluation.
"""

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from allmem_ops import AllMemConfig
from allmem_ops.demo import smollm2
from allmem_ops.demo.corpus import packed_rows, standard_library, whole_rows
from allmem_ops.evaluation.arms import ALLMEM, FULL, LABELS, NO_WRITES, WINDOW
from allmem_ops.evaluation.scoring import evaluate, teacher_hidden, written_share
from allmem_ops.hf import attention as hf_attention
from allmem_ops.hf import convert, memory_mode, memory_parameters
from allmem_ops.layers import memory as memory_layer
from allmem_ops.training import Step, fine_tune
from benchmarks.peers.exact_memory import exact_memory
from benchmarks.peers.flex import swa_flex

TRAIN, HELD_OUT = "tokens_train.npy", "tokens_heldout.npy"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--prepare", action="store_true", help="tokenise the standard library into --data and stop")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help=f"GGUF file; default: DATA/{smollm2.GGUF}, else what the demo finds")
    parser.add_argument("--output", type=Path, default=Path("first_evidence"))
    parser.add_argument("--name", default="arm")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model; the memory is float32")
    parser.add_argument("--seed", type=int, default=0)
    data = parser.add_argument_group("amount")
    data.add_argument("--tokens", type=int, default=2_000_000, help="training tokens")
    data.add_argument("--seq-len", type=int, default=4096)
    data.add_argument("--batch", type=int, default=4, help="rows a step")
    data.add_argument("--eval-rows", type=int, default=24)
    data.add_argument("--eval-every", type=int, default=0, help="steps between evaluations of the arm on 8 rows; 0: at the end only")
    mixer = parser.add_argument_group("mixer")
    mixer.add_argument("--window", type=int, default=512)
    mixer.add_argument("--chunk", type=int, default=256)
    mixer.add_argument("--sinks", type=int, default=64)
    mixer.add_argument("--writes", action=switch, default=True, help="--no-writes trains with eta = 0: an adapter")
    mixer.add_argument("--eta-init", type=float, default=AllMemConfig.eta_init)
    mixer.add_argument("--mu-init", type=float, default=AllMemConfig.mu_init)
    mixer.add_argument("--gate-init", type=float, default=AllMemConfig.gate_init)
    mixer.add_argument("--w-init-scale", type=float, default=AllMemConfig.w_init_scale)
    mixer.add_argument("--residual", action=switch, default=True)
    mixer.add_argument("--conv-init", choices=("uniform", "zero_sum"), default=AllMemConfig.conv_init)
    mixer.add_argument("--qk-init", choices=("independent", "tied"), default=AllMemConfig.qk_init)
    mixer.add_argument("--qk-activation", choices=("silu", "none"), default=AllMemConfig.qk_activation)
    mixer.add_argument("--norm", choices=("pre_write", "post_write", "none"), default="pre_write")
    mixer.add_argument("--grad-clip-inner", type=float, default=None, help="AllMemConfig.grad_clip")
    mixer.add_argument("--heads", type=int, default=None)
    mixer.add_argument("--head-dim", type=int, default=AllMemConfig.head_dim)
    mixer.add_argument("--hidden", type=int, default=None)
    mixer.add_argument("--readout-norm", action=switch, default=True)
    mixer.add_argument("--qk-norm", choices=("rms+l2", "rms", "l2", "none"), default="rms+l2")
    mixer.add_argument(
        "--attention",
        choices=("swa", "flex"),
        default="swa",
        help="flex: compiled FlexAttention computes the windowed attention, to save time",
    )
    mixer.add_argument(
        "--memory", choices=("ttt", "exact"), default="ttt", help="exact: softmax attention over the whole past, as a control"
    )
    mixer.add_argument("--impl", choices=("auto", "chunk", "reference", "triton"), default="chunk")
    outer = parser.add_argument_group("training")
    outer.add_argument("--lr", type=float, default=1e-3)
    outer.add_argument("--alpha-lr-scale", type=float, default=AllMemConfig.alpha_lr_scale)
    outer.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    outer.add_argument("--decay", type=float, default=0.3, help="share of the steps")
    outer.add_argument("--grad-clip", type=float, default=1.0)
    outer.add_argument("--beyond-window", action=switch, default=False, help="train on the positions beyond the window only")
    outer.add_argument("--cuda-graph", action=switch, default=False, help="replay forward and backward as one CUDA graph")
    outer.add_argument("--checkpointing", action=switch, default=False, help="recompute each layer in backward")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> None:
    """Tokenise: training rows packed, held-out rows within one file each, so that all of a token's context is its own file."""
    tokenizer = smollm2.load_tokenizer(options.weights or smollm2.find_weights())
    corpus = standard_library()
    print(corpus.summary())
    options.data.mkdir(parents=True, exist_ok=True)
    train = packed_rows(corpus, corpus.train, tokenizer, length=options.seq_len)
    held_out = whole_rows(corpus, corpus.held_out, tokenizer, length=options.seq_len, per_file=2)
    for name, rows in ((TRAIN, train), (HELD_OUT, held_out)):
        np.save(options.data / name, rows.numpy().astype(np.uint16))
        print(f"{options.data / name}: {list(rows.shape)}, {rows.numel()} tokens")


def load_rows(path: Path, length: int) -> torch.Tensor:
    """`[N, length]` int64; rows longer than `length` are cut into several."""
    rows = torch.from_numpy(np.load(path).astype(np.int64))
    if rows.shape[1] % length:
        sys.exit(f"first_evidence: --seq-len must divide {rows.shape[1]}, the row length of {path}; got {length}")
    return rows.view(-1, length)


def build(options: argparse.Namespace) -> torch.nn.Module:
    model = smollm2.load_model(smollm2.verify(options.weights), dtype=getattr(torch, options.dtype), device=options.device)
    torch.manual_seed(options.seed)
    config = AllMemConfig(
        window=options.window,
        sinks=options.sinks,
        chunk_size=options.chunk,
        heads=options.heads,
        head_dim=options.head_dim,
        hidden_dim=options.hidden,
        norm=options.norm,
        residual=options.residual,
        grad_clip=options.grad_clip_inner,
        eta_init=options.eta_init,
        mu_init=options.mu_init,
        gate_init=options.gate_init,
        w_init_scale=options.w_init_scale,
        readout_norm=options.readout_norm,
        qk_norm=options.qk_norm,
        qk_init=options.qk_init,
        qk_activation=options.qk_activation,
        conv_init=options.conv_init,
        alpha_lr_scale=options.alpha_lr_scale,
        impl=options.impl,
    )
    convert(model, config)
    if options.attention == "flex":
        hf_attention.swa = swa_flex
    if options.memory == "exact":
        memory_layer.ttt_mlp = exact_memory
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


class Record:
    """The arm's JSON file, rewritten whole and moved into place."""

    def __init__(self, options: argparse.Namespace, facts: dict) -> None:
        options.output.mkdir(parents=True, exist_ok=True)
        self.path = options.output / f"{options.name}-seed{options.seed}.json"
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
        self.content = {"settings": settings, **facts, "curve": [], "evaluations": [], "finished": False}

    def save(self, **values: object) -> None:
        self.content.update(values)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1))
        os.replace(part, self.path)


def scores(model: torch.nn.Module, rows: torch.Tensor, options: argparse.Namespace, arms: tuple[str, ...]) -> dict[str, dict]:
    """Loss and KL at the positions beyond the window."""
    model.eval()
    teacher = teacher_hidden(model, rows, rows_per_pass=4)
    found = evaluate(model, rows, teacher, first_position=options.window, arms=arms, chunk_size=2048, rows_per_pass=4)
    model.train()
    return {LABELS[name]: {"kl": s.kl, "loss": s.loss} for name, s in found.items()}


def main() -> None:
    options = arguments()
    if options.prepare:
        prepare(options)
        return
    carried = options.data / smollm2.GGUF
    options.weights = options.weights or (carried if carried.is_file() else smollm2.find_weights())
    train, held_out = (load_rows(options.data / name, options.seq_len) for name in (TRAIN, HELD_OUT))
    steps = options.tokens // (options.batch * options.seq_len)
    if not 1 <= steps <= len(train) // options.batch:
        most = len(train) // options.batch * options.batch * options.seq_len
        sys.exit(f"first_evidence: --tokens must be from one step to {most}, one pass over {TRAIN}; got {options.tokens}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed))
    batches = (train[order[i * options.batch : (i + 1) * options.batch]].to(options.device) for i in range(steps))
    held_out = held_out[: options.eval_rows].to(options.device)
    model = build(options)
    cuda = options.device.startswith("cuda")
    facts = {
        "card": torch.cuda.get_device_name(options.device) if cuda else "cpu",
        "torch": torch.__version__,
        "added_parameters": sum(p.numel() for p in memory_parameters(model).values()),
        "train_tokens": steps * options.batch * options.seq_len,
        "held_out_tokens": held_out.numel(),
    }
    record = Record(options, facts)
    own = ALLMEM if options.writes else NO_WRITES
    record.save(before=scores(model, held_out, options, (FULL, WINDOW)))
    print(json.dumps(record.content["before"]), flush=True)

    clock = [time.perf_counter()]

    def show(step: Step) -> None:
        index = step.index + 1
        record.content["curve"].append([step.index, step.kl, step.grad_norm, step.skipped])
        if index in (1, 5) or index % 20 == 0 or index == steps:
            now = time.perf_counter()
            counted = index - record.content.get("timed_step", 0)
            speed = counted * step.tokens / (now - clock[0])
            memory = torch.cuda.max_memory_allocated(options.device) / 2**30 if cuda else 0.0
            print(f"{options.name} seed {options.seed}: step {index}/{steps} KL {step.kl:.4f} norm {step.grad_norm:.3g} "
                  f"{speed:.0f} tokens/s {memory:.1f} GiB", flush=True)  # fmt: skip
            record.save(timed_step=index, tokens_per_second=speed, peak_memory_gib=memory)
        if options.eval_every and index % options.eval_every == 0 and index < steps:
            record.content["evaluations"].append([index, scores(model, held_out[:8], options, (own,))])
            record.save()
        if index in (1, 5) or index % 20 == 0:
            clock[0] = time.perf_counter()

    model.train()
    with nullcontext() if options.writes else memory_mode(model, "no_writes"):
        result = fine_tune(
            model,
            batches,
            steps=steps,
            lr=options.lr,
            warmup=int(options.warmup * steps),
            decay=int(options.decay * steps),
            grad_clip=options.grad_clip,
            first_position=options.window if options.beyond_window else 0,
            cuda_graph=options.cuda_graph,
            on_step=show,
        )
    after = scores(model, held_out, options, (FULL, WINDOW, ALLMEM, NO_WRITES) if options.writes else (FULL, WINDOW, NO_WRITES))
    alphas = torch.cat([p.detach().abs().flatten() for name, p in memory_parameters(model).items() if name.endswith("alpha")])
    share = written_share(model.eval(), held_out[:1], first_position=options.window) if options.writes else 0.0
    record.save(
        after=after, arm=after[LABELS[own]], written_share=share, mean_abs_alpha=alphas.mean().item(), skipped=result.skipped, finished=True
    )  # fmt: skip
    print(
        json.dumps({"name": options.name, "seed": options.seed, "arm": after[LABELS[own]], "after": after, "written_share": share}),
        flush=True,
    )


if __name__ == "__main__":
    main()
