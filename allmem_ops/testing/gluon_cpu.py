"""Run a Gluon kernel on the CPU: Triton's interpreter does not know Gluon, and a wrong barrier hangs a GPU.

    kernel = gluon_on_cpu("allmem_ops.ops.swa.kernels.hopper_fwd").swa_fwd_hopper_kernel
    kernel[(2,)](descriptor, tensor, T=5, D=64)

The module's source runs as Python with stand-ins for Gluon's names. Programs run one after another, the partitions of
`warp_specialize` in turns that a seed decides, changing at each operation that another can notice. What the hardware may do late is done
late: a TMA load fills its tile with NaN when it is issued and with data some turns after, a product reads its operands and a TMA store
its tile when they are waited for, or, with `late=False`, when they are issued. A wait that nothing ends is an error and not a hang, and
so is the use of a product that was not waited for.

Only what the kernels of this package use is here. Of the layouts one thing is modelled: a tile in shared memory lies in panels of 128
bytes a row, one after the other, so that a view of another shape finds its elements where the hardware would. (The permutation inside a
panel is the same for every reader, and left out.)
"""

import ast
import importlib.util
import math
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
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


class _Barriers:
    def __init__(self, count: int) -> None:
        self.barriers = [_Barrier() for _ in range(count)]

    def index(self, i: Any) -> _Barrier:
        return self.barriers[int(i)]


class _Shared:
    """A tile in shared memory, or a stack of them: `shape` elements from `base` on."""

    def __init__(self, flat: Tensor, shape: list[int], layout: "_Layout", base: int = 0, turned: bool = False, rows: Any = None) -> None:
        self.flat, self.shape, self.layout, self.base, self.turned, self.rows = flat, [int(n) for n in shape], layout, base, turned, rows

    @property
    def dtype(self) -> torch.dtype:
        return self.flat.dtype

    def index(self, i: Any) -> "_Shared":
        assert 0 <= int(i) < self.shape[0], "a tile outside of the allocation"
        return _Shared(self.flat, self.shape[1:], self.layout, self.base + int(i) * math.prod(self.shape[1:]))

    def slice(self, start: int, length: int) -> "_Shared":
        assert self.rows is None and len(self.shape) == 2 and start + length <= self.shape[0]
        return _Shared(self.flat, self.shape, self.layout, self.base, rows=(start, length))

    def permute(self, order: Any) -> "_Shared":
        assert tuple(order) == (1, 0)
        return _Shared(self.flat, self.shape, self.layout, self.base, not self.turned)

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "_Shared":
        assert dtype == self.dtype and self.rows is None and not self.turned
        return _Shared(self.flat, shape, layout, self.base)

    @property
    def cells(self) -> Tensor:
        """[rows, panels, columns of a panel], a view."""
        columns, count = self.shape[-1], math.prod(self.shape)
        assert self.base + count <= self.flat.numel(), "a tile outside of the allocation"
        width = min(self.layout.columns or columns, columns)
        cells = self.flat[self.base : self.base + count].view(columns // width, -1, width).transpose(0, 1)
        return cells if self.rows is None else cells.narrow(0, *self.rows)

    def read(self) -> Tensor:
        x = self.cells.flatten(1)
        return x.T if self.turned else x

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype
        self.cells.copy_(value.reshape(self.cells.shape))

    def load(self, _layout: Any) -> Tensor:
        return self.read().clone().view(self.shape if self.rows is None else [self.rows[1], self.shape[1]])


class _Pointer:
    def __init__(self, data: Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, offset: Any) -> "_Pointer":
        return _Pointer(self.data, self.offset + offset)


class _Descriptor:
    """A host tensor descriptor: tiles outside of the tensor are zeros when read and dropped when written."""

    def __init__(self, described: Any) -> None:
        self.data = torch.as_strided(described.base, described.shape, described.strides)
        self.block, self.dtype = list(described.block_shape), described.base.dtype
        self.layout = _Layout.panels(described.layout.swizzle_byte_width, described.layout.element_bitwidth)

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

    def write(self, at: Any, tile: Tensor, add: bool) -> None:
        outer, inner = self._inside(at)
        self.data[outer] = self.data[outer] + tile[inner] if add else tile[inner]


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


def _product(a: Any, b: _Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False) -> Any:
    # In flight, a sum may only be the next product's; they finish in their order.
    assert isinstance(acc, Tensor) or acc in _local.partition.products, "an accumulator that was not waited for"

    def compute() -> Tensor:
        left = a.read() if isinstance(a, _Shared) else a
        value = left.float() @ b.read().float()
        return (acc if isinstance(acc, Tensor) else acc.value) + value if use_acc else value

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


def _tma_load(descriptor: _Descriptor, at: Any, barrier: _Barrier, tile: _Shared, pred: Any = True) -> None:
    if not pred:
        return
    at = [int(a) for a in at]
    assert tile.shape == descriptor.block and tile.layout.columns == descriptor.layout.columns
    tile.cells.fill_(float("nan"))

    def arrive() -> None:
        tile.store(descriptor.read(at))
        barrier.change(0, -math.prod(tile.shape) * tile.dtype.itemsize)

    _state.events.append(arrive)
    _switch()


def _leave(descriptor: _Descriptor, at: Any, tile: _Shared, add: bool) -> None:
    at = [int(a) for a in at]
    assert tile.shape == descriptor.block and tile.layout.columns == descriptor.layout.columns
    if _state.late:
        _local.partition.stores.append(lambda: descriptor.write(at, tile.load(None), add))
    else:
        descriptor.write(at, tile.load(None), add)


def _tma_store(descriptor: _Descriptor, at: Any, tile: _Shared) -> None:
    _leave(descriptor, at, tile, False)


def _tma_add(descriptor: _Descriptor, at: Any, tile: _Shared) -> None:
    _leave(descriptor, at, tile, True)


def store_wait(pendings: int) -> None:
    """Finish this partition's stores (for stand-ins of assembly, as `load` and `store`)."""
    assert pendings == 0
    _switch()
    while _local.partition.stores:
        _local.partition.stores.pop(0)()


def load(pointer: _Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    flat = torch.as_strided(pointer.data, (pointer.data.untyped_storage().nbytes() // pointer.data.element_size(),), (1,), 0)
    offset = _tensor(pointer.offset) + pointer.data.storage_offset()
    if mask is None:
        return flat[offset]
    return torch.where(_tensor(mask), flat[torch.where(_tensor(mask), offset, 0)], other)


def store(pointer: _Pointer, value: Any, mask: Any = True) -> None:
    flat = torch.as_strided(pointer.data, (pointer.data.untyped_storage().nbytes() // pointer.data.element_size(),), (1,), 0)
    offset, value, mask = torch.broadcast_tensors(_tensor(pointer.offset) + pointer.data.storage_offset(), _tensor(value), _tensor(mask))
    flat[offset[mask]] = value[mask].to(flat.dtype)


def _atomic_add(pointer: _Pointer, value: Any, mask: Any = True, **_: Any) -> Tensor:
    old = load(pointer).clone()
    store(pointer, old + value, mask)
    return old


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:  # barriers
        return _Barriers(shape[0])
    return _Shared(torch.full((math.prod(shape),), float("nan") if dtype.is_floating_point else -1, dtype=dtype), shape, layout)


def _init(barrier: _Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _arrive(barrier: _Barrier, count: int = 1, pred: Any = True) -> None:
    if pred:
        barrier.change(count, 0)
        _switch()


def _wait(barrier: _Barrier, phase: Any, pred: Any = True) -> None:
    if pred:
        _switch(lambda: barrier.phase != int(phase))


class _Layout:
    """Any layout: asked for its parent, and in shared memory for the columns of a panel (None: a row is one piece)."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.parent = next((a for a in arguments if isinstance(a, _Layout)), None)
        self.columns: int | None = None

    @staticmethod
    def panels(swizzle_bytes: int, bits: int, _rank: int = 2) -> "_Layout":
        layout = _Layout()
        layout.columns = swizzle_bytes * 8 // bits or None
        return layout


class _SharedLayout:
    """`NVMMASharedLayout`."""

    def __new__(cls, swizzle_bytes: int, bits: int, rank: int = 2) -> _Layout:  # type: ignore[misc]
        return _Layout.panels(swizzle_bytes, bits, rank)

    @staticmethod
    def get_default_for(shape: list[int], dtype: torch.dtype) -> _Layout:
        return _Layout.panels(min(128, shape[-1] * dtype.itemsize), 8 * dtype.itemsize)


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
            (
                "NVMMADistributedLayout",
                "SliceLayout",
                "DotOperandLayout",
                "BlockedLayout",
                "SwizzledSharedLayout",
            ),
            _Layout,
        ),
        NVMMASharedLayout=_SharedLayout,
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
        load=load,
        store=store,
        atomic_add=_atomic_add,
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
            MBarrierLayout=_Layout, init=_init, wait=_wait, arrive=_arrive, expect=lambda barrier, size: barrier.change(1, size)
        ),
        tma=types.SimpleNamespace(store_wait=store_wait),
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
            tma_add=_tma_add,
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
            count = math.prod(grid)
            _state.programs, _state.failed, _state.events = count, None, []
            options = {name: _argument(x) for name, x in options.items() if name not in ("num_warps", "num_stages", "maxnreg")}
            for _state.program in range(count):
                self.function(*map(_argument, arguments), **options)

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return _Pointer(x)
    return _Descriptor(x) if hasattr(x, "block_shape") else x


class _InPlace(ast.NodeTransformer):
    """`x += y` as `x = x + y`: on the device these are values, and here tensors that others may hold."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.Assign:
        read = ast.parse(ast.unparse(node.target), mode="eval").body
        return ast.copy_location(ast.Assign([node.target], ast.BinOp(read, node.op, node.value)), node)


def gluon_on_cpu(
    name: str, *, late: bool = True, seed: int = 0, edit: Callable[[str], str] = str, assembly: Mapping[str, Callable] | None = None
) -> Any:
    """The module `name` with its Gluon functions as Python; its kernels are called `..._kernel`.

    Args:
        late: products and stores read what they read as late as they may, or as early.
        seed: of the order in which partitions and loads go on.
        edit: changes the source, for tests that a fault is found.
        assembly: by name, what stands for functions of the module that are assembly (`load`, `store` and `store_wait` are for them).
    """
    _state.late, _state.random = late, random.Random(seed)
    module = types.ModuleType(name)
    path = Path(importlib.util.find_spec(name).origin)
    tree = ast.fix_missing_locations(_InPlace().visit(ast.parse(edit(path.read_text()), str(path))))
    with _replaced(_stand_ins()):
        exec(compile(tree, path, "exec"), module.__dict__)
    module.__dict__.update(assembly or {})
    for member, value in list(vars(module).items()):
        if member.endswith("_kernel"):
            setattr(module, member, _Kernel(value))
    return module
