"""Which rows a program of either pass works on, and the norm and the gate of a row: what forward and backward share.

A row is one head of one token, so that a row's reductions stay inside a tile; without a norm or a gate a head it is any piece of a
token's channels. Tiles are runs of BR rows in memory's order, and a program takes every `num_programs`-th tile. The launch makes
`num_programs * BR` a multiple of H: a row of the tile then stays with one head in the whole loop, what depends on the head alone
(alpha, and the sum for alpha's gradient) lives in registers, and no H leaves lanes idle.
"""

import triton
import triton.language as tl

# The gate's form, 0 where there is none.
HEAD_GATE = tl.constexpr(1)
CHANNEL_GATE = tl.constexpr(2)


@triton.jit
def tile_rows(H: tl.constexpr, BR: tl.constexpr):
    """(o_t, o_h): token (of the program's first tile) and head of each row of the tile, int64 [BR]."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    return tl.cast(o_r // H, tl.int64), tl.cast(o_r % H, tl.int64)


@triton.jit
def tile_loop(tokens, H: tl.constexpr, BR: tl.constexpr):
    """(last, step): a program's tiles begin `range(0, last, step)` tokens after its first one."""
    return tokens - tl.program_id(0) * BR // H, tl.num_programs(0) * BR // H


@triton.jit
def token_offsets(o_t, T, s_b, s_t, BATCH: tl.constexpr):
    """Offsets of tokens [BR] that count on through the batch. BATCH = False: one stride serves all of them."""
    if BATCH:
        return o_t // T * s_b + o_t % T * s_t
    return o_t * s_t


@triton.jit
def inverse_rms(b_m, eps, W: tl.constexpr):
    # [BR, BW] -> [BR, 1]; channels past W are 0
    return tl.rsqrt(tl.sum(b_m * b_m, 1) / W + eps)[:, None]
