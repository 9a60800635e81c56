"""Shard forest: what eviction may look at in one group's HBM: each shard's copies, the last one first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..eviction.use import UnitId
from .extent import ExtentId
from .residency import State
from .state import ExtentRecord, Group, Shard


class ShardForest:
    """Made for one decision, of what the shards hold. Names are "extent@shard": one extent may be in several shards.

    What drains is not in it, nor what no document needs, or needs yet: an open ingest's.
    """

    def __init__(self, group: Group, extents: Mapping[ExtentId, ExtentRecord]) -> None:
        self._extents = extents
        self._owners: dict[UnitId, tuple[Shard, ExtentId]] = {}
        self.leaves: Sequence[UnitId] = [name for shard in group.shards.values() for name in self._last(shard)]

    def _last(self, shard: Shard) -> Iterator[UnitId]:
        last = next((extent for extent in reversed(shard.copies) if self._stays(shard, extent)), None)
        if last is not None:
            yield self._named(shard, last)

    def _stays(self, shard: Shard, extent: ExtentId) -> bool:
        return extent in self._extents and shard.copies[extent].state is not State.DRAINING

    def _named(self, shard: Shard, extent: ExtentId) -> UnitId:
        name = f"{extent}@{shard.id}"
        self._owners[name] = shard, extent
        return name

    def owner(self, name: UnitId) -> tuple[Shard, ExtentId]:
        """Whose copy it is, and of which extent."""
        return self._owners[name]

    def previous(self, unit_id: UnitId) -> UnitId | None:
        """The copy before it in the shard."""
        shard, extent = self._owners[unit_id]
        before = self._extents[extent].extent.previous
        while before is not None and before in shard.copies and before in self._extents:
            if self._stays(shard, before):
                return self._named(shard, before)
            before = self._extents[before].extent.previous
        return None

    def followers(self, unit_id: UnitId) -> int:
        """Of all but the last one there is one."""
        return 0 if unit_id in self.leaves else 1

    def __contains__(self, unit_id: UnitId) -> bool:
        return unit_id in self._owners
