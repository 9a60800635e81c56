"""Rows: where in the ranks' arenas a shard would go, tried on copies of the pools. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

from .demand import Demand
from .document import DocumentId
from .errors import DocumentTooLarge
from .extent import ExtentId
from .layout import Layout
from .residency import State
from .slots import RowPool
from .state import Group, Shard

Gone = Mapping[int, Collection[ExtentId]]  # extents by shard whose rows are counted as free already
NONE_GONE: Final[Gone] = MappingProxyType({})


def check_rows(group: Group, document: DocumentId, layout: Layout) -> None:
    """Raises DocumentTooLarge for a shard that an empty group could not take: evicting others would not help."""
    for rank, pool in group.pools.items():
        wanted = layout.length(rank // group.tp)
        if wanted > pool.rows:
            raise DocumentTooLarge(
                f"{document} needs {wanted} rows on rank {rank} of group {group.name!r}, whose arena has {pool.rows}; "
                "use more ranks or a larger arena"
            )


def place_rows(group: Group, demand: Demand, gone: Gone = NONE_GONE) -> list[tuple[int, int]] | None:
    """(first row, count) per rank for a new shard, or None when some rank has no room."""
    leaving = dict(gone)
    for shard in group.shards.values():
        if shard.id == demand.replaces:
            leaving[shard.id] = set(shard.copies)
    pools = _pools_after(group, leaving)
    rows = []
    for rank, count in enumerate(demand.rows):
        start = pools[rank].allocate(count)
        if start is None:
            return None
        rows.append((start, count))
    return rows


def grow_rows(group: Group, shard: Shard) -> list[tuple[int, int]] | None:
    """Rows for all of a shard's tokens without moving what it has, or None."""
    rows = []
    for rank, (start, count) in enumerate(shard.rows):
        wanted = shard.layout.length(rank // group.tp)
        if not group.pools[rank].copy().claim(start + count, wanted - count):
            return None
        rows.append((start, wanted))
    return rows


def draining(group: Group) -> dict[int, set[ExtentId]]:
    """What is on its way out of the group's HBM, by shard."""
    gone: dict[int, set[ExtentId]] = {}
    for shard in group.shards.values():
        for extent, copy in shard.copies.items():
            if copy.state is State.DRAINING:
                gone.setdefault(shard.id, set()).add(extent)
    return gone


def _pools_after(group: Group, gone: Gone) -> dict[int, RowPool]:
    pools = {rank: pool.copy() for rank, pool in group.pools.items()}
    for shard in group.shards.values():
        leaving = gone.get(shard.id)
        if not leaving:
            continue
        kept = [extent for extent in shard.copies if extent not in leaving]
        lengths = shard.lengths(shard.spans[kept[-1]][1] if kept else 0)
        for rank, (start, count) in enumerate(shard.rows):
            pools[rank].free(start + lengths[rank], count - lengths[rank])
    return pools
