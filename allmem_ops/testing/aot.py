"""Compile a Triton kernel for a GPU that is not there, and read what it will take: registers, spills, shared memory, PTX.

    found = compile_for("sm90", swa_fwd_kernel, {"q": "*bf16", "T": "i32"}, {"BM": 128}, num_warps=8, num_stages=2)
    assert found.spill_bytes == 0 and "wgmma" in found.ptx

Needs a process without `TRITON_INTERPRET=1`: the interpreter replaces what would be compiled.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from allmem_ops._validation import check_choice, fail
from allmem_ops.ops.kernels.device import GPU_CLASSES

# Registers of the cubins below are those of these chips.
CAPABILITY = {"sm80": 80, "sm90": 90, "sm100": 100}


class Compiled(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spill_bytes: local memory of a thread: what did not fit into registers, and stack.
        shared_bytes: shared memory of a program.
        ptx: the assembly.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str


def compile_for(
    gpu: str,
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    aligned: tuple[str, ...] | None = None,
    **options: Any,
) -> Compiled:
    """Compile `kernel` (of `triton.jit`) for GPU class `gpu`.

    Args:
        gpu: "sm80", "sm90" or "sm100".
        signature: Triton types of the run-time arguments: "*bf16", "*fp32", "i32", "i64", "fp32", "tensordesc<bf16[64, 128]>".
        constants: values of the `tl.constexpr` arguments (and None for absent pointers).
        num_warps, num_stages, options: as in a launch (`maxnreg`, ...).
        aligned: arguments known to be divisible by 16, as a launch finds out; None: every pointer.

    Raises:
        ValueError: another GPU class, or an argument of the kernel with neither a type nor a value.
    """
    check_choice("gpu", gpu, GPU_CLASSES)
    missing = [name for name in kernel.arg_names if name not in signature and name not in constants]
    if missing:
        fail("signature", "must give a type for each argument that has no constant", f"none for {', '.join(missing)}")
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    position = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    if aligned is None:
        aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    attributes = {position[name]: [["tt.divisibility", 16]] for name in aligned}
    values = {position[name]: value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    found = triton.compile(
        source, target=GPUTarget("cuda", CAPABILITY[gpu], 32), options={"num_warps": num_warps, "num_stages": num_stages, **options}
    )
    registers, spills = _resources(found.asm["cubin"])
    return Compiled(registers, spills, found.metadata.shared, found.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory and stack) of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
