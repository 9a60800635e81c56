"""Sketch: about how often something was used lately, in a few bytes each."""

from __future__ import annotations

from typing import Final

import xxhash

from .use import UnitId

ROWS: Final = 4
COUNT_MAX: Final = 15
COUNTERS_PER_UNIT: Final = 4  # in each row
SAMPLE_PER_UNIT: Final = 10  # uses until all counts are halved
HALVES: Final = bytes(count // 2 for count in range(256))


class Sketch:
    """A count-min sketch with conservative update, whose counts are halved after so many uses.

    Cormode and Muthukrishnan, J. Algorithms 55(1), 2005; halving as in Einziger, Friedman and Manes, TinyLFU, ACM ToS
    13(4), 2017. Estimates are never too low between two halvings, up to COUNT_MAX. Deterministic: ids are hashed by
    xxh3, not by Python's salted hash.
    """

    def __init__(self) -> None:
        self._mask = 63
        self._unit_count = 16
        self._rows = [bytearray(64) for _ in range(ROWS)]
        self._added = 0

    def widen(self, unit_count: int) -> None:
        """Room for so many units. No estimate changes."""
        self._unit_count = max(self._unit_count, unit_count)
        while self._mask + 1 < COUNTERS_PER_UNIT * unit_count:
            self._rows = [row + row for row in self._rows]
            self._mask = 2 * self._mask + 1

    def add(self, unit: UnitId) -> None:
        """One use more."""
        first, second, third, fourth = self._rows
        a, b, c, d = self._counters(unit)
        count = min(first[a], second[b], third[c], fourth[d])
        if count < COUNT_MAX:
            for row, counter in ((first, a), (second, b), (third, c), (fourth, d)):
                if row[counter] == count:
                    row[counter] = count + 1
        self._added += 1
        if self._added >= SAMPLE_PER_UNIT * self._unit_count:
            self._rows = [row.translate(HALVES) for row in self._rows]
            self._added //= 2

    def count(self, unit: UnitId) -> int:
        """The estimate."""
        first, second, third, fourth = self._rows
        a, b, c, d = self._counters(unit)
        return min(first[a], second[b], third[c], fourth[d])

    def _counters(self, unit: UnitId) -> tuple[int, int, int, int]:
        digest = xxhash.xxh3_64_intdigest(str(unit).encode())
        step = digest >> 32 | 1
        mask = self._mask
        return digest & mask, digest + step & mask, digest + 2 * step & mask, digest + 3 * step & mask
