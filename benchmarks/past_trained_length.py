"""SmolLM2's loss far past the 8192 tokens it was trained for: window + sinks, clamped and absolute sink positions, no memory.

    python -m benchmarks.past_trained_length [--device cuda] [--texts 8] [--output benchmarks/results/cpu/past_trained_length.json]

Long texts (standard-library files, one after the other), read in segments through the constant-size cache. Buckets hold different text,
so the row "same text in range" gives the loss of the same tokens read at positions 4096 to 8192 of a sequence that begins later; the more
texts, the less a bucket depends on what stands in it.
"""

import argparse
import copy
import json
from pathlib import Path

import torch

from allmem_ops import AllMemConfig
from allmem_ops.demo import smollm2
from allmem_ops.demo.corpus import packed_rows, standard_library
from allmem_ops.hf import AllMemCache, convert, memory_mode
from allmem_ops.training import token_losses
from benchmarks.measure import environment
from benchmarks.training_speed import load_smollm2

BUCKETS = ((0, 4096), (4096, 8192), (8192, 12288), (12288, 16384), (16384, 20480))


@torch.no_grad()
def losses(model: torch.nn.Module, ids: torch.Tensor, segment: int = 1024) -> torch.Tensor:
    """[texts, T - 1] cross-entropy of every next token, read segment by segment."""
    cache, hidden = AllMemCache(model, len(ids)), []
    with memory_mode(model, "off"):
        for part in ids.split(segment, 1):
            hidden.append(model.model(part, past_key_values=cache).last_hidden_state)
    last = torch.cat(hidden, 1)[:, :-1]
    return token_losses(last, last, model.lm_head.weight, ids[:, 1:]).cross_entropy.cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", type=Path, help="GGUF file, or a folder of save_pretrained; default: what the demo finds")
    parser.add_argument("--tokens", type=Path, help="uint16 .npy rows instead of the tokenizer and the standard library")
    parser.add_argument("--texts", type=int, default=1, help="how many different texts the losses are averaged over")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    weights = options.weights or smollm2.find_weights()
    length = BUCKETS[-1][1]
    if options.tokens:
        import numpy as np  # noqa: PLC0415 - only with --tokens

        ids = torch.from_numpy(np.load(options.tokens).astype("int64")).flatten()
        ids = ids[: options.texts * (length + 1)].view(options.texts, length + 1)
    else:
        corpus = standard_library()
        ids = packed_rows(corpus, corpus.held_out, smollm2.load_tokenizer(weights), length=length + 1)[: options.texts]
    if len(ids) < options.texts:
        raise SystemExit(f"--texts {options.texts}: the held-out files fill {len(ids)} texts of {length + 1} tokens")
    facts = {
        "environment": environment(options.device),
        "window": options.window,
        "sinks": options.sinks,
        "texts": options.texts,
        "buckets": BUCKETS,
    }
    results: dict[str, list[float]] = {}

    def keep(name: str, values: list[float]) -> None:  # at once: a run that is cut off has shown what it printed
        results[name] = values
        print(f"{name:18s}", " ".join(f"{x:6.3f}" for x in values), flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps({**facts, "loss": results}, indent=1))

    base = load_smollm2(weights, torch.float32, options.device).eval()
    for name, positions, sinks in (
        ("clamped", "clamped", options.sinks),
        ("absolute", "absolute", options.sinks),
        ("no sinks", "clamped", 0),
    ):
        model = copy.deepcopy(base)
        convert(model, AllMemConfig(window=options.window, sinks=sinks, chunk_size=512, sink_positions=positions))
        found = losses(model, ids.to(options.device))
        keep(name, [found[:, a:b].mean().item() for a, b in BUCKETS])
        if name == "clamped":
            again = [losses(model, ids[:, a - 4096 : b + 1].to(options.device))[:, 4096:] for a, b in BUCKETS[1:]]
            keep("same text in range", [results[name][0], *(part.mean().item() for part in again)])
    clamped, in_range = results["clamped"], results["same text in range"]
    print(f"clamped, 12k to 20k against 4k to 8k: {max(clamped[3:]) - clamped[1]:+.3f}")
    print(f"clamped, 12k to 20k against the same text in range: {max(a - b for a, b in zip(clamped[3:], in_range[3:], strict=True)):+.4f}")


if __name__ == "__main__":
    main()
