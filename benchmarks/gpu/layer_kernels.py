"""What one token mixer launches and keeps: kernels with their times, forward and forward + backward, and the activations' bytes a token.

    python -m benchmarks.gpu.layer_kernels --results benchmarks/results/h100

Qwen3-0.6B's shape, bf16, window 4096, 128 sinks, chunk 2048. Needs a GPU.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from allmem_ops import TokenMixer
from benchmarks.gpu.layers import CONFIG, MODELS
from benchmarks.gpu.timing import FLUSH_BYTES, HEAD_START_CYCLES, Call
from benchmarks.measure import ceilings, environment

MODEL, TOKENS = "Qwen3-0.6B", 32768


def launched(call: Call) -> list[dict]:
    """The kernels of a call in the order in which they run, with microseconds: medians of five calls from a cold L2, the host ahead."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    runs = []
    for _ in range(5):
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            torch.cuda._sleep(HEAD_START_CYCLES)
            call()
            torch.cuda.synchronize()
        events = [e for e in p.events() if e.device_type.name == "CUDA" and "spin_kernel" not in e.name]
        runs.append(sorted(events, key=lambda e: e.time_range.start))
    return [
        {"kernel": same[0].name, "us": sorted(e.time_range.elapsed_us() for e in same)[2]}
        for same in zip(*runs, strict=True)
    ]  # fmt: skip


def kept_bytes(run: Callable[[], Tensor], given: list[Tensor]) -> int:
    """Bytes of memory that autograd keeps between forward and backward, each storage once, without what was `given`."""
    storages = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    for t in given:
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True)
    folder = parser.parse_args().results
    d_model, heads, heads_kv, head_dim = MODELS[MODEL]
    shape = {"heads": heads, "heads_kv": heads_kv, "head_dim": head_dim, "qk_norm": True}
    torch.manual_seed(0)
    mixer = TokenMixer(d_model, **shape, config=CONFIG, device="cuda", dtype=torch.bfloat16)
    x, half = (torch.randn(1, T, d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True) for T in (TOKENS, TOKENS // 2))
    up, leaves = torch.randn_like(x), [x, *mixer.parameters()]

    def forward() -> None:
        with torch.no_grad():
            mixer(x)

    found: dict = {"environment": environment("cuda"), "ceilings": ceilings("cuda", torch.bfloat16), "model": MODEL, "tokens": TOKENS}
    found["forward"] = launched(forward)
    found["forward and backward"] = launched(lambda: torch.autograd.grad(mixer(x), leaves, up))
    for mixer.memory.recompute, name in ((False, "kept"), (True, "kept with the memory recomputed")):
        # The difference of two lengths: what does not grow with T drops out.
        long, short = (kept_bytes(lambda y=y: mixer(y), [y, *mixer.parameters()]) for y in (x, half))
        found[f"{name}, bytes a token"] = (long - short) / (TOKENS - TOKENS // 2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layer_kernels.json").write_text(json.dumps(found, indent=1) + "\n")
    for name in ("forward", "forward and backward"):
        print(f"{name}: {sum(k['us'] for k in found[name]):.0f} us in kernels")
        for k in found[name]:
            print(f"{k['us']:10.1f} {k['kernel'][:100]}")
    print({name: value for name, value in found.items() if name.startswith("kept")})


if __name__ == "__main__":
    main()
