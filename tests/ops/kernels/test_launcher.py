"""Compiled kernels are kept by a key: it must tell apart whatever Triton compiles anew for."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from allmem_ops.ops.kernels.launcher import pointer_class, stride_class, unchecked

# In a process without the interpreter: launches of `swa` at many inputs; for each the key, and what Triton's binder makes of the arguments.
# One key must not stand for two specialisations.
SCRIPT = """
import torch
from triton.runtime.jit import JITFunction
from allmem_ops.ops.swa import launch
from allmem_ops.testing.aot import absent_gpu

seen = {}

def bind(self, *args, grid, warmup, **options):
    *_, binder = self.device_caches[0]
    _, specialization, kept = binder(*args, **options)
    seen.setdefault(keys[-1], set()).add(str((specialization, kept)))

keys = []
original = launch.launch

def spy(kernel, key, *rest):
    keys.append(key)
    original(kernel, key, *rest)

launch.launch = spy
T, H = 8, 2

def inputs(D, dtype):
    yield torch.empty(1, T, H, D, dtype=dtype)
    yield torch.empty(1, T, H, D + 1, dtype=dtype)[..., 1:]
    yield torch.empty(1, T, H, D * 2, dtype=dtype)[..., ::2]
    yield torch.empty(1, T, H, D * 16, dtype=dtype)[..., ::16]
    yield torch.empty(1, H, T, D, dtype=dtype).transpose(1, 2)
    yield torch.empty(1, T, 3 * H, D, dtype=dtype)[:, :, H : 2 * H]
    yield torch.empty(1, T, 1, D, dtype=dtype).expand(1, T, H, D)
    yield torch.empty(T * H * D + 1, dtype=dtype)[1:].view(1, T, H, D)

offsets = [None, torch.tensor([0, 3, T]), torch.tensor([0, 3, T], dtype=torch.int32), torch.tensor([9, 0, 3, T])[1:]]
with absent_gpu("sm90"):
    JITFunction.run = bind
    for dtype in (torch.float16, torch.float32):
        for D in (16, 20):
            x = list(inputs(D, dtype))
            for q in x:
                for k in x:
                    for q_sinks in (None, q, x[1]):
                        launch.swa_triton_forward(q, k, x[0], q_sinks, None, 5, 1, 0.1)
                    for cu in offsets:
                        launch.swa_triton_forward(q, k, k, None, cu, 5, 1, 0.1)
            for length, window, sinks in ((1, 1, 0), (7, 16, 16), (8, 10**12, 1)):
                launch.swa_triton_forward(x[0][:, :length], x[0], x[0], None, None, window, sinks, 1.0)
clashes = {key: found for key, found in seen.items() if len(found) > 1}
assert not clashes, clashes
print(len(keys), len(seen), len(set().union(*seen.values())))
"""


def test_one_key_stands_for_one_specialisation():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    launches, keys, specialisations = map(int, run.stdout.split())
    assert launches > 1000 and keys == specialisations


def test_classes_of_pointers_and_strides():
    x = torch.empty(4, 64, dtype=torch.float16)
    assert pointer_class(None) is None and stride_class(None) is None
    assert pointer_class(x) == pointer_class(x[1:]) != pointer_class(x.view(-1)[1:])
    assert pointer_class(x) != pointer_class(x.float())
    assert stride_class(x) == stride_class(x[:, :5]) == stride_class(torch.empty(4, 16))
    assert len({stride_class(y) for y in (x, x[:, ::2], x[:, ::16], torch.empty(4, 5))}) == 4


def test_an_unchecked_descriptor_is_the_checked_one():
    x = torch.empty(4, 64, dtype=torch.float16)
    fields = {"base": x, "shape": (4, 64), "strides": (64, 1), "block_shape": [2, 64]}
    checked, fast = TensorDescriptor(**fields), unchecked(TensorDescriptor, **fields)
    for name in TensorDescriptor.__dataclass_fields__:
        assert getattr(fast, name) is getattr(checked, name), name
