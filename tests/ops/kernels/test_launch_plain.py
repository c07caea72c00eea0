"""The key that `launch_plain` makes of the arguments tells apart what Triton compiles anew for, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

# In a process without the interpreter: launches of `gated_fusion`, `memory_input` and `rotary` at random forms, sizes and strides; for each
# the key, and what Triton's binder makes of the arguments.
SCRIPT = """
import random
import torch
from allmem_ops.ops.fusion import launch as fusion
from allmem_ops.ops.kernels import launcher, replay
from allmem_ops.ops.memory_input import launch as memory_input
from allmem_ops.ops.memory_input.reference import Inputs, Options
from allmem_ops.ops.rotary import launch as rotary
from allmem_ops.testing.aot import absent_gpu

seen, launches = {}, []

def spy(kernel, key, device, programs, args, options):
    *_, binder = kernel.device_caches[0]
    _, specialization, kept = binder(*args, **options)
    key = kernel.__name__, *map(launcher._argument_class, kernel.params, args), *options.values()
    seen.setdefault(key, set()).add((kernel.__name__, str((specialization, kept))))
    launches.append(key)

def draw(*shape, dtype=torch.float32, present=True):
    if not present:
        return None
    kind = random.random() if len(shape) > 1 else 1
    if kind < 0.3:
        return torch.empty(*shape[:-1], shape[-1] + random.choice((1, 8, 16)), dtype=dtype)[..., : shape[-1]]
    if kind < 0.5:
        return torch.empty(shape[1], shape[0], *shape[2:], dtype=dtype).transpose(0, 1)
    if kind < 0.6:
        return torch.empty(*shape[:-1], 1, dtype=dtype).expand(shape)
    return torch.empty(shape, dtype=dtype)

random.seed(0)
replay.launch = spy
flip = lambda: random.random() < 0.5
with absent_gpu("sm90"):
    for _ in range(200):
        B, T, H, d = random.choice((1, 2)), random.choice((1, 2, 16, 17, 33)), random.choice((1, 2, 3)), random.choice((1, 4, 16))
        dtype, gates, norm = random.choice((torch.float32, torch.float16)), random.choice((0, H, H * d)), flip()
        memory = draw(B, T, H, d, dtype=dtype) if norm or flip() else draw(B, T, H * d, dtype=dtype)
        rest = draw(H * d, present=flip()), draw(B, T, gates, dtype=dtype, present=gates > 0), draw(d, present=norm)
        fusion.launch_forward(draw(B, T, H * d, dtype=dtype, present=flip()), memory, *rest, 1e-6)
        fusion.launch_backward(draw(B, T, H * d, dtype=dtype), memory, *rest, 1e-6)
    for _ in range(100):
        B, T, D = random.choice((1, 2)), random.choice((1, 2, 16, 17, 33)), random.choice((4, 6, 32))
        HQ, HK, norm, dtype = random.choice((1, 3)), random.choice((0, 1, 3)), flip(), random.choice((torch.float32, torch.float16))
        qkv, table = draw(B, T, HQ + 2 * HK, D, dtype=dtype), [draw(random.choice((1, B)), T, D // 2) for _ in range(2)]
        norms = draw(D, present=norm), draw(D, present=norm and HK > 0)
        rotary.launch_forward(qkv, *table, *norms, HQ, HK, 1e-6)
        up = [draw(B, T, h, D, dtype=dtype) for h in (HQ, HK, HK)]
        rotary.launch_backward(*up, qkv if norm else None, *table, *norms, 1e-6)
    for _ in range(160):
        T, H, d, taps, G = random.choice((1, 2, 16, 17, 33)), random.choice((1, 3)), random.choice((4, 5, 16)), random.choice((1, 2, 4)), 3
        dtype, norm, N, tail = random.choice((torch.float32, torch.float16)), flip(), 2, None
        offsets = torch.tensor([0, 1, T]) if flip() else None
        if flip():
            tail = torch.empty(N if offsets is not None else 1, taps - 1, 3 * H * d, dtype=dtype)
        parameters = draw(3 * H * d, taps), draw(4 * H + G), draw(d, present=norm), draw(d, present=norm)
        projected, options = draw(1, T, 3 * H * d + 4 * H + G, dtype=dtype), Options(H, flip(), flip(), 1e-6, 1e-6)
        memory_input.launch_forward(Inputs(projected, *parameters, tail, offsets), options)
        gradients = [draw(1, T, H, d, dtype=dtype) for _ in range(3)] + [draw(1, T, H, 3), draw(1, T, H), draw(1, T, G, dtype=dtype)]
        memory_input.launch_backward(gradients, Inputs(projected, *parameters, tail, offsets), options)
        if tail is not None and offsets is None:
            active = torch.ones(1, dtype=torch.bool) if flip() else None
            memory_input.launch_step(Inputs(projected, *parameters, tail, None), active, options)
clashes = {key: found for key, found in seen.items() if len(found) > 1}
assert not clashes, clashes
print(len(launches), len(seen), len(set().union(*seen.values())))
"""


def test_one_key_stands_for_one_specialisation_and_the_other_way_round():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    launches, keys, specialisations = map(int, run.stdout.split())
    assert launches > 1000 and keys == specialisations
