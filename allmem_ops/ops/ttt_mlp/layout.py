"""Which tokens form which chunk: plain integers, no tensors but the two that the host reads."""

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from allmem_ops._validation import fail

# The work that is held at once, in elements of [tokens, h] and of states. A CPU loses more in its caches than it gains
# from larger batches; a GPU saves launches, and 2**24 keeps the fp32 intermediates of a group near 0.5 GiB.
WORK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}


class Group(NamedTuple):
    """`chunks` chunks of `size` tokens of this call, from position `start` on."""

    start: int
    size: int
    chunks: int

    @property
    def stop(self) -> int:
        return self.start + self.size * self.chunks


class Batch(NamedTuple):
    """Sequences that have their chunk edges in common and run side by side."""

    rows: slice  # rows of q, k, v
    positions: slice  # their positions in q, k, v
    states: slice  # rows of the state
    column: slice  # rows of what the forward saves
    count: int  # tokens that the open chunk holds at the start
    groups: list[Group]  # the chunks that are written
    rest: Group  # the open chunk at the end, perhaps of 0 tokens
    first_chunk: int  # where the batch's chunks and groups lie in what the forward saves
    first_group: int

    @property
    def chunks(self) -> int:
        return sum(g.chunks for g in self.groups)


def side_by_side(batch: int, heads: int, h: int, d: int, chunk_size: int, device: str) -> tuple[int, int]:
    """(sequences that run side by side, chunks in a group), at least one of each."""
    chunks = WORK_ELEMENTS.get(device, WORK_ELEMENTS["cuda"]) // (heads * h * (chunk_size + 3 * d))
    rows = max(min(batch, chunks), 1)
    return rows, max(chunks // rows, 1)


def plan(length: int, count: int, chunk_size: int, group: int) -> tuple[list[Group], Group]:
    """The groups of chunks that `length` tokens complete when `count` are carried in, and the open chunk."""
    if count + length < chunk_size:
        return [], Group(0, length, 1)
    groups = [Group(0, chunk_size - count, 1)] if count else []
    start = chunk_size - count if count else 0
    chunks = (length - start) // chunk_size
    groups += [Group(start + i * chunk_size, chunk_size, min(group, chunks - i)) for i in range(0, chunks, group)]
    stop = start + chunks * chunk_size
    return groups, Group(stop, length - stop, 1)


def slots(tokens: int, sequences: int, chunk_size: int, carried: bool, group: int) -> tuple[int, int]:
    """Upper bounds, from shapes alone, of the written chunks and of their groups.

    `tokens` in all: with `cu_seqlens` over the `sequences` that follow each other, else of one sequence (sequences=1).
    For one sequence that carries nothing in they are exact.
    """
    if sequences == 1 and not carried:
        chunks = tokens // chunk_size
        return chunks, (chunks + group - 1) // group
    chunks = (tokens + (sequences * (chunk_size - 1) if carried else 0)) // chunk_size
    return chunks, chunks // group + sequences * (2 if carried else 1)


def batches(
    batch: int, tokens: int, count: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int, side: int, group: int
) -> list[Batch]:
    """What runs side by side, at most `side` sequences, in the order in which it runs.

    Chunk edges decide shapes, so the host reads `cu_seqlens` and `count` here, once per call, and can check them.
    """
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    sequences = batch if ends is None else len(ends) - 1
    counts = [0] * sequences if count is None else count.tolist()
    if not all(0 <= n < chunk_size for n in counts):
        fail("initial_state.count", f"must lie in [0, {chunk_size}), `chunk_size`", counts)
    if ends is not None:
        if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
            fail("cu_seqlens", f"must rise from 0 to T={tokens} without decreasing", ends)
        found, chunk, groups = [], 0, 0
        for n, ((start, stop), held) in enumerate(zip(pairwise(ends), counts, strict=True)):
            one, row = slice(n, n + 1), slice(0, 1)
            found.append(Batch(row, slice(start, stop), one, row, held, *plan(stop - start, held, chunk_size, group), chunk, groups))
            chunk, groups = chunk + found[-1].chunks, groups + len(found[-1].groups)
        return found
    side = side if len(set(counts)) == 1 else 1
    rows = [slice(n, min(n + side, batch)) for n in range(0, batch, side)]
    return [Batch(r, slice(0, tokens), r, r, counts[r.start], *plan(tokens, counts[r.start], chunk_size, group), 0, 0) for r in rows]
