"""Arrivals: how many leading layers of each of many extents have arrived, and of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .extent import ExtentId


class Arrivals:
    """`depths` says how many layers each extent has; one that has all of its own keeps no deeper one back.

    A step takes constant time: there are as many of them as extents times layers.
    """

    def __init__(self, depths: Mapping[ExtentId, int]) -> None:
        self._depths = depths
        self._at = dict.fromkeys(depths, 0)
        self._behind = Counter({0: len(depths)})  # unfinished extents by the layers that they have
        self._deepest = max(depths.values(), default=0)
        self.layers = 0  # leading layers that every extent has

    @property
    def complete(self) -> bool:
        """Every extent has all of its layers."""
        return self.layers == self._deepest

    def reach(self, extent: ExtentId, layers: int) -> None:
        """The extent has this many leading layers by now; fewer than before changes nothing."""
        before, depth = self._at[extent], self._depths[extent]
        assert layers <= depth, (extent, layers)
        if layers <= before:
            return
        self._at[extent] = layers
        self._behind[before] -= 1
        if layers < depth:
            self._behind[layers] += 1
        while self.layers < self._deepest and not self._behind[self.layers]:
            self.layers += 1
