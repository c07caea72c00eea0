"""Runs a warp-specialised Gluon kernel on a CPU: its own source, with PyTorch for the device.

Each partition of a program is a thread; barriers count arrivals and bytes and flip phases. Asynchronous work happens as late as it may:
wgmma reads its operands at the wait that completes it, a bulk store its source likewise, while a bulk load writes at once. So a buffer
that is reused too early gives a wrong result, and a barrier that nobody serves an error instead of a hang. Shared memory keeps the
order of the panels that 128-byte rows make of a tile (the permutation inside a panel is the same for every reader and left out).
"""

import inspect
import math
import re
import threading
from types import SimpleNamespace

import torch

PATIENCE = 10.0  # seconds until a wait counts as a deadlock


def _tensor(x):
    return x if isinstance(x, torch.Tensor) else torch.tensor(x)


class Pointer:
    def __init__(self, flat, offset=0):
        self.flat, self.offset = flat, _tensor(offset)

    def __add__(self, n):
        return Pointer(self.flat, self.offset + _tensor(n).to(torch.int64))


def _load(p):
    return p.flat[p.offset]


def _store(p, x, mask=True):
    mask = torch.broadcast_to(_tensor(mask), x.shape)
    p.flat[torch.broadcast_to(p.offset, x.shape)[mask]] = x[mask]


class Memory:
    """A tile or a stack of tiles in shared memory; `panel` is the number of columns of a panel, or None for one row."""

    def __init__(self, flat, shape, panel, base=0, turned=False):
        self.flat, self.shape, self.panel, self.base, self.turned = flat, [int(n) for n in shape], panel, int(base), turned

    dtype = property(lambda self: self.flat.dtype)
    layout = property(lambda self: self.panel)

    def index(self, i):
        assert 0 <= int(i) < self.shape[0], "index outside the allocation"
        return Memory(self.flat, self.shape[1:], self.panel, self.base + int(i) * math.prod(self.shape[1:]))

    def permute(self, order):
        assert tuple(order) == (1, 0)
        return Memory(self.flat, self.shape, self.panel, self.base, not self.turned)

    def view(self, dtype, shape, layout):
        assert dtype == self.dtype
        return Memory(self.flat, shape, layout, self.base)

    def _cells(self):
        """The tile as [rows, columns], a view."""
        cols, rows = self.shape[-1], math.prod(self.shape[:-1])
        part = self.flat[self.base : self.base + rows * cols]
        assert part.numel() == rows * cols, "tile outside the allocation"
        if self.panel is None:
            return part.view(rows, cols)
        return part.view(cols // self.panel, rows, self.panel).transpose(0, 1)

    def write(self, x):
        cells = self._cells()
        cells.copy_(x.reshape(cells.shape))

    def read(self):
        x = self._cells().reshape(-1, self.shape[-1]).clone()
        return x.T if self.turned else x

    def store(self, x):
        assert list(x.shape) == self.shape and x.dtype == self.dtype
        self.write(x)

    def load(self, layout):
        return self.read().view(self.shape)


class Barrier:
    def __init__(self, condition):
        self.condition, self.phase, self.bytes = condition, 0, 0

    def init(self, count):
        self.count = self.pending = count

    def arrive(self, count=1, add_bytes=0):
        with self.condition:
            self.bytes += add_bytes
            self.pending -= count
            assert self.pending >= 0, "more arrivals than the barrier counts"
            self._flip()

    def landed(self, n):
        with self.condition:
            self.bytes -= n
            self._flip()

    def _flip(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            self.condition.notify_all()

    def wait(self, phase):
        with self.condition:
            assert self.condition.wait_for(lambda: self.phase != int(phase), PATIENCE), "deadlock at a barrier"


class Descriptor:
    def __init__(self, source):
        self.x = source.base.as_strided(source.shape, source.strides, source.base.storage_offset())
        self.block, self.dtype = source.block_shape, source.base.dtype
        self.layout = {(128, 16): 64, (128, 32): 32, (0, 32): None}[source.layout.swizzle_byte_width, source.layout.element_bitwidth]

    def box(self, corner):
        """(the part inside the tensor, where it stands in the block)."""
        corner = [int(c) for c in corner]
        inside = [(max(c, 0), min(c + n, size)) for c, n, size in zip(corner, self.block, self.x.shape, strict=True)]
        outer = tuple(slice(a, max(a, b)) for a, b in inside)
        inner = tuple(slice(s.start - c, s.stop - c) for s, c in zip(outer, corner, strict=True))
        return self.x[outer], inner


class Program:
    """One program: its threads share the barriers' condition; each has its own queue of unfinished work."""

    def __init__(self, number):
        self.number, self.condition, self.local = number, threading.Condition(), threading.local()

    def queue(self, name):
        return self.local.__dict__.setdefault(name, [])

    # Bulk copies
    def tma_load(self, descriptor, corner, barrier, memory):
        part, where = descriptor.box(corner)
        tile = torch.zeros(descriptor.block, dtype=descriptor.dtype)
        tile[where] = part
        memory.write(tile)
        barrier.landed(tile.numel() * tile.element_size())

    def _leave(self, descriptor, corner, memory, add):
        def run():
            part, where = descriptor.box(corner)
            tile = memory.read().view(descriptor.block)[where]
            part.copy_(part + tile if add else tile)

        self.queue("stores").append(run)

    def tma_store(self, descriptor, corner, memory):
        self._leave(descriptor, corner, memory, False)

    def tma_add(self, descriptor, corner, memory):
        self._leave(descriptor, corner, memory, True)

    def store_wait(self, pending):
        queue = self.queue("stores")
        while len(queue) > pending:
            queue.pop(0)()

    # Matrix products
    def warpgroup_mma(self, a, b, acc, use_acc=True, is_async=False):
        assert is_async
        product = SimpleNamespace(value=None)

        def run():
            x, y = (t.read() if isinstance(t, Memory) else t for t in (a, b))
            product.value = x.float() @ y.float()
            if use_acc:
                product.value += acc.value if isinstance(acc, SimpleNamespace) else acc

        self.queue("products").append(run)
        return product

    def warpgroup_mma_wait(self, pending, deps):
        queue = self.queue("products")
        while len(queue) > pending:
            queue.pop(0)()
        done = [d.value if isinstance(d, SimpleNamespace) else d for d in deps]
        assert all(d is not None for d in done), "a product is used before it has been waited for"
        return done[0] if len(done) == 1 else tuple(done)

    def warp_specialize(self, partitions, _warps, _registers):
        errors = []

        def run(function, args):
            try:
                function(*args)
                assert not self.queue("stores") and not self.queue("products"), "unfinished work at the end of a partition"
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=p) for p in partitions]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if errors:
            raise errors[0]

    # Turns between programs
    def await_turn(self, p_turn, rank, count):
        assert int(_load(p_turn)) == int(rank), "programs run one after another: a turn that has not come is a deadlock"

    def pass_turn(self, p_turn, count):
        self.store_wait(0)
        p_turn.flat[p_turn.offset] = int(count)

    def namespace(self):
        def allocate(dtype, shape, layout):
            if dtype == torch.int64:
                barriers = [Barrier(self.condition) for _ in range(shape[0])]
                return SimpleNamespace(index=lambda i: barriers[int(i)])
            flat = torch.full((math.prod(shape),), float("nan"), dtype=dtype)
            return Memory(flat, shape, layout)

        def atomic_add(p, n):
            old = _load(p).clone()
            p.flat[p.offset] += n
            return old

        def layout(*args):
            return None

        def jit(function=None, **options):
            return (lambda f: f) if function is None else function

        gl = SimpleNamespace(
            constexpr=lambda x: x,
            static_range=range,
            int32=torch.int32,
            int64=torch.int64,
            float32=torch.float32,
            NVMMASharedLayout=lambda swizzle, bits, rank=2: 1024 // bits,
            SwizzledSharedLayout=layout,
            SliceLayout=layout,
            NVMMADistributedLayout=layout,
            DotOperandLayout=layout,
            minimum=lambda a, b: torch.minimum(_tensor(a), _tensor(b)),
            maximum=lambda a, b: torch.maximum(_tensor(a), _tensor(b)),
            where=lambda c, a, b: torch.where(_tensor(c), _tensor(a), _tensor(b)),
            exp2=torch.exp2,
            arange=lambda a, b, layout: torch.arange(a, b),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            convert_layout=lambda x, layout, assert_trivial: x,
            load=_load,
            store=_store,
            atomic_add=atomic_add,
            allocate_shared_memory=allocate,
            warp_specialize=self.warp_specialize,
        )
        return {
            "gluon": SimpleNamespace(jit=jit),
            "gl": gl,
            "fence_async_shared": lambda: None,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=lambda b, count: b.init(count),
                expect=lambda b, n: b.arrive(1, n),
                arrive=lambda b, count: b.arrive(count),
                wait=lambda b, phase: b.wait(phase),
            ),
            "tma": SimpleNamespace(store_wait=self.store_wait),
            "tma_load": self.tma_load,
            "tma_store": self.tma_store,
            "tma_add": self.tma_add,
            "view": lambda memory, dtype, shape, layout: memory.view(dtype, shape, layout),
            "warpgroup_mma": self.warpgroup_mma,
            "warpgroup_mma_wait": self.warpgroup_mma_wait,
        }


class EmulatedKernel:
    """Stands for a Gluon kernel: `kernel[grid](*args, **kwargs)`; `edit` changes its source first (to put a fault in)."""

    def __init__(self, module, name, edit=lambda source: source):
        source = re.sub(r"^from (triton|allmem_ops\.ops\.kernels)[^(\n]*(\([^)]*\))?$", "", inspect.getsource(module), flags=re.MULTILINE)
        source = re.sub(r"(\w+) ([-+*])= ", r"\1 = \1 \2 ", source)  # values, not objects that change in place
        self.code, self.name = compile(edit(source), module.__file__, "exec"), name

    def __getitem__(self, grid):
        def launch(*args, **options):
            for number in range(math.prod(grid)):
                program = Program(number)
                space = program.namespace()
                exec(self.code, space)
                space |= {"_look_up_turn": _load, "_await_turn": program.await_turn, "_pass_turn": program.pass_turn}
                kernel = space[self.name]
                known = inspect.signature(kernel).parameters
                kernel(*map(self._device, args), **{k: self._device(v) for k, v in options.items() if k in known})

        return launch

    @staticmethod
    def _device(x):
        if isinstance(x, torch.Tensor):
            return Pointer(torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0), x.storage_offset())
        return Descriptor(x) if hasattr(x, "block_shape") else x
