"""Inheritance: what a daemon takes over, in memory, from the one before it.

Slabs that hold extents of documents that still exist, and slabs that a living client of the last daemon may still look
at: those are kept, and the latter fenced. Everything else that was found is removed, so memory is never doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .arena import Arena
from .catalog import Catalog
from .document import Document
from .processes import boot, still_running
from .state import Left
from .warm import WarmIndex


class Holder(NamedTuple):
    """A process that an earlier daemon gave slabs to, as one of its clients, and that is still there."""

    client: int
    pid: int
    process: int  # a pidfd


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The index, what is taken over, and whose end will lift the fences."""

    index: WarmIndex
    left: Left
    holders: tuple[Holder, ...]


def inherit(
    arena: Arena, catalog: Catalog, documents: Iterable[Document], slab_count: int, crashed: Callable[[Exception], None]
) -> Inheritance:
    """Open the warm index of this arena and catalog, and keep the slabs that are worth it. Raises StorageFailed."""
    index = WarmIndex(arena.directory, _belongs_to(catalog, arena.slab_bytes), arena.found, crashed)
    left = index.left
    needed = {extent for document in (*documents, *left.documents) for extent in document.extents}
    extents = [entry for entry in left.extents if entry[1].slab < slab_count and entry[0].id in needed]
    holders: dict[int, Holder] = {}
    fences: dict[int, set[int]] = {}
    for fence, slab in index.fences:
        if fence.client not in holders:
            process = still_running(fence.pid, fence.started)
            if process is None:
                continue
            holders[fence.client] = Holder(fence.client, fence.pid, process)
        if slab < slab_count:
            fences.setdefault(fence.client, set()).add(slab)
    slabs = {slot.slab for _, slot in extents}.union(*fences.values())
    arena.keep(slabs)
    return Inheritance(
        index,
        Left(specs=left.specs, extents=extents, documents=left.documents, slabs=slabs, fences=fences),
        tuple(holders.values()),
    )


def _belongs_to(catalog: Catalog, slab_bytes: int) -> str | None:
    """What has to be the same for the bytes in memory to mean the same: this boot, this catalog, this slab size."""
    here = boot()
    if here is None:
        return None
    return f"{here} {catalog.identity()} {slab_bytes}"
