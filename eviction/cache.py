"""A cache of equal units, as a replay needs one: a capacity, a forest of residents, a ranking.

It decides with the same `choose` over the same rankings as the daemon, and knows nothing of time but what it is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .candidate import Candidate
from .policy import Policy, Worth
from .residents import Residents
from .use import UnitId
from .victims import ALL_SCORED, choose


class Unit(NamedTuple):
    """One unit of a chain: where it stands. `stop_tokens` is the length of the chain up to its end."""

    id: UnitId
    previous: UnitId | None
    stop_tokens: int


class Admitted(NamedTuple):
    """What became of newcomers: who left for them, leaf first, and which of them stayed, front first.

    What is in `refused` is worth less than what is there, so it never came. A parent is behind its followers, as in
    `evicted`.
    """

    evicted: tuple[Unit, ...]
    inserted: tuple[Unit, ...]
    refused: tuple[Unit, ...]


class Cache:
    """At most `capacity_units` residents; only leaves go. `worth` is the ranking's, see policy.Worth.

    Of more than `all_scored` leaves a decision looks at a sample, see `choose`.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        capacity_units: int,
        unit_tokens: int,
        unit_bytes: int,
        worth: Worth,
        all_scored: int = ALL_SCORED,
    ) -> None:
        assert capacity_units > 0, capacity_units
        self.capacity_units = capacity_units
        self._unit_tokens = unit_tokens
        self._unit_bytes = unit_bytes
        self._worth = worth
        self._all_scored = all_scored
        self._ranking = policy.ranking(capacity_units * unit_bytes, worth)
        self._residents = Residents()
        self._units: dict[UnitId, Unit] = {}  # the residents
        self._described: dict[UnitId, Candidate] = {}  # residents that were looked at: making one takes a while
        self._held: Counter[UnitId] = Counter()
        self._in_use: set[UnitId] = set()  # by the request that is being admitted

    def __contains__(self, unit_id: UnitId) -> bool:
        return unit_id in self._units

    def __len__(self) -> int:
        return len(self._units)

    def front(self, chain: Sequence[UnitId]) -> int:
        """How many units of the chain are here before the first that is not."""
        units = self._units
        for number, unit_id in enumerate(chain):
            if unit_id not in units:
                return number
        return len(chain)

    def hold(self, unit_ids: Iterable[UnitId]) -> list[UnitId]:
        """Those of the units that are here stay until they are released as often as they were held; returns them."""
        held = [unit_id for unit_id in unit_ids if unit_id in self._units]
        self._held.update(held)
        return held

    def release(self, unit_ids: Sequence[UnitId]) -> None:
        """End one hold of each."""
        for unit_id in unit_ids:
            assert self._held[unit_id] > 0, unit_id
            self._held[unit_id] -= 1
            if not self._held[unit_id]:
                del self._held[unit_id]

    def admit(self, units: Sequence[Unit], now_ns: int, in_use: Sequence[UnitId] = ()) -> Admitted:
        """Units that are not here come in, parents before their followers, and whoever is worth least leaves.

        Newcomers compete with everybody else, so a victim among them was refused and no other had to leave for it.
        What is here of `in_use` stays.
        """
        admitted = self.plan(units, now_ns, in_use)
        self.dismiss(admitted)
        return admitted

    def plan(self, units: Sequence[Unit], now_ns: int, in_use: Sequence[UnitId] = ()) -> Admitted:
        """As `admit`, but who leaves is still here until `dismiss`: there is time to keep it elsewhere."""
        self._in_use = {unit_id for unit_id in in_use if unit_id in self._units}
        for unit in units:
            assert unit.id not in self._units, unit
            self._units[unit.id] = unit
            self._residents.came(unit.id, unit.previous)
            self._ranking.came(unit.id, self._unit_bytes)
        surplus = len(self._units) - self.capacity_units
        if surplus <= 0:
            return Admitted((), tuple(units), ())
        victims = choose(
            self._residents,
            self._ranking,
            self._describe,
            now_ns,
            lambda chosen: len(chosen) >= surplus,
            all_scored=self._all_scored,
        )
        assert victims is not None, "newcomers are never held, and there are as many as are too many"
        newcomers = {unit.id for unit in units}
        leaving = [self._units[victim.id] for victim in victims]
        gone = {unit.id for unit in leaving}
        return Admitted(
            evicted=tuple(unit for unit in leaving if unit.id not in newcomers),
            inserted=tuple(unit for unit in units if unit.id not in gone),
            refused=tuple(unit for unit in leaving if unit.id in newcomers),
        )

    def dismiss(self, admitted: Admitted) -> None:
        """Those who lost their place leave."""
        for unit in (*admitted.refused, *admitted.evicted):  # newcomers follow others, not the other way round
            self._residents.left(unit.id)
            self._ranking.left(unit.id)
            del self._units[unit.id]
            self._described.pop(unit.id, None)

    def _describe(self, unit_id: UnitId) -> Candidate:
        if unit_id in self._held or unit_id in self._in_use:
            return self._candidate(unit_id, movable=False)
        found = self._described.get(unit_id)
        if found is None:
            found = self._described[unit_id] = self._candidate(unit_id, movable=True)
        return found

    def _candidate(self, unit_id: UnitId, *, movable: bool) -> Candidate:
        unit = self._units[unit_id]
        start_tokens = (unit.stop_tokens - 1) // self._unit_tokens * self._unit_tokens
        return Candidate(
            id=unit_id,
            unit=unit_id,
            previous=unit.previous,
            size_bytes=self._unit_bytes,
            movable=movable,
            restore_ns=round(self._worth(unit.stop_tokens) - self._worth(start_tokens)),
        )
