"""Belady: what is used again last leaves first. It knows the future, so it is for comparison alone.

MIN of Belady, A Study of Replacement Algorithms for a Virtual-Storage Computer, IBM Systems Journal 5(2), 1966, with
bypass where newcomers compete. Units of one size: it is optimal for the number of hits on units; a unit's use implies
that of all in front of it, so going leaf-first costs nothing. It is not optimal for seconds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from .candidate import Candidate
from .use import UnitId, Use

if TYPE_CHECKING:
    from .policy import Worth


class Belady:
    """Made with all chains that will be used, in order, and told of these uses and of no others."""

    name: Final = "belady"

    def __init__(self, chains: Iterable[Sequence[UnitId]]) -> None:
        to_come = list(chains)
        never = len(to_come)
        following: dict[UnitId, int] = {}
        self._nexts: list[array[int]] = []  # for each use, the numbers of the next uses of its units
        for number in range(len(to_come) - 1, -1, -1):
            chain = to_come[number]
            self._nexts.append(array("i", [following.get(unit, never) for unit in chain]))
            following |= dict.fromkeys(chain, number)
        self._nexts.reverse()
        self._used = 0
        self._next: dict[UnitId, int] = {}  # of what was used before and will be again

    def used(self, use: Use) -> None:
        """The next one of those that it was made with."""
        assert self._used < len(self._nexts), "one use more than there were to come"
        nexts = self._nexts[self._used]
        assert len(nexts) == len(use.chain), "not the use that was to come"
        self._used += 1
        known = self._next
        for unit, number in zip(use.chain, nexts, strict=True):
            if number < len(self._nexts):
                known[unit] = number
            else:
                known.pop(unit, None)

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """The past is of no account."""

    def ranking(self, capacity_bytes: int, worth: Worth) -> BeladyRanking:
        """See Policy.ranking."""
        return BeladyRanking(self)

    def uses_until(self, unit: UnitId) -> int | None:
        """How many uses lie before its next one; None when it has none, or was never used so far."""
        number = self._next.get(unit)
        return None if number is None else number - self._used

    def uses_to_come(self) -> int:
        """All that are left."""
        return len(self._nexts) - self._used


class BeladyRanking:
    """Any cache's view of the future."""

    def __init__(self, policy: Belady) -> None:
        self._policy = policy

    def came(self, unit: UnitId, size_bytes: int) -> None:
        """The past is of no account."""

    def left(self, unit: UnitId) -> None:
        """The past is of no account."""

    def scores(self, candidates: Sequence[Candidate], now_ns: int) -> Sequence[float]:
        """Minus the uses until the next one of this unit; lower than all of these where there is none."""
        never = self._policy.uses_to_come() + 1
        found = (self._policy.uses_until(candidate.unit) for candidate in candidates)
        return [-float(never if until is None else until) for until in found]

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """Whether it is used again, and after how many uses of others."""
        until = self._policy.uses_until(candidate.unit)
        return {
            "is_used_again": float(until is not None),
            "uses_until": float(self._policy.uses_to_come() if until is None else until),
            "score": self.scores([candidate], now_ns)[0],
        }
