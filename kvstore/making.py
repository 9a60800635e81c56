"""Making place on NVMe for what waits to be written there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from .extent import Extent
from .owners import names
from .store import Store
from .writing import Item


def make_place(store: Store, first: Item, queues: Iterable[Mapping[Any, Item]], most_bytes: int) -> bool:
    """Let NVMe copies go, at once for what is next; False when not even the first can have a slot.

    Where quotas are, for what is next of its tenant: each makes place by its own.
    """
    wanted: list[Extent] = []
    size_bytes = 0
    for item in chain.from_iterable(queue.values() for queue in queues):
        if size_bytes >= most_bytes:
            break
        if not store.records.quotas or item.extent.tenant == first.extent.tenant:
            wanted.append(item.extent)
            size_bytes += item.size_bytes
    victims = store.planner.make_nvme_room(wanted)
    if victims is None:
        victims = store.planner.make_nvme_room([first.extent])
    if victims is None:
        return False
    for victim in victims:
        store.verdict(victim, "pressure", wanted_by=next(iter(names(first.record.documents)), ""))
        store.drop_nvme(store.records.extents[victim.extent])
    return True
