"""Caches: what each tier, or each group's HBM, holds as a forest, and its ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..eviction.policy import Ranking
from ..eviction.residents import Residents
from ..eviction.use import UnitId


@dataclass(eq=False, slots=True, kw_only=True)
class Cache:
    """`units` are those that the ranking knows to be here, with their sizes; `residents` may hold more."""

    ranking: Ranking
    residents: Residents = field(default_factory=Residents)
    units: dict[UnitId, int] = field(default_factory=dict)

    def now_holds(self, chain: Mapping[UnitId, UnitId | None], units: Mapping[UnitId, int]) -> None:
        """Take over what has changed: ids with the one before each, and units with their sizes."""
        for gone in [one for one in self.residents if one not in chain]:
            self.residents.left(gone)
        for one, previous in chain.items():
            if one not in self.residents:
                self.residents.came(one, previous)
        for unit in self.units.keys() - units.keys():
            self.ranking.left(unit)
        for unit, size_bytes in units.items():
            if unit not in self.units:
                self.ranking.came(unit, size_bytes)
        self.units = dict(units)
