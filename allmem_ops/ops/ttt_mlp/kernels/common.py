"""Device functions that the kernels of `ttt_mlp` share: spans of tokens, activations, matrices as [d, hidden]."""

import triton
import triton.language as tl

# ---- tokens: which sequence, which chunk


@triton.jit
def sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED: tl.constexpr, CARRIED: tl.constexpr):
    """Sequence `i_n` as (row of q, its first token in that row, its length, tokens that its open chunk holds), int32.

    Offsets and counters are clamped: bad values can't lead outside the tensors.
    """
    if PACKED:
        i_b = i_n * 0
        begin = tl.minimum(tl.maximum(tl.cast(tl.load(cu_seqlens + i_n), tl.int32), 0), T)
        end = tl.minimum(tl.maximum(tl.cast(tl.load(cu_seqlens + i_n + 1), tl.int32), begin), T)
        length = end - begin
    else:
        i_b = i_n
        begin = T * 0
        length = T
    held = T * 0
    if CARRIED:
        held = tl.minimum(tl.maximum(tl.cast(tl.load(count + i_n), tl.int32), 0), chunk_size - 1)
    return i_b, begin, length, held


@triton.jit
def written_chunks(length, held, chunk_size, KEEP: tl.constexpr):
    """How many chunks of a sequence are written: the full ones; without `KEEP` not one that nobody reads afterwards."""
    if KEEP:
        return (length + held) // chunk_size
    else:
        return tl.maximum((length + held + chunk_size - 1) // chunk_size - 1, 0)


@triton.jit
def chunk_span(i_c, length, held, chunk_size):
    """Tokens [start, stop) of chunk `i_c`, counted from the sequence's first token in this call; empty if start >= stop."""
    return tl.maximum(i_c * chunk_size - held, 0), tl.minimum((i_c + 1) * chunk_size - held, length)


@triton.jit
def first_slot(first, i_n, steps, PACKED: tl.constexpr):
    """The slot of chunk 0 of sequence `i_n`; its chunk j has the j-th slot after it."""
    if PACKED:
        return tl.load(first + i_n)
    else:
        return i_n * steps


@triton.jit
def slot_owner(slots, i_s, steps, PACKED: tl.constexpr):
    """(sequence, chunk) of a slot; sequence -1: the slot is not used."""
    if PACKED:
        return tl.load(slots + 2 * i_s), tl.load(slots + 2 * i_s + 1)
    else:
        return i_s // steps, i_s % steps
