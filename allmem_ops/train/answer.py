"""`python -m allmem_ops.train.answer`: the student answers prompts once; `--loss response` then trains on its answers."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from allmem_ops._command_line import Problem
from allmem_ops.hf import load_memory, reconfigure
from allmem_ops.hf.load import load_causal_lm, load_tokenizer
from allmem_ops.train.__main__ import DTYPES
from allmem_ops.training.on_policy import answer_prompts


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="python -m allmem_ops.train.answer",
        description="Let a trained student answer prompts, and write prompts and answers as data for allmem_ops.train --loss response.",
    )
    made.add_argument("--model", required=True, help="folder, Hub name or .gguf file")
    made.add_argument("--memory", type=Path, required=True, help="a folder of save_memory")
    made.add_argument("--prompts", type=Path, required=True, help='a line a prompt: JSON, a string or {"prompt": ...}')
    made.add_argument("--output", type=Path, required=True, help=".npz file")
    made.add_argument("--chat", action="store_true", help="put each prompt into the tokenizer's chat template")
    made.add_argument("--window", type=int)
    made.add_argument("--sinks", type=int)
    made.add_argument("--chunk", type=int)
    made.add_argument("--max-new-tokens", type=int, default=512)
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--batch", type=int, default=8, help="prompts of one length answered side by side (default: 8)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def run(arguments: Sequence[str] | None = None) -> None:
    """Answer as the command line says.

    Raises:
        Problem, ValueError: what stands in the way, as one sentence.
    """
    options = parser().parse_args(arguments)
    if options.output.suffix != ".npz":
        raise Problem(f"--output must end in .npz; got {options.output}")
    texts = read_prompts(options.prompts)
    tokenizer = load_tokenizer(options.model)
    prompts = [encode(tokenizer, text, options.chat) for text in texts]
    model = load_memory(load_causal_lm(options.model, dtype=DTYPES[options.dtype]), options.memory).to(options.device)
    reconfigure(model, window=options.window, sinks=options.sinks, chunk_size=options.chunk)
    with tqdm(total=len(prompts), desc="answer", unit="prompt", dynamic_ncols=True) as bar:
        answers = answer_prompts(
            model,
            prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            rows_per_pass=options.batch,
            on_pass=bar.update,
        )
    answers.save(options.output)
    print(f"{len(prompts)} answers, {int(answers.mask.sum()):,} tokens: {options.output}", flush=True)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file of JSON lines."""
    if not path.is_file():
        raise Problem(f"--prompts {path} is not there")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            raise Problem(f'--prompts {path}, line {number}: not JSON; a line is a string or {{"prompt": ...}}') from None
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str) or not text:
            raise Problem(f'--prompts {path}, line {number}: a line is a string or {{"prompt": ...}}')
        found.append(text)
    if not found:
        raise Problem(f"--prompts {path} holds no prompt")
    return found


def encode(tokenizer: Any, text: str, chat: bool) -> torch.Tensor:
    """int64 [length]."""
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    return torch.tensor(tokenizer(text, add_special_tokens=not chat).input_ids, dtype=torch.int64)


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer; the exit status."""
    try:
        run(arguments)
    except (Problem, ValueError) as error:
        print(f"allmem_ops.train.answer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
