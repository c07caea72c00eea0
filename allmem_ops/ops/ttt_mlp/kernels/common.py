"""Device functions that the kernels of `ttt_mlp` share: spans of tokens, matrices as [d, hidden] tiles, activations, row norms.

The three matrices are tiles [BD, W]: d channels down, W hidden units across, whatever lies in memory. A row of Wgate and Wup is
a column here, a row of Wdown a row.
"""

import triton
import triton.language as tl

# Values of NORM.
NONE = tl.constexpr(0)
PRE_WRITE = tl.constexpr(1)
POST_WRITE = tl.constexpr(2)


# ---- tokens: which sequence, which chunk


@triton.jit
def sequence_span(cu_seqlens, count, i_n, T, chunk_size, PACKED: tl.constexpr, CARRIED: tl.constexpr):
    """Sequence `i_n` as (row of q, its first token in that row, its length, tokens that its open chunk holds), int32.

    Offsets and counters are clamped: bad values can't lead outside the tensors.
    """
    i_b = i_n
    begin = T * 0
    length = T
    if PACKED:
        i_b = i_n * 0
        begin = tl.minimum(tl.maximum(tl.cast(tl.load(cu_seqlens + i_n), tl.int32), 0), T)
        length = tl.minimum(tl.maximum(tl.cast(tl.load(cu_seqlens + i_n + 1), tl.int32), begin), T) - begin
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
def first_slot(first, i_n, steps, PACKED: tl.constexpr):
    """The slot of chunk 0 of sequence `i_n`; its chunk j has the j-th slot after it."""
    if PACKED:
        return tl.load(first + i_n)
    else:
        return i_n * steps


@triton.jit
def sequence_slots(first, i_n, steps, length, held, chunk_size, PACKED: tl.constexpr, KEEP: tl.constexpr):
    """(slot of chunk 0 of sequence `i_n`, its written chunks).

    `steps`: slots of a sequence; packed: of all. `cu_seqlens` that decreases may make slots overlap, but not pass the last one.
    """
    slot = first_slot(first, i_n, steps, PACKED)
    written = written_chunks(length, held, chunk_size, KEEP)
    if PACKED:
        written = tl.minimum(written, steps - 1 - slot)
    return slot, written


@triton.jit
def chunk_span(i_c, length, held, chunk_size):
    """Tokens [start, stop) of chunk `i_c`, counted from the sequence's first token in this call; none if start >= stop."""
    return tl.maximum(i_c * chunk_size - held, 0), tl.minimum((i_c + 1) * chunk_size - held, length)


@triton.jit
def slot_owner(slots, i_s, steps, PACKED: tl.constexpr):
    """(sequence, chunk) of a slot; sequence -1: the slot is not used."""
    if PACKED:
        return tl.load(slots + 2 * i_s), tl.load(slots + 2 * i_s + 1)
    else:
        return i_s // steps, i_s % steps


# ---- tiles of the three matrices


@triton.jit
def load_public(gate, up, down, row, o_d, o_h, mask, D: tl.constexpr, HID: tl.constexpr):
    """Tiles of matrix `row` of tensors [..., h, d], [..., h, d], [..., d, h], contiguous."""
    at = tl.cast(row, tl.int64) * (D * HID)
    o_t = o_h[None, :] * D + o_d[:, None]
    o = o_d[:, None] * HID + o_h[None, :]
    return (
        tl.load(gate + at + o_t, mask=mask, other=0.0),
        tl.load(up + at + o_t, mask=mask, other=0.0),
        tl.load(down + at + o, mask=mask, other=0.0),
    )


@triton.jit
def store_public(gate, up, down, row, o_d, o_h, mask, b_gate, b_up, b_down, D: tl.constexpr, HID: tl.constexpr):
    at = tl.cast(row, tl.int64) * (D * HID)
    o_t = o_h[None, :] * D + o_d[:, None]
    o = o_d[:, None] * HID + o_h[None, :]
    tl.store(gate + at + o_t, b_gate, mask=mask)
    tl.store(up + at + o_t, b_up, mask=mask)
    tl.store(down + at + o, b_down, mask=mask)


@triton.jit
def load_three(p, row, o_d, o_h, mask, D: tl.constexpr, HID: tl.constexpr):
    """Tiles of row `row` of a tensor [..., 3, d, h]. `.cg`: another program may have written it in this launch."""
    at = p + tl.cast(row, tl.int64) * (3 * D * HID) + (o_d[:, None] * HID + o_h[None, :])
    return (
        tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"),
        tl.load(at + D * HID, mask=mask, other=0.0, cache_modifier=".cg"),
        tl.load(at + 2 * D * HID, mask=mask, other=0.0, cache_modifier=".cg"),
    )


@triton.jit
def store_three(p, row, o_d, o_h, mask, b_gate, b_up, b_down, D: tl.constexpr, HID: tl.constexpr):
    at = p + tl.cast(row, tl.int64) * (3 * D * HID) + (o_d[:, None] * HID + o_h[None, :])
    dtype = p.dtype.element_ty
    tl.store(at, tl.cast(b_gate, dtype), mask=mask)
    tl.store(at + D * HID, tl.cast(b_up, dtype), mask=mask)
    tl.store(at + 2 * D * HID, tl.cast(b_down, dtype), mask=mask)


# ---- rows: norms over the input dimension


@triton.jit
def root(x, FAST: tl.constexpr):
    """FAST: a unit in the last place, for results that half-precision operands follow; exact rounding costs a subroutine."""
    if FAST:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def column_size(b, FAST: tl.constexpr = False):
    return root(tl.sum(b * b, 0), FAST)


@triton.jit
def row_scale(n, size, eps, FAST: tl.constexpr = False):
    """N / (|W| + eps); with eps = 0 a zero row stays zero instead of 0 / 0."""
    below = size + eps
    filled = tl.where(below > 0, below, 1.0)
    if FAST:
        return tl.where(below > 0, n / filled, 0.0)
    else:
        return tl.where(below > 0, tl.div_rn(n, filled), 0.0)


@triton.jit
def sum_parts(p, stride, m_d, PARTS: tl.constexpr):
    """The sum of PARTS vectors at `p`, `stride` apart, in a fixed order; `.cg` as in `load_three`.

    As one tile where its shape allows: a load or two a thread, where a load for each part takes a register for each. At d = 128 the
    tile takes more of them than that.
    """
    if (PARTS & (PARTS - 1) == 0) and (m_d.shape[0] <= 64):
        at = p[None, :] + tl.arange(0, PARTS)[:, None] * stride
        return tl.sum(tl.load(at, mask=m_d[None, :], other=0.0, cache_modifier=".cg"), 0)
    else:
        b_sum = tl.zeros([m_d.shape[0]], dtype=tl.float32)
        for i_p in tl.static_range(PARTS):
            b_sum += tl.load(p + i_p * stride, mask=m_d, other=0.0, cache_modifier=".cg")
        return b_sum


@triton.jit
def row_sizes(p, i_x, o_d, D: tl.constexpr, PARTS: tl.constexpr, FAST: tl.constexpr = False):
    """Norms of the rows of Wdown [BD] from the parts' sums of squares [..., PARTS, d], added in their order."""
    at = p + tl.cast(i_x, tl.int64) * (PARTS * D) + o_d
    b_sum = sum_parts(at, D, o_d < D, PARTS)
    return root(b_sum, FAST)


@triton.jit
def load_sizes(size, i_r, o_h, D: tl.constexpr, HID: tl.constexpr):
    """Row norms of Wgate and Wup of hidden units `o_h` in slot and head `i_r`."""
    at = size + tl.cast(i_r, tl.int64) * (2 * HID + D) + o_h
    m_h = o_h < HID
    return (
        tl.load(at, mask=m_h, other=0.0, cache_modifier=".cg"),
        tl.load(at + HID, mask=m_h, other=0.0, cache_modifier=".cg"),
    )


@triton.jit
def point(
    b_gate, b_up, b_down, n_gate, n_up, n_down, size_gate, size_up, size_down, i_c, eps, NORM: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """The point of chunk `i_c`'s write from X: what the gradient is taken at and the momentum added to."""
    s_gate = row_scale(n_gate, size_gate, eps, FAST)
    s_up = row_scale(n_up, size_up, eps, FAST)
    s_down = row_scale(n_down, size_down, eps, FAST)
    if NORM == POST_WRITE:
        # the first weights are taken as they are
        s_gate = tl.where(i_c > 0, s_gate, 1.0)
        s_up = tl.where(i_c > 0, s_up, 1.0)
        s_down = tl.where(i_c > 0, s_down, 1.0)
    return b_gate * s_gate[None, :], b_up * s_up[None, :], b_down * s_down[:, None]


# ---- activations


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """FAST: one instruction of the special function unit instead of two, off by up to 2.5e-4, an eighth of a bfloat16 rounding at 1."""
    if FAST:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1)
        return 0.5 * y + 0.5
    else:
        return tl.sigmoid(x)
