"""Which pairs exist: the visibility rule as pure integer functions, shared by every implementation and the cost model.

Query `i` sees key `j` iff `j <= i` and (`i - j < window` or `j < sinks`). The pairs fall into two classes that no pair
shares: *window* pairs, `0 <= i - j < window`, and *far sink* pairs, `j < sinks` and `i - j >= window`.
"""

from collections.abc import Iterator
from typing import NamedTuple


def _ramp(n: int, top: int) -> int:
    """min(1, top) + min(2, top) + ... + min(n, top); 0 for n <= 0."""
    n = max(n, 0)
    low = min(n, top)
    return low * (low + 1) // 2 + (n - low) * top


def visible_pairs(Tq: int, Tk: int, window: int, sinks: int) -> int:
    """The number of visible (query, key) pairs of one sequence and head; the queries are the last `Tq` of `Tk` positions.

    Query `i` has `min(i + 1, window)` window pairs and `min(i + 1 - window, sinks)` far sink pairs (0 where negative).
    Both summed over `i` are ramps.
    """
    before = Tk - Tq
    window_pairs = _ramp(Tk, window) - _ramp(before, window)
    far_sink_pairs = _ramp(Tk - window, sinks) - _ramp(before - window, sinks)
    return window_pairs + far_sink_pairs


class Block(NamedTuple):
    """Queries `[i0, i1)` and the two key ranges that hold their pairs: the band `[b0, i1)` and the sinks `[0, s1)`.

    Band: the window pairs. Sinks: the far sink pairs. Near the start a key may stand in both ranges, with different queries.
    """

    i0: int
    i1: int
    b0: int
    s1: int


def query_blocks(Tq: int, Tk: int, window: int, sinks: int, size: int) -> Iterator[Block]:
    """The query blocks of one sequence, `size` positions each and the last one shorter."""
    for i0 in range(Tk - Tq, Tk, size):
        i1 = min(i0 + size, Tk)
        yield Block(i0, i1, max(i0 - window + 1, 0), min(sinks, max(i1 - window, 0)))


# Tiles. The functions below are the one source of truth of the kernels and the tests: integer arithmetic that Python runs and
# that kernels/tiles.py turns into device functions. So they call min and max alone, and divide only what is not negative (`//`
# rounds down in Python and towards zero on the device). Positions count from a sequence's first key.
#
# A pair of a window tile is visible iff `0 <= i - j < window`, a pair of a far sink tile iff `j < min(sinks, i - window + 1)`: a
# tile that lies in both ranges is visited once for each, and no pair is counted twice.


def query_tiles(i0: int, i1: int, window: int, sinks: int, size: int) -> tuple[int, int, int, int, int, int]:
    """The tiles of `size` keys that queries `[i0, i1)` touch; tile n holds keys `[n * size, (n + 1) * size)`.

    Returns:
        (sink_full, sink_end, left, full, diag, end), tile indices:
        `[0, sink_full)` far sinks, every pair visible; `[sink_full, sink_end)` far sinks, masked;
        `[left, full)` window, masked; `[full, diag)` window, every pair visible; `[diag, end)` window, masked.
        Where `full < diag`, only the window cuts the tiles of `[left, full)` and only causality those of `[diag, end)`.
    """
    sink_full = min(sinks, max(i0 - window + 1, 0)) // size
    sink_end = (min(sinks, max(i1 - window, 0)) + size - 1) // size
    left = max(i0 - window + 1, 0) // size
    full = (max(i1 - window, 0) + size - 1) // size
    diag = max((i0 + 1) // size, full)
    end = (i1 + size - 1) // size
    return sink_full, sink_end, left, full, diag, end


def key_tiles(j0: int, j1: int, start: int, Tk: int, window: int, sinks: int, size: int) -> tuple[int, int, int, int, int, int, int]:
    """The transpose: the tiles of `size` queries that see keys `[j0, j1)`; tile m holds queries `start + [m * size, (m + 1) * size)`.

    The queries are the positions `[start, Tk)`. The last tile may reach past Tk; only its queries before Tk are judged.

    Returns:
        (diag, full, right, end, far, far_full, far_end), tile indices:
        `[diag, full)` window, masked; `[full, right)` window, every pair visible; `[right, end)` window, masked;
        `[far, far_full)` far sinks, masked; `[far_full, far_end)` far sinks, every pair visible. `far_end` is the number of query
        tiles for a block with a sink that some query sees from afar, else 0.
        Where `full < right`, only causality cuts the tiles of `[diag, full)` and only the window those of `[right, end)`.
    """
    tiles = (Tk - start + size - 1) // size
    diag = max(j0 - start, 0) // size
    end = max((max(min(j1 - 1 + window, Tk) - start, 0) + size - 1) // size, diag)
    full = min(max((max(j1 - 1 - start, 0) + size - 1) // size, diag), end)
    right = end if j0 + window >= Tk else max(min(max(j0 + window - start, 0) // size, end), full)
    far_end = tiles if j0 < sinks and j0 + window < Tk else 0
    far = min(max(j0 + window - start, 0) // size, far_end)
    far_full = max(min((max(j1 - 1 + window - start, 0) + size - 1) // size, far_end), far) if j1 <= sinks else far_end
    return diag, full, right, end, far, far_full, far_end


# Tiles below a query block, for kernels that stack them from the diagonal down: the diagonal tile is `[i0, i0 + rows)`, as wide as
# the block, and band tiles of `size` keys lie below it, edge to edge with it instead of at multiples of `size`. At window 512, 64 rows
# and 128 keys that is 576 keys, of which 512 are visible to a row; at multiples of 128, 640.


def stacked_tiles(i0: int, rows: int, window: int, sinks: int, size: int) -> tuple[int, int, int, int, int, int, int]:
    """The tiles of `size` keys before the diagonal one that queries `[i0, i0 + rows)` touch, and the order to visit them in.

    Returns:
        (band, sink_end, sink_full, any_end, masked, full, count): `band` tiles of the window lie below `i0`, the first
        `i0 - band * size` (there is at least one, so that every block has a tile to start with; where this is negative the tile is
        read from key 0 on, and only its first keys, up to where the next tile begins, are its own); sinks before it are keys
        `[0, sink_end)`, whole tiles `[0, sink_full)` of them without a mask. `stacked_start` gives the first key of visit n:
        `[0, any_end)` tiles with a mask for window and sinks, `[any_end, masked)` tiles that the window alone cuts,
        `[masked, count)` tiles without a mask, of which `[full, count)` are of the band.
    """
    band = max((i0 - max(i0 - window + 1, 0) + size - 1) // size, 1)
    open_band = max(i0 - max(i0 + rows - window, 0), 0) // size
    sink_end = max(min(sinks, i0 - band * size), 0)
    sink_full = sink_end // size
    edge = (sink_end - sink_full * size + size - 1) // size
    masked = edge + band - open_band
    any_end = min(edge + max(band - max(i0 - sinks, 0) // size, 0), masked)
    return band, sink_end, sink_full, any_end, masked, masked + sink_full, masked + sink_full + open_band


def stacked_start(n: int, i0: int, band: int, sink_end: int, sink_full: int, masked: int, full: int, size: int) -> int:
    """The first key of visit n: the sink tile with a mask, band tiles with one, sink tiles without, band tiles without, upwards."""
    edge = (sink_end - sink_full * size + size - 1) // size
    below = band + edge - n  # band tiles from this one to the diagonal
    first = i0 - size * (below + (sink_full if n >= full else 0))
    if n < edge:
        first = sink_full * size
    if n >= masked and n < full:
        first = (n - masked) * size
    return first
