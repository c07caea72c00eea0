"""Compile what distilling SmolLM2 launches, one part a process, side by side: on a fresh machine in the time of the slowest part.

    python -m benchmarks.warm_training [--batches 2]

Compiled kernels stay in Triton's cache on disk, where the training process finds them.
"""

import argparse
import subprocess
import sys
import time

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from allmem_ops import AllMemConfig, MemoryBranch, swa, ttt_mlp
from allmem_ops.hf import convert
from allmem_ops.layers import memory as memory_layer
from allmem_ops.training import Distillation, Recipe, forward_kl

# SmolLM2-135M; T, window, sinks and chunk size are run-time values.
VOCABULARY, D_MODEL, HEADS, HEADS_KV, HEAD_DIM, HIDDEN, T = 49_152, 576, 9, 3, 64, 128, 1024


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def attention(batch: int) -> None:
    q, k, v = (random(batch, T, h, HEAD_DIM) for h in (HEADS, HEADS_KV, HEADS_KV))
    o = swa(q, k, v, window=512, sinks=64)
    torch.autograd.grad(o, (q, k, v), torch.randn_like(o))


def memory(batch: int) -> None:
    q, k, v = (random(batch, T, HEADS_KV, HEAD_DIM) for _ in range(3))
    eta = torch.full((batch, T, HEADS_KV, 3), 0.01, device="cuda", requires_grad=True)
    mu = torch.full((batch, T, HEADS_KV), 0.5, device="cuda", requires_grad=True)
    shapes = ((HIDDEN, HEAD_DIM), (HIDDEN, HEAD_DIM), (HEAD_DIM, HIDDEN))
    weights = [random(HEADS_KV, *shape, dtype=torch.float32) for shape in shapes]
    o = ttt_mlp(q, k, v, *weights, eta, mu, chunk_size=256).o
    torch.autograd.grad(o, (q, k, v, eta, mu, *weights), torch.randn_like(o))


def branch(batch: int) -> None:
    """All of the path around the memory, the memory itself left to its own process."""
    memory_layer.ttt_mlp = lambda q, *_, **__: (q, None)
    memory_layer.kernels_take = lambda *_: False  # operator by operator
    layer = MemoryBranch(D_MODEL, AllMemConfig(heads=HEADS_KV, head_dim=HEAD_DIM), device="cuda")
    x, attn = random(batch, T, D_MODEL), random(batch, T, D_MODEL)
    y = layer(x, attn)
    torch.autograd.grad(y, (x, attn, *layer.parameters()), torch.randn_like(y), allow_unused=True)


def loss(batch: int) -> None:
    student, teacher, head = (random(*s) for s in ((batch, T, D_MODEL), (batch, T, D_MODEL), (VOCABULARY, D_MODEL)))
    forward_kl(student, teacher.detach(), head.detach()).backward()


def steps(batch: int) -> None:
    """Whole steps of a model of two such layers: what the parts have left out."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": HEADS_KV, "max_position_embeddings": 8192}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=D_MODEL, intermediate_size=1536, **shape)).bfloat16().cuda()
    run = Distillation(convert(model, AllMemConfig(window=512, sinks=64, chunk_size=256)), Recipe(steps=2, window=(256, 512)))
    for _ in range(2):
        run.step(torch.randint(0, VOCABULARY, (batch, T), device="cuda")).read(0.0)


PARTS = {function.__name__: function for function in (attention, memory, branch, loss)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[2])
    parser.add_argument("--part", choices=(*PARTS, "steps"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        for batch in options.batches:
            (PARTS | {"steps": steps})[options.part](batch)
        torch.cuda.synchronize()
        return
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.warm_training"]
    # the memory's kernels depend on the number of sequences: a process each
    jobs = [(part, [batch]) for part in PARTS for batch in (options.batches if part == "memory" else options.batches[:1])]
    running = [(job, subprocess.Popen([*command, "--part", job[0], "--batches", *map(str, job[1])])) for job in jobs]
    for (part, batches), process in running:
        print(f"{part} {batches}: exit {process.wait()} after {time.perf_counter() - started:.0f} s", flush=True)
    code = subprocess.run([*command, "--part", "steps", "--batches", *map(str, options.batches)], check=False).returncode
    print(f"steps: exit {code} after {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
