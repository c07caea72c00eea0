"""Compiled kernels are kept by a key made once a call: it must tell apart whatever Triton compiles anew for."""

import os
import subprocess
import sys
from pathlib import Path

# In a process without the interpreter: forward and backward of random inputs; for each launch the key, and what Triton's binder makes of
# the arguments. One key must not stand for two specialisations.
SCRIPT = """
import random
import torch
from triton.runtime.jit import JITFunction
from allmem_ops.ops.ttt_mlp import launch, launch_bwd
from allmem_ops.ops.ttt_mlp.reference import Options
from allmem_ops.ops.ttt_mlp.slots import State
from allmem_ops.testing.aot import absent_gpu

seen, launches, kept_keys = {}, [], []

def bind(self, *args, grid, warmup, **options):
    if not kept_keys:  # a kernel for each part of a step: not kept
        return
    *_, binder = self.device_caches[0]
    _, specialization, kept = binder(*args, **options)
    key = self.__name__, kept_keys.pop(), tuple(options.values())
    seen.setdefault(key, set()).add(str((self.__name__, specialization, kept)))
    launches.append(key)

original = launch.launch

def spy(kernel, key, *rest):
    kept_keys.append(key)
    original(kernel, key, *rest)

launch.launch = spy
random.seed(0)
flip = lambda: random.random() < 0.5

def draw(*shape, dtype=torch.float32):
    kind = random.random()
    if kind < 0.2:
        return torch.empty(*shape[:-1], shape[-1] + random.choice((1, 16)), dtype=dtype)[..., : shape[-1]]
    if kind < 0.35:
        return torch.empty(shape[1], shape[0], *shape[2:], dtype=dtype).transpose(0, 1)
    if kind < 0.5:
        return torch.empty(shape[0], 1, *shape[2:], dtype=dtype).expand(shape)
    if kind < 0.6:
        return torch.empty(2 * torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(-1)[: torch.Size(shape).numel()].view(shape)
    return torch.empty(shape, dtype=dtype)

with absent_gpu("sm90"):
    JITFunction.run = bind
    for _ in range(300):
        B, T, H, (d, h) = random.choice((1, 2)), random.choice((1, 16, 33)), random.choice((1, 2, 16)), random.choice(((64, 128), (96, 80)))
        dtype, packed, keep = random.choice((torch.bfloat16, torch.float16, torch.float32)), flip(), flip()
        B = 1 if packed else B
        cu = random.choice((torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.int64), torch.empty(6, dtype=torch.int64)[1:]))
        cu = cu if packed else None
        q, k, v, do = (draw(B, T, H, d, dtype=dtype) for _ in range(4))
        eta, mu, weights = draw(B, T, H, 3), draw(B, T, H), (draw(H, h, d), draw(H, h, d), draw(H, d, h))
        state = None
        if flip():
            N = 4 if packed else B
            gate, down = (N, H, h, d), (N, H, d, h)
            state = State(*(draw(*s) for s in (gate, gate, down) * 3), draw(N, H), torch.empty(N + 1, dtype=torch.int64)[int(flip()) :][:N])
        norm, clip = random.choice(("pre_write", "post_write", "none")), random.choice((None, 0.5, 1.0))
        options = Options(random.choice((1, 16, 17, 2**31 + 5)), norm, flip(), clip, random.choice((0.0, 1.0, 1e-5)))
        saved = launch.ttt_mlp_triton_forward(q, k, v, eta, mu, weights, state, cu, options, keep, True)
        ends = [torch.empty(x.shape) if flip() else None for x in saved[1:7]] if keep else [None] * 6
        launch_bwd.ttt_mlp_triton_backward(do, ends, q, k, v, eta, mu, weights, state, cu, saved, options, keep)
clashes = {key: found for key, found in seen.items() if len(found) > 1}
assert not clashes, next(iter(clashes.items()))
print(len(launches), len(seen))
"""


def test_one_key_stands_for_one_specialisation():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    launches, keys = map(int, run.stdout.split())
    assert launches > 1500 and keys < launches
