"""Where the chunks of packed sequences lie: slot tables, on the device."""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.common import sequence_span, written_chunks


@triton.jit(do_not_specialize=["N", "S", "T", "chunk_size"])
def ttt_mlp_plan_kernel(cu_seqlens, count, first, slots, N, S, T, chunk_size, STATE: tl.constexpr, KEEP: tl.constexpr, BN: tl.constexpr):
    """`first` [N] and `slots` [S, 2]. Grid (N,): program i_n counts the slots before its own and fills its own; the last one the rest."""
    i_n = tl.program_id(0)
    o_n = tl.arange(0, BN)
    before = tl.zeros([BN], dtype=tl.int32)
    for i in tl.range(0, i_n, BN):
        m_n = i + o_n < i_n
        begin = tl.minimum(tl.maximum(tl.cast(tl.load(cu_seqlens + i + o_n, mask=m_n, other=0), tl.int32), 0), T)
        end = tl.minimum(tl.maximum(tl.cast(tl.load(cu_seqlens + i + o_n + 1, mask=m_n, other=0), tl.int32), begin), T)
        held = tl.zeros([BN], dtype=tl.int32)
        if STATE:
            held = tl.minimum(tl.maximum(tl.cast(tl.load(count + i + o_n, mask=m_n, other=0), tl.int32), 0), chunk_size - 1)
        before += tl.where(m_n, written_chunks(end - begin, held, chunk_size, KEEP) + 1, 0)
    _, _, length, held = sequence_span(cu_seqlens, count, i_n, T, chunk_size, True, STATE)
    own = written_chunks(length, held, chunk_size, KEEP) + 1
    at = tl.sum(before, 0)
    # bad offsets could ask for more slots than there are
    at = tl.minimum(at, S - 1)
    tl.store(first + i_n, at)
    for i in tl.range(0, own, BN):
        p = slots + 2 * (at + i + o_n)
        m_s = (i + o_n < own) & (at + i + o_n < S)
        tl.store(p, tl.zeros([BN], dtype=tl.int32) + i_n, mask=m_s)
        tl.store(p + 1, i + o_n, mask=m_s)
    if i_n == N - 1:
        for i in tl.range(at + own, S, BN):
            p = slots + 2 * (i + o_n)
            tl.store(p, tl.full([BN], -1, dtype=tl.int32), mask=i + o_n < S)
            tl.store(p + 1, tl.zeros([BN], dtype=tl.int32), mask=i + o_n < S)
