"""Run a Gluon kernel on the CPU: Triton's interpreter does not know Gluon, and a wrong barrier hangs a GPU.

    kernel = gluon_on_cpu("allmem_ops.ops.swa.kernels.hopper_fwd").swa_fwd_hopper_kernel
    kernel[(2,)](descriptor, tensor, T=5, D=64)

The module's source runs as Python with stand-ins for Gluon's names. Programs run one after another, the partitions of
`warp_specialize` in turns that a seed decides, changing at each operation that another can notice. What the hardware may do late is done
late: a TMA load fills its tile with NaN when it is issued and with data some turns after, a product reads its operands and a TMA store
its tile when they are waited for, or, with `late=False`, when they are issued. A wait that nothing ends is an error and not a hang, and
so is the use of a product that was not waited for.

Only what the kernels of this package use is here. Layouts are not modelled: a tile is its elements.
"""

import importlib.util
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class _Partition:
    """A thread that runs when it is let, and what it has in flight."""

    def __init__(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.products: deque[_Product] = deque()
        self.stores: list[Callable[[], None]] = []
        self.ready: Callable[[], bool] = lambda: True
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self.thread.start()

    def _run(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _local.partition = self
        self.go.acquire()
        try:
            with torch.no_grad():
                function(*arguments)
            assert not self.products, "a product in flight at the end"
            assert not self.stores, "a store in flight at the end"
        except BaseException as error:  # raised again by the launch: a thread's exception is lost otherwise
            _state.failed = _state.failed or error
        self.go = None
        _state.control.release()


_local = threading.local()
_state = types.SimpleNamespace(program=0, programs=1, late=True, failed=None, random=None, events=[], control=threading.Semaphore(0))


def _switch(ready: Callable[[], bool] = lambda: True) -> None:
    """Let others run, until `ready` and chosen."""
    partition = getattr(_local, "partition", None)
    if partition is None:  # outside of `warp_specialize`
        assert ready(), "deadlock: nothing else runs"
        return
    partition.ready = ready
    _state.control.release()
    partition.go.acquire()
    if _state.failed is not None:
        raise RuntimeError("another partition failed")


def _specialize(partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], _warps: Any, _registers: Any) -> None:
    running = [_Partition(*p) for p in partitions]
    favour: dict[Any, float] = {}
    while running:
        able = [p for p in running if _state.failed is not None or p.ready()]
        if not able and not _state.events:
            _state.failed = AssertionError("deadlock: barriers that nothing completes")
            continue
        if _state.random.random() < 0.1:  # some run far ahead of others for a while
            favour = {id(p): _state.random.random() ** 4 for p in running}
        weights = [favour.get(id(p), 0.5) + 1e-3 for p in able] + [0.2] * len(_state.events)
        chosen = _state.random.choices(able + _state.events, weights)[0]
        if isinstance(chosen, _Partition):
            chosen.go.release()
            _state.control.acquire()
            if chosen.go is None:
                running.remove(chosen)
        else:
            _state.events.remove(chosen)
            chosen()
    if _state.failed is not None:
        raise _state.failed


class _Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def change(self, arrivals: int, size: int) -> None:
        self.pending -= arrivals
        self.bytes += size
        assert self.pending >= 0, "more arrivals at a barrier than it was made for"
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.phase ^= 1


class _Shared:
    """Shared memory: a view of a tensor, or of a list of barriers."""

    def __init__(self, data: Any, layout: Any) -> None:
        self.data, self.layout = data, layout

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: Any) -> "_Shared":
        return _Shared(self.data[int(i)], self.layout)

    def slice(self, start: int, length: int, dim: int = 0) -> "_Shared":
        return _Shared(self.data.narrow(dim, start, length), self.layout)

    def permute(self, order: Any) -> "_Shared":
        return _Shared(self.data.permute(order), self.layout)

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "_Shared":
        assert dtype == self.data.dtype
        size = 1
        for n in shape:
            size *= n
        return _Shared(self.data.view(-1)[:size].view(shape), layout)

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)

    def load(self, _layout: Any) -> Tensor:
        return self.data.clone()


class _Pointer:
    def __init__(self, data: Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, offset: Any) -> "_Pointer":
        return _Pointer(self.data, self.offset + offset)


class _Descriptor:
    """A host tensor descriptor: tiles outside of the tensor are zeros when read and dropped when written."""

    def __init__(self, described: Any) -> None:
        self.data = torch.as_strided(described.base, described.shape, described.strides)
        self.block, self.layout, self.dtype = list(described.block_shape), described.layout, described.base.dtype

    def _inside(self, at: Any) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        at = [int(a) for a in at]
        edges = [(max(a, 0), min(a + n, size)) for a, n, size in zip(at, self.block, self.data.shape, strict=True)]
        outer = tuple(slice(lo, max(hi, lo)) for lo, hi in edges)
        return outer, tuple(slice(lo - a, max(hi, lo) - a) for (lo, hi), a in zip(edges, at, strict=True))

    def read(self, at: Any) -> Tensor:
        tile = torch.zeros(self.block, dtype=self.dtype)
        outer, inner = self._inside(at)
        tile[inner] = self.data[outer]
        return tile

    def write(self, at: Any, tile: Tensor) -> None:
        outer, inner = self._inside(at)
        self.data[outer] = tile[inner]


class _Product:
    """An asynchronous product; its value is there after a wait."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute, self.value = compute, None
        if not _state.late:
            self.value = compute()
        self.done = False

    def finish(self) -> None:
        self.value = self.compute() if self.value is None else self.value
        self.done = True


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x)


def _product(a: Any, b: _Shared, acc: Tensor, *, use_acc: Any = True, is_async: bool = False) -> Any:
    assert isinstance(acc, Tensor), "an accumulator that was not waited for"

    def compute() -> Tensor:
        left = a.data if isinstance(a, _Shared) else a
        value = left.float() @ b.data.float()
        return acc + value if use_acc else value

    product = _Product(compute)
    _local.partition.products.append(product)
    _switch()
    return product if is_async else _product_wait(0, deps=(product,))


def _product_wait(pending: int = 0, deps: Any = None) -> Any:
    _switch()
    while len(_local.partition.products) > pending:
        _local.partition.products.popleft().finish()
    for x in deps:
        assert not isinstance(x, _Product) or x.done, "the use of a product that was not waited for"
    values = tuple(x.value if isinstance(x, _Product) else x for x in deps)
    return values[0] if len(values) == 1 else values


def _tma_load(descriptor: _Descriptor, at: Any, barrier: _Shared, tile: _Shared, pred: Any = True) -> None:
    if not pred:
        return
    at = [int(a) for a in at]
    tile.data.fill_(float("nan"))
    size = tile.data.numel() * tile.data.element_size()
    assert list(tile.data.shape) == descriptor.block

    def arrive() -> None:
        tile.data.copy_(descriptor.read(at))
        barrier.data[0].change(0, -size)

    _state.events.append(arrive)
    _switch()


def _tma_store(descriptor: _Descriptor, at: Any, tile: _Shared) -> None:
    at = [int(a) for a in at]
    if _state.late:
        _local.partition.stores.append(lambda: descriptor.write(at, tile.data))
    else:
        descriptor.write(at, tile.data)


def _store_wait(pendings: int) -> None:
    assert pendings == 0
    _switch()
    while _local.partition.stores:
        _local.partition.stores.pop(0)()


def _load(pointer: _Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    flat = torch.as_strided(pointer.data, (pointer.data.untyped_storage().nbytes() // pointer.data.element_size(),), (1,), 0)
    offset = _tensor(pointer.offset) + pointer.data.storage_offset()
    if mask is None:
        return flat[offset]
    return torch.where(_tensor(mask), flat[torch.where(_tensor(mask), offset, 0)], other)


def _store(pointer: _Pointer, value: Any, mask: Any = True) -> None:
    assert pointer.data.is_contiguous()
    offset, value, mask = torch.broadcast_tensors(_tensor(pointer.offset), _tensor(value), _tensor(mask))
    pointer.data.view(-1)[offset[mask]] = value[mask].to(pointer.data.dtype)


def _allocate(dtype: Any, shape: list[int], layout: Any) -> _Shared:
    if dtype == torch.int64:  # barriers
        return _Shared([[_Barrier()] for _ in range(shape[0])] if len(shape) == 2 else [_Barrier()], layout)
    return _Shared(torch.full(shape, float("nan"), dtype=dtype), layout)


def _init(barrier: _Shared, count: int) -> None:
    barrier.data[0].count = barrier.data[0].pending = count


def _arrive(barrier: _Shared, count: int = 1, pred: Any = True) -> None:
    if pred:
        barrier.data[0].change(count, 0)
        _switch()


def _wait(barrier: _Shared, phase: Any, pred: Any = True) -> None:
    if pred:
        _switch(lambda: barrier.data[0].phase != int(phase))


class _Layout:
    """Any layout: compared by nothing, asked for its parent."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.parent = next((a for a in arguments if isinstance(a, _Layout)), None)

    @staticmethod
    def get_default_for(*_: Any) -> "_Layout":
        return _Layout()


def _asm(source: str, _constraints: str, arguments: list[Any], **_: Any) -> Any:
    assert not source, "assembly does not run on the CPU"
    return arguments[0]


def _stand_ins() -> dict[str, types.ModuleType]:
    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        return made

    def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda a, b: function(_tensor(a), _tensor(b))

    def jit(function: Any = None, **_: Any) -> Any:
        return jit if function is None else function

    language = module(
        "language",
        constexpr=lambda x: x,
        **{name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int32", "int64")},
        **dict.fromkeys(
            ("NVMMASharedLayout", "NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout", "DistributedLinearLayout"),
            _Layout,
        ),
        shared_memory_descriptor=_Shared,
        static_range=range,
        program_id=lambda _axis: torch.tensor(_state.program),
        num_programs=lambda _axis: _state.programs,
        allocate_shared_memory=_allocate,
        warp_specialize=_specialize,
        arange=lambda a, b, _layout=None: torch.arange(a, b),
        full=lambda shape, value, dtype, _layout=None: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, _layout=None: torch.zeros(shape, dtype=dtype),
        convert_layout=lambda x, _layout, **_: x,
        inline_asm_elementwise=_asm,
        load=_load,
        store=_store,
        where=lambda c, a, b: torch.where(_tensor(c), _tensor(a), _tensor(b)),
        maximum=scalar(torch.maximum),
        minimum=scalar(torch.minimum),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis, dtype=x.dtype),
        exp2=torch.exp2,
        log=torch.log,
    )
    gluon = module("gluon", jit=jit, language=language)
    hopper = module(
        "hopper",
        fence_async_shared=lambda: None,
        warpgroup_mma=_product,
        warpgroup_mma_wait=_product_wait,
        mbarrier=types.SimpleNamespace(
            MBarrierLayout=_Layout, init=_init, wait=_wait, arrive=_arrive, expect=lambda barrier, size: barrier.data[0].change(1, size)
        ),
        tma=types.SimpleNamespace(store_wait=_store_wait),
    )
    name = "triton.experimental.gluon"
    return {
        "triton.experimental": module("experimental", gluon=gluon),
        name: gluon,
        f"{name}.language": language,
        f"{name}.language.nvidia": module("nvidia", hopper=hopper),
        f"{name}.language.nvidia.hopper": hopper,
        "allmem_ops.ops.kernels.gluon": module(
            "gluon",
            tma_load=_tma_load,
            tma_store=_tma_store,
            view=lambda x, dtype, shape, layout: x.reinterpret(dtype, shape, layout),
            exp2=lambda x, _eighths: torch.exp2(x),
        ),
    }


@contextmanager
def _replaced(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


class _Kernel:
    """A kernel of the module: `kernel[grid](*arguments, **options)`."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            _state.programs, _state.failed, _state.events = grid[0], None, []
            options = {name: _argument(x) for name, x in options.items() if name not in ("num_warps", "num_stages", "maxnreg")}
            for _state.program in range(grid[0]):
                self.function(*map(_argument, arguments), **options)

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return _Pointer(x)
    return _Descriptor(x) if hasattr(x, "block_shape") else x


def gluon_on_cpu(name: str, *, late: bool = True, seed: int = 0, edit: Callable[[str], str] = str) -> Any:
    """The module `name` with its Gluon functions as Python; its kernels are called `..._kernel`.

    Args:
        late: products and stores read what they read as late as they may, or as early.
        seed: of the order in which partitions and loads go on.
        edit: changes the source, for tests that a fault is found.
    """
    _state.late, _state.random = late, random.Random(seed)
    module = types.ModuleType(name)
    path = Path(importlib.util.find_spec(name).origin)
    with _replaced(_stand_ins()):
        exec(compile(edit(path.read_text()), path, "exec"), module.__dict__)
    for member, value in list(vars(module).items()):
        if member.endswith("_kernel"):
            setattr(module, member, _Kernel(value))
    return module
