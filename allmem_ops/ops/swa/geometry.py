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
