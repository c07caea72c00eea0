"""The forward kernel with its pinned configs, compiled for GPUs that need not be there: registers, spills, shared memory."""

import os
import subprocess
import sys

import pytest

# Needs a process without the interpreter. Prints a line a kernel, for half precision the largest form of it: GPU class, dtype, head dim,
# optional arguments, registers, bytes spilled, bytes of shared memory, whether it uses wgmma.
SCRIPT = """
import sys
from allmem_ops.ops.kernels.configs import candidates
from allmem_ops.ops.swa import launch
from allmem_ops.ops.swa.kernels.fwd import swa_fwd_kernel
from allmem_ops.testing.aot import compile_for

gpu = sys.argv[1]
for dtype, dims in (("bf16", (64, 80, 256)), ("fp32", (80, 256))):
    for D in dims:
        BD = launch.padded_head_dim(D)
        config = candidates(launch.TABLE, gpu, ("single" if dtype == "fp32" else "half", BD))[0]
        options = dict(config.constants)
        signature = dict.fromkeys(("q", "q_sinks", "o"), f"*{dtype}") | {"lse": "*fp32", "cu_seqlens": "*i64", "scale_log2": "fp32"}
        tile = f"tensordesc<{dtype}[1, 1, {options['BN']}, {BD}]>" if options["TMA"] else f"*{dtype}"
        signature |= {"k": tile, "v": tile} | {f"stride_{x}{d}": "i64" for x in "qfkv" for d in "bth"}
        signature |= dict.fromkeys(("Tq", "Tk", "HQ", "G", "blocks", "sequences", "window", "sinks"), "i32")
        aligned = tuple(n for n, kind in signature.items() if kind.startswith("*") or n.startswith("stride"))
        for extra in ((),) if dtype == "fp32" else (("q_sinks", "cu_seqlens"),):
            constants = options | {"D": D, "BD": BD, "PRECISION": "ieee"} | {f"stride_{x}d": 1 for x in "qfkv"}
            constants |= {n: None for n in ("q_sinks", "cu_seqlens") if n not in extra}
            types = {n: kind for n, kind in signature.items() if n not in constants}
            names = tuple(n for n in aligned if n in types)
            launched = {"num_warps": config.num_warps, "num_stages": config.num_stages, "aligned": names}
            if config.maxnreg:
                launched["maxnreg"] = config.maxnreg
            found = compile_for(gpu, swa_fwd_kernel, types, constants, **launched)
            wgmma = int("wgmma" in found.ptx)
            print(gpu, dtype, D, len(extra), found.registers, found.spill_bytes, found.shared_bytes, wgmma)
"""
SHARED = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}


@pytest.mark.parametrize("gpu", ["sm80", "sm90", "sm100"])
def test_pinned_configs_compile_with_bounded_spills(gpu):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", SCRIPT, gpu], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 5
    for line in lines:
        _, dtype, _, _, registers, spilled, shared, wgmma = line
        assert int(registers) <= 255, line
        assert int(spilled) <= (0 if gpu == "sm90" and dtype == "bf16" else 96), line
        assert int(shared) <= SHARED[gpu], line
        assert int(wgmma) == (gpu == "sm90" and dtype == "bf16"), line
