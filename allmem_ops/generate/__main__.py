"""Command line: every foreseeable error is one sentence."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from allmem_ops._command_line import Problem, check_device, check_installed, check_memory, load_model
from allmem_ops.demo import smollm2

NEEDED = ("transformers", "safetensors", "tqdm")
_DTYPES = ("bfloat16", "float16", "float32")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m allmem_ops.generate",
        description="Read a text of any length into a cache of constant size, then go on from it or answer; keep what was read in a file.",
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model", default=smollm2.NAME, help=f"{smollm2.NAME} (default), a GGUF file of it, or a transformers name or directory"
    )
    what.add_argument("--memory", type=Path, help="what allmem_ops.hf.save_memory wrote; default: a fresh memory, which is silent")
    what.add_argument("--prompt-file", type=Path, help="UTF-8 text to read, of any length; - is standard input")
    what.add_argument("--prompt", help="text to read after the file: a question, the start of an answer")
    state = parser.add_argument_group("what has been read")
    state.add_argument("--state-in", type=Path, help="go on from this file, which --state-out wrote")
    state.add_argument("--state-out", type=Path, help="write the cache here after reading --prompt-file, before --prompt")
    how = parser.add_argument_group("how")
    how.add_argument("--max-new-tokens", type=int, default=200, help="0: read only (default: 200)")
    how.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    how.add_argument("--top-k", type=int)
    how.add_argument("--top-p", type=float)
    how.add_argument("--seed", type=int, default=0, help="of the draws and of a fresh memory (default: 0)")
    how.add_argument("--window", type=int, default=4096, help="without --memory (default: 4096)")
    how.add_argument("--sinks", type=int, default=128, help="without --memory (default: 128)")
    how.add_argument("--chunk", type=int, default=2048, help="without --memory (default: 2048)")
    how.add_argument("--segment", type=int, default=4096, help="tokens read at a time: no matter for the result (default: 4096)")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one, else cpu")
    how.add_argument("--dtype", choices=_DTYPES, help="of the model; default: bfloat16 on cuda, float32 on cpu")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raise `Problem` for whatever can be known before a model is loaded."""
    needed = NEEDED + (("gguf", "accelerate") if smollm2.is_smollm2(options.model) else ())
    check_installed(needed, "this", 'pip install -e ".[demo]" -c constraints.txt')
    if options.prompt_file is None and options.prompt is None and options.state_in is None:
        raise Problem("give --prompt-file, --prompt or --state-in: there is nothing to read")
    if options.max_new_tokens and options.prompt_file is None and not options.prompt:
        raise Problem("--max-new-tokens needs a text to go on from: give --prompt (or 0 to write nothing)")
    for name in ("window", "chunk", "segment"):
        if getattr(options, name) < 1:
            raise Problem(f"--{name} must be at least 1; got {getattr(options, name)}")
    for name in ("max_new_tokens", "sinks"):
        if getattr(options, name) < 0:
            raise Problem(f"--{name.replace('_', '-')} must be at least 0; got {getattr(options, name)}")
    if options.memory is not None:
        check_memory("memory", options.memory)
    for name in ("prompt_file", "state_in"):
        path = getattr(options, name)
        if path is not None and str(path) != "-" and not path.is_file():
            raise Problem(f"--{name.replace('_', '-')} {path} is no file")
    if options.state_out is not None and not options.state_out.parent.is_dir():
        raise Problem(f"--state-out {options.state_out} can't be written: {options.state_out.parent} is no folder")
    device = check_device(options.device)
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read and write; the exit status."""
    options = parse(arguments)
    try:
        check(options)
        generate(options)
    except Problem as problem:
        print(f"allmem_ops.generate: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nallmem_ops.generate: stopped", file=sys.stderr)
        return 130
    return 0


def generate(options: argparse.Namespace) -> None:
    """Load, read, keep, write."""
    # After the checks: these import the extras.
    from allmem_ops.generate.reading import start_tokens
    from allmem_ops.hf import load_cache, save_cache
    from allmem_ops.inference import Decoder, Sampling

    model, tokenizer = load_model(options)
    convert_model(model, options)
    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        cache = None if options.state_in is None else load_cache(model, options.state_in)
        decoder = Decoder(model, cache, sampling=sampling, seed=options.seed)
    except ValueError as error:
        raise Problem(str(error)) from error
    if decoder.cache.batch_size != 1:
        raise Problem(f"--state-in {options.state_in} must hold one sequence; got {decoder.cache.batch_size}")
    if options.prompt_file is not None:
        read_file(decoder, tokenizer, options)
    if options.state_out is not None:
        try:
            path = save_cache(model, decoder.cache, options.state_out)
        except OSError as error:
            raise Problem(f"--state-out {options.state_out} can't be written: {error.strerror or error}") from error
        say(f"Kept what was read ({decoder.cache.get_seq_length()} tokens) in {path}, {path.stat().st_size / 1e6:.1f} MB")
    if options.prompt:
        ids = tokenizer(options.prompt, add_special_tokens=False).input_ids
        if not decoder.cache.get_seq_length():
            ids = start_tokens(tokenizer) + ids
        decoder.read(torch.tensor([ids]), segment=options.segment)
    if options.max_new_tokens:
        answer(decoder, tokenizer, options)


def convert_model(model: Any, options: argparse.Namespace) -> None:
    """With the saved memory, or with a fresh one, which adds nothing: window and sinks alone."""
    from allmem_ops import AllMemConfig
    from allmem_ops.hf import convert, load_memory

    torch.manual_seed(options.seed)
    try:
        if options.memory is not None:
            load_memory(model, options.memory)
        else:
            convert(model, AllMemConfig(window=options.window, sinks=options.sinks, chunk_size=options.chunk))
    except ValueError as error:
        raise Problem(str(error)) from error


def read_file(decoder: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """The prompt file, segment by segment, with a bar over its bytes."""
    from tqdm import tqdm

    from allmem_ops.generate.reading import segments

    path, cache = options.prompt_file, decoder.cache
    piped = str(path) == "-"
    before, tokens, speed, started = cache.get_seq_length(), 0, 0.0, time.perf_counter()
    file = sys.stdin.buffer if piped else path.open("rb")
    total = None if piped else path.stat().st_size
    with file, tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, desc="Reading") as bar:
        try:
            for segment in segments(file, tokenizer, options.segment, first=not before):
                decoder.read(segment.ids, segment=options.segment)
                tokens = cache.get_seq_length() - before
                speed = tokens / (time.perf_counter() - started)
                bar.set_postfix_str(f"{tokens} tokens, {speed:.0f} tokens/s, cache {cache.nbytes / 1e6:.1f} MB", refresh=False)
                bar.update(segment.consumed - bar.n)
        except UnicodeDecodeError as error:
            raise Problem(f"--prompt-file {path} must be UTF-8 text: {error.reason}, after {bar.n} bytes that were read") from error
    if not tokens:
        raise Problem(f"--prompt-file {path} is empty")
    say(f"Read {tokens} tokens, {speed:.0f} a second; the cache holds {cache.nbytes} bytes, as it did before the first")


def answer(decoder: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Write the tokens as they come, on standard output."""
    ids: list[int] = []
    shown, started = "", time.perf_counter()
    for block in decoder.stream(options.max_new_tokens):
        ids += block[0].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        whole = text.rstrip("\ufffd")  # a character whose other bytes are still to come
        if whole.startswith(shown):
            print(whole[len(shown) :], end="", flush=True)
            shown = whole
    print(tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :], flush=True)
    say(f"Wrote {len(ids)} tokens, {len(ids) / (time.perf_counter() - started):.0f} a second")


def say(line: str) -> None:
    """Beside the answer, which alone goes to standard output."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
