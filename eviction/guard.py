"""Guard: a policy that never does much worse than LRU, whatever the traffic.

A policy that learns can be wrong about traffic that nobody has seen. So beside each cache a guard keeps what an LRU of
the same capacity would hold, as ids only, and compares what both save on every use, in the cache's own worth. While the
policy is behind by more than TOLERANCE of all that was asked for, the cache parts with what LRU would, and so falls
behind no further; once its share of what was asked has shrunk to half of that, the policy gets another chance.

So what the policy can lose is bounded by TOLERANCE, and by what is lost while the contents turn into those of LRU.
Being ahead is a credit, and a bounded one: CREDIT, so that a policy that was good for long cannot be bad for long.

It is a guard against disasters, not against bad luck: turning a large cache into LRU's and back takes as many uses as
fill it, and costs what a policy that is a little behind would have caught up meanwhile. (A tolerance of 0.001 turned
losses of 0.001 on chat at 20 % of the footprint into 0.005.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Final

from .candidate import Candidate
from .per_cache import PerCache
from .use import UnitId, Use

if TYPE_CHECKING:  # the registry there names guarded policies
    from .policy import Policy, Ranking, Worth

TOLERANCE: Final = 0.01  # of the worth of all that was asked for
CREDIT: Final = 0.02
SETTLED_USES: Final = 1_000  # before so many the tolerance is that of so many: a few misses are no evidence
MEMORY_USES: Final = 16_384  # older ones fade
FIRST_UNITS: Final = 65_536  # that a shadow remembers before it knows how large units are


class Guard(PerCache["GuardRanking"]):
    """A policy, and LRU where it fails."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._policy = policy

    @property
    def name(self) -> str:
        """The policy's: this is how it is served."""
        return self._policy.name

    def used(self, use: Use) -> None:
        """See Policy.used."""
        super().used(use)
        self._policy.used(use)

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """See Policy.released."""
        super().released(chain, now_ns)
        self._policy.released(chain, now_ns)

    def ranking(self, capacity_bytes: int, worth: Worth) -> GuardRanking:
        """Every cache has a guard of its own: what fails in one may serve another."""
        return self.follow(GuardRanking(self._policy.ranking(capacity_bytes, worth), capacity_bytes, worth))


class GuardRanking:
    """The policy's ranking, or LRU order; and what tells which of them."""

    def __init__(self, ranking: Ranking, capacity_bytes: int, worth: Callable[[int], float]) -> None:
        self.follows_lru = False
        self._ranking = ranking
        self._worth = worth
        self._shadow = Shadow(capacity_bytes)
        self._ahead = 0.0  # nanoseconds that the cache has saved more than LRU
        self._asked = 0.0  # nanoseconds that all chains together are worth
        self._uses = 0.0

    def used(self, use: Use) -> None:
        """Compare what is here of a chain with what LRU would have."""
        self._shadow.trim()
        ours = self._saved(use, self._shadow.is_here)
        lru = self._saved(use, self._shadow.__contains__)
        keep = 1 - 1 / MEMORY_USES
        self._uses = self._uses * keep + 1
        self._asked = self._asked * keep + self._worth(use.token_count)
        self._ahead = min(self._ahead * keep + ours - lru, CREDIT * self._asked)
        tolerated = TOLERANCE * self._asked * max(1.0, SETTLED_USES / self._uses)
        self.follows_lru = self._ahead < -tolerated * (0.5 if self.follows_lru else 1.0)
        self._shadow.used(use.chain)

    def _saved(self, use: Use, is_here: Callable[[UnitId], bool]) -> float:
        units = len(list(takewhile(is_here, use.chain)))
        return self._worth(min(units * use.unit_tokens, use.token_count))

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """As a use: age counts from here."""
        self._shadow.used(chain)

    def came(self, unit: UnitId, size_bytes: int) -> None:
        """See Ranking.came."""
        self._shadow.came(unit, size_bytes)
        self._ranking.came(unit, size_bytes)

    def left(self, unit: UnitId) -> None:
        """See Ranking.left."""
        self._shadow.left(unit)
        self._ranking.left(unit)

    def scores(self, candidates: Sequence[Candidate], now_ns: int) -> Sequence[float]:
        """The policy's; or the number of the last use, while the policy is behind."""
        if self.follows_lru:
            return [self._shadow.last(candidate.unit) for candidate in candidates]
        return self._ranking.scores(candidates, now_ns)

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """The policy's parts; "ahead_of_lru" is the share of what was asked for that was saved more than by LRU.

        "follows_lru" is 1 while the policy is behind, and "score" is LRU's then.
        """
        parts = self._ranking.explain(candidate, now_ns)
        if self.follows_lru:
            parts["score"] = self._shadow.last(candidate.unit)
        return parts | {
            "ahead_of_lru": self._ahead / self._asked if self._asked else 0.0,
            "follows_lru": float(self.follows_lru),
        }


class Shadow:
    """What an LRU cache would hold, by id, and the order of last uses of what the real one holds.

    Its capacity is counted in units of the mean size of those that came. Not every use brings a chain into every cache:
    it may be for another group, be hit in a nearer tier, or not be worth writing. So a unit takes room in the shadow,
    and is found there, only if it was in the real cache since the shadow has it; `absent` are the others.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.order: dict[UnitId, int] = {}  # last uses, the oldest first: their number if it is here, else minus that
        self.absent: dict[UnitId, None] = {}  # of those; the one used longest ago first
        self._strays: dict[UnitId, int] = {}  # last use of residents that LRU would have evicted; 0: nobody knows
        self._capacity_bytes = capacity_bytes
        self._came_bytes = 0
        self._came = 0
        self._number = 0

    def used(self, chain: Sequence[UnitId]) -> None:
        """All of it comes, its tail as the first to leave."""
        self._number += 1
        here, away = self._number, -self._number
        for unit in reversed(chain):
            last = self.order.pop(unit, None)
            is_here = unit in self._strays if last is None else last > 0
            if last is None:
                self._strays.pop(unit, None)
            self.order[unit] = here if is_here else away
            if not is_here if last is None else unit in self.absent:
                self.absent.pop(unit, None)
                self.absent[unit] = None
        self.trim()

    def __contains__(self, unit: object) -> bool:
        return unit in self.order and unit not in self.absent

    def is_here(self, unit: UnitId) -> bool:
        """Whether the real cache has it."""
        last = self.order.get(unit)
        return unit in self._strays if last is None else last > 0

    def trim(self) -> None:
        """Those used longest ago leave; of the absent ones as many are remembered as of the others.

        Many at a time: to find the first of a dict takes the longer the more have left before it.
        """
        capacity = self.capacity_units
        while (more := len(self.order) - len(self.absent) - capacity) > 0:
            for unit in list(islice(self.order, more)):
                last = self.order.pop(unit)
                self.absent.pop(unit, None)
                if last > 0:
                    self._strays[unit] = last
        for unit in list(islice(self.absent, max(0, len(self.absent) - capacity))):
            del self.absent[unit], self.order[unit]

    @property
    def capacity_units(self) -> int:
        """How many of them fit."""
        return self._capacity_bytes * self._came // self._came_bytes if self._came_bytes else FIRST_UNITS

    def came(self, unit: UnitId, size_bytes: int) -> None:
        """It is in the real cache. Call `trim` before asking the shadow again."""
        last = self.order.get(unit)
        if last is None:
            self._strays.setdefault(unit, 0)
        else:
            self.order[unit] = abs(last)
        self._came_bytes += size_bytes
        self._came += 1
        self.absent.pop(unit, None)

    def left(self, unit: UnitId) -> None:
        """It is not any more."""
        last = self.order.get(unit)
        if last is None:
            self._strays.pop(unit, None)
        else:
            self.order[unit] = -abs(last)

    def last(self, unit: UnitId) -> float:
        """Number of its last use; 0 where nothing is known."""
        return float(abs(self.order.get(unit, self._strays.get(unit, 0))))
