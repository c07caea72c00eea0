"""Compile a Triton kernel for a GPU that is not there, and read what it will take: registers, spills, shared memory, PTX.

    found = compile_for("sm90", swa_fwd_kernel, {"q": "*bf16", "T": "i32"}, {"BM": 128}, num_warps=8, num_stages=2)
    assert found.spill_bytes == 0 and "wgmma" in found.ptx

or everything that a call launches, as it would launch it, from tensors without data:

    with absent_gpu("sm90") as launched:
        swa_triton_forward(*torch.empty(3, 1, 4096, 8, 128, dtype=torch.bfloat16, device="meta"), None, None, 512, 4, 0.1)
    assert all(found.spill_bytes == 0 for found in launched)

Needs a process without `TRITON_INTERPRET=1`: the interpreter replaces what would be compiled.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from allmem_ops._validation import check_choice, fail
from allmem_ops.ops.kernels.device import GPU_CLASSES, pretend

CAPABILITY = {"sm80": 80, "sm90": 90, "sm100": 100}
MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148}  # of an A100, an H100 and a B200


class Compiled(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        name: of the kernel.
        registers: of a thread.
        spill_bytes: local memory of a thread: what did not fit into registers, and stack.
        shared_bytes: shared memory of a program.
        ptx: the assembly.
    """

    name: str
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
    """Compile `kernel` (of `triton.jit` or `gluon.jit`) for GPU class `gpu`.

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
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    found = triton.compile(
        source, target=GPUTarget("cuda", CAPABILITY[gpu], 32), options={"num_warps": num_warps, "num_stages": num_stages, **options}
    )
    return _compiled(kernel.__name__, found)


class _AbsentDriver:
    """What Triton asks a driver for before it compiles. The device number is the capability, so that each class has its own cache."""

    def __init__(self, gpu: str) -> None:
        self.capability = CAPABILITY[gpu]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def absent_gpu(gpu: str) -> Iterator[list[Compiled]]:
    """Inside, a launch compiles its kernel for GPU class `gpu`, with the config that it would take there, and does not run it.

    Arguments are tensors on the `meta` device. Yields the list of what was compiled, filled as launches come; equal launches
    (one kernel, one specialisation) appear once.
    """
    check_choice("gpu", gpu, GPU_CLASSES)
    launched: list[Compiled] = []
    seen: set[int] = set()
    run, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        found = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(found) not in seen:
            seen.add(id(found))
            launched.append(_compiled(self.__name__, found))
        return found

    JITFunction.run = compile_only
    driver.set_active(_AbsentDriver(gpu))
    try:
        with pretend(gpu, MULTIPROCESSORS[gpu]):
            yield launched
    finally:
        JITFunction.run = run
        driver.set_active(active)


def _compiled(name: str, found: Any) -> Compiled:
    registers, spills = _resources(found.asm["cubin"])
    return Compiled(name, registers, spills, found.metadata.shared, found.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory and stack) of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
