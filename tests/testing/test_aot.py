"""Compiling for a GPU that is not there: in a process of its own, because the tests' process may run the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def sums(p_x, p_y, n, BT: tl.constexpr):
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    b_x = tl.load(p_x + o_t, mask=o_t < n, other=0.0)
    tl.store(p_y + tl.program_id(0), tl.sum(b_x, 0))
"""

CALL = """
from sums import sums
from allmem_ops.testing.aot import compile_for

for gpu in ("sm80", "sm90", "sm100"):
    found = compile_for(gpu, sums, {"p_x": "*fp32", "p_y": "*fp32", "n": "i32"}, {"BT": 1024}, num_warps=4, num_stages=1)
    assert ".target " + gpu[:2] + "_" + gpu[2:] in found.ptx, found.ptx[:300]
    print(found.name, found.registers, found.spill_bytes, found.shared_bytes)
squeezed = compile_for("sm90", sums, {"p_x": "*fp32", "p_y": "*fp32", "n": "i32"}, {"BT": 16384}, num_warps=4, num_stages=1, maxnreg=24)
print(squeezed.registers, squeezed.spill_bytes)
import torch
from allmem_ops.ops.kernels.device import gpu_class, interpreted, sm_count
from allmem_ops.testing.aot import absent_gpu

x, y = torch.empty(4096, device="meta"), torch.empty(4, device="meta")
with absent_gpu("sm90") as launched:
    sums[(4,)](x, y, 4096, BT=1024, num_warps=4)
    sums[(4,)](x, y, 4096, BT=1024, num_warps=4)
    sums[(4,)](x, y, 4095, BT=1024, num_warps=8)
    print(len(launched), *(f"{found.name}:{'.target sm_90' in found.ptx}" for found in launched))
    print(gpu_class(x.device), sm_count(x.device), interpreted(x.device))
print(gpu_class(x.device), sm_count(x.device), interpreted(x.device))
try:
    compile_for("sm90", sums, {"p_x": "*fp32"}, {"BT": 1024}, num_warps=4, num_stages=1)
except ValueError as error:
    print(error)
"""


def test_registers_spills_and_shared_memory(tmp_path: Path):
    (tmp_path / "sums.py").write_text(KERNEL)
    root = Path(__file__).parents[2]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": f"{root}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", CALL], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *gpus, squeezed, launched, inside, outside, error = done.stdout.splitlines()
    for line in gpus:
        name, *numbers = line.split()
        registers, spills, shared = map(int, numbers)
        assert name == "sums" and 8 <= registers <= 64 and spills == 0 and shared > 0
    registers, spills = map(int, squeezed.split())
    assert registers <= 24 and spills > 0  # a limit that cannot hold shows as spills
    assert launched == "2 sums:True sums:True"  # equal launches count once; 4095 is not divisible by 16
    assert inside == "sm90 132 False" and outside == "sm80 1 True"
    assert error == "`signature` must give a type for each argument that has no constant; got none for p_y, n"
