"""Forests: what eviction may look at in DDR and on NVMe, as chains of extents that are kept up to date."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..eviction.residents import Residents
from ..eviction.use import UnitId
from .extent import Extent
from .residency import Placement, State


class Forests:
    """Of DDR, what is there and does not drain. Of NVMe, what is there or in DDR.

    What only DDR holds cannot leave NVMe, but keeps its front there.
    """

    def __init__(self) -> None:
        self.ddr = Residents()
        self.nvme = Residents()

    def follow(self, extent: Extent, ddr: Placement | None, nvme: Placement | None) -> None:
        """Take over where its copies are now; again is as once."""
        is_in_ddr = ddr is not None and ddr.state is not State.DRAINING
        _follow(self.ddr, extent, ddr if is_in_ddr else None)
        _follow(self.nvme, extent, ddr if is_in_ddr else nvme)

    def check(self, copies: Iterable[tuple[Extent, Placement | None, Placement | None]]) -> None:
        """Assert that they are what these copies make from scratch."""
        anew = Forests()
        for extent, ddr, nvme in copies:
            anew.follow(extent, ddr, nvme)
        for ours, theirs in ((self.ddr, anew.ddr), (self.nvme, anew.nvme)):
            assert {e: ours.previous(e) for e in ours} == {e: theirs.previous(e) for e in theirs}, "a forest is behind"
            assert set(ours.leaves) == set(theirs.leaves), "the leaves of a forest"


def _follow(forest: Residents, extent: Extent, copy: Placement | None) -> None:
    if (copy is not None) == (extent.id in forest):
        return
    if copy is not None:
        forest.came(extent.id, extent.previous)
    else:
        forest.left(extent.id)


class Unchained:
    """A forest without the links to what is clean: that may leave before what lies behind it.

    Making it looks at every resident.
    """

    def __init__(self, forest: Residents, is_clean: Callable[[UnitId], bool]) -> None:
        self._forest = forest
        self._is_clean = is_clean
        self.leaves: Sequence[UnitId] = [one for one in forest if not forest.followers(one) or is_clean(one)]

    def __contains__(self, unit_id: UnitId) -> bool:
        return unit_id in self._forest

    def previous(self, unit_id: UnitId) -> UnitId | None:
        """None where that is clean, and so a leaf already."""
        previous = self._forest.previous(unit_id)
        return None if previous is None or self._is_clean(previous) else previous

    def followers(self, unit_id: UnitId) -> int:
        """What is clean has none."""
        return 0 if self._is_clean(unit_id) else self._forest.followers(unit_id)
