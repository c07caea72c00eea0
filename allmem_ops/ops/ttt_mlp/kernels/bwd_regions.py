"""Where things lie in the two buffers of the backward: every pointer that a launch passes costs the host microseconds."""

import triton
import triton.language as tl

# Counters of the persistent chain, int32, one in 32 (a line of the cache each), at the front of `scratch`.
GROUPS = tl.constexpr(512)


@triton.jit
def operand_regions(operands, R, D: tl.constexpr, HID: tl.constexpr):
    """Three of [R, d, 2h], R slots and heads, in the operands' dtype: pairs of the write point's gate and up; of their dD; of the write
    point's down and its dD. Until the chain begins the second and third hold what queries read: a pair of gate and up, and down.
    """
    size = tl.cast(R, tl.int64) * (2 * D * HID)
    return operands, operands + size, operands + 2 * size


@triton.jit
def read_operands(operands, R, D: tl.constexpr, HID: tl.constexpr, SAME: tl.constexpr):
    """Gate and up, and down, as queries read them. SAME: gate and up are those of the write point."""
    point_gate_up, read_gate_up, read_down = operand_regions(operands, R, D, HID)
    if SAME:
        return point_gate_up, read_down
    else:
        return read_gate_up, read_down


@triton.jit
def gradient_regions(scratch, R, X, D: tl.constexpr, HID: tl.constexpr):
    """dread [R, 3, d, h]; of the X (sequence, head): dX and dM [X, 3, d, h], dN [X, 2h + d]."""
    size = tl.cast(X, tl.int64) * (3 * D * HID)
    dread = scratch + GROUPS * 32
    dx = dread + tl.cast(R, tl.int64) * (3 * D * HID)
    return dread, dx, dx + size, dx + 2 * size


@triton.jit
def exchange_regions(scratch, R, X, D: tl.constexpr, HID: tl.constexpr, BH: tl.constexpr, PARTS: tl.constexpr):
    """What the chain's programs exchange: slabs [X, PARTS, d, 2 BH] and [X, PARTS, d, BH], sums by row [X, PARTS, 2, BH] and
    [X, PARTS, 2, d], <dM, C> [X, PARTS, 3]; <dM, M> [R, PARTS].
    """
    programs = tl.cast(X, tl.int64) * PARTS
    _, _, _, dn = gradient_regions(scratch, R, X, D, HID)
    slabs_gate_up = dn + tl.cast(X, tl.int64) * (2 * HID + D)
    slabs_down = slabs_gate_up + programs * (2 * D * BH)
    rows_hidden = slabs_down + programs * (D * BH)
    rows_down = rows_hidden + programs * (2 * BH)
    clip_parts = rows_down + programs * (2 * D)
    return slabs_gate_up, slabs_down, rows_hidden, rows_down, clip_parts, clip_parts + programs * 3


def scratch_size(R: int, X: int, D: int, HID: int, BH: int, PARTS: int) -> int:
    """Elements of `scratch`."""
    return GROUPS.value * 32 + (R + 2 * X) * 3 * D * HID + X * (2 * HID + D) + X * PARTS * (3 * D * BH + 2 * BH + 2 * D + 3) + R * PARTS
