"""Tiling: a band over packed tokens as few, large kernel calls. Pure.

T queries and S keys, each ascending. Keys that every query sees are one FULL call, whatever lies
between them; a run of queries over a run of keys is one call of a kernel that knows its band; what
is left along the edges is halved until it is small, and masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from .band import FULL, Band
from .positions import Positions

# Queries x keys of a masked call: small enough that the wasted half and the mask cost little, large
# enough that the calls of a 16K causal square stay few.
MASKED_AREA: Final = 256 * 256

Native = Callable[[Band, int, int], bool]  # may (band between indices, queries, keys) be one call?


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries [a, b) over keys [c, d): `band` between their indices, or None for a mask by positions."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    band: Band | None


def tiles(queries: Positions, keys: Positions, band: Band, native: Native) -> list[Tile]:
    """The calls that together cover what `queries` see of `keys`, each pair exactly once."""
    if not len(queries) or not len(keys):
        return []
    return list(_Cutter(queries, keys, band, native).cut(0, len(queries), 0, len(keys)))


class _Cutter:
    def __init__(self, queries: Positions, keys: Positions, band: Band, native: Native) -> None:
        self._queries = queries
        self._keys = keys
        self._band = band
        self._native = native

    def cut(self, a: int, b: int, c: int, d: int) -> Iterator[Tile]:
        """Tiles of queries [a, b) over keys [c, d)."""
        a, b, c, d = self._narrowed(a, b, c, d)
        if a >= b or c >= d:
            return
        relative = self._relative(a, b, c, d)
        if relative is not None and self._native(relative, b - a, d - c):
            yield Tile((a, b), (c, d), relative)
            return
        start, stop = self._full(a, b, c, d)
        full, area = stop - start, (b - a) * (d - c)
        if 2 * full >= d - c or (full > 0 and relative is not None and area > MASKED_AREA):
            yield Tile((a, b), (start, stop), FULL)
            yield from self.cut(a, b, c, start)
            yield from self.cut(a, b, stop, d)
        elif area <= MASKED_AREA:
            yield Tile((a, b), (c, d), None)
        else:
            middle = self._queries.middle(a, b)
            yield from self.cut(a, middle, c, d)
            yield from self.cut(middle, b, c, d)

    def _narrowed(self, a: int, b: int, c: int, d: int) -> tuple[int, int, int, int]:
        """Without the queries at either end that see no key, and the keys that are seen by none; perhaps nothing.

        Keys that only a dropped query reached for are dropped too: kernels take no window that ends before a key.
        """
        while True:
            e, f = self._seen(a, b, c, d)
            g, h = self._seeing(a, b, e, f) if e < f else (a, a)
            if g >= h or (g, h, e, f) == (a, b, c, d):
                return g, h, e, f
            a, b, c, d = g, h, e, f

    def _seen(self, a: int, b: int, c: int, d: int) -> tuple[int, int]:
        """The part of the keys that any of the queries may see."""
        first, last = self._band.first, self._band.last
        if first is not None:
            c = max(c, self._keys.before(self._queries[a] + first))
        if last is not None:
            d = min(d, self._keys.before(self._queries[b - 1] + last + 1))
        return c, d

    def _seeing(self, a: int, b: int, c: int, d: int) -> tuple[int, int]:
        """The part of the queries that may see any of the keys."""
        first, last = self._band.first, self._band.last
        if last is not None:
            a = max(a, self._queries.before(self._keys[c] - last))
        if first is not None:
            b = min(b, self._queries.before(self._keys[d - 1] - first + 1))
        return a, b

    def _relative(self, a: int, b: int, c: int, d: int) -> Band | None:
        """The band between indices, if both sides are runs; FULL where it hides nothing."""
        if self._common(a, b, c, d) == (c, d):
            return FULL
        if not (self._queries.is_run(a, b) and self._keys.is_run(c, d)):
            return None
        return self._band.moved(self._queries[a] - self._keys[c])

    def _common(self, a: int, b: int, c: int, d: int) -> tuple[int, int]:
        """The keys that all of the queries see."""
        first, last = self._band.first, self._band.last
        if first is not None:
            c = max(c, self._keys.before(self._queries[b - 1] + first))
        if last is not None:
            d = min(d, self._keys.before(self._queries[a] + last + 1))
        return c, d

    def _full(self, a: int, b: int, c: int, d: int) -> tuple[int, int]:
        """The keys that all of the queries see, but without the corners of the edges beside them.

        A corner is the last key that the first query sees, or the first that the last one sees. With
        it a causal edge is a square, which kernels know.
        """
        first, last = self._band.first, self._band.last
        start, stop = self._common(a, b, c, d)
        if c < start < stop and first is not None and self._keys[start] == self._queries[b - 1] + first:
            start += 1
        if start < stop < d and last is not None and self._keys[stop - 1] == self._queries[a] + last:
            stop -= 1
        return start, stop
