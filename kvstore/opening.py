"""Opening: give a loading's shard the rows that it lacks, and tell the ranks of its group where they are."""

from __future__ import annotations

from dataclasses import replace

from .demand import Demand
from .loading import Loading
from .orders import OpenShard
from .rows import grow_rows, place_rows
from .state import Shard
from .store import Store


def open_shard(store: Store, loading: Loading, demand: Demand) -> None:
    """Open, grow or replace the shard as was granted, and hold all of its copies for the loading."""
    assert loading.group is not None
    shard = store.records.group(loading.group).shards.get(loading.key)
    if shard is not None and demand.replaces == shard.id:
        store.close_shard(shard)
        shard = None
    if shard is None:
        shard = _new_shard(store, loading, demand)
    elif not shard.complete:
        rows = grow_rows(store.records.group(shard.group), shard)
        assert rows is not None
        store.open_shard(shard, rows)
    loading.shard = shard
    for extent, copy in shard.copies.items():
        loading.held.append(store.hold(copy))
        if copy.readable and extent in loading.sources:
            store.unhold(loading.sources.pop(extent))
    if shard.complete and shard.generation:
        loading.generation = shard.generation  # the ranks know it as it is; whoever reads it goes on
        return
    loading.generation = shard.generation = store.new_id()
    resident = [shard.spans[extent][1] for extent, copy in shard.copies.items() if copy.readable]
    spec = store.records.specs[loading.records[0].extent.fingerprint] if loading.records else None
    order = OpenShard(
        group=shard.group,
        shard=shard.id,
        generation=loading.generation,
        layout=shard.layout,
        rows=tuple(start for start, _ in shard.rows),
        resident_tokens=max(resident, default=0),
        native=spec if spec is not None and spec.page_format else None,
    )
    store.submit(order)


def _new_shard(store: Store, loading: Loading, demand: Demand) -> Shard:
    assert loading.layout is not None
    assert loading.group is not None
    rows = place_rows(store.records.group(loading.group), replace(demand, replaces=None))
    assert rows is not None, "granted without rows"
    shard = Shard(
        id=store.new_id(),
        group=loading.group,
        document=loading.document,
        layout=loading.layout,
        spans=loading.spans,
        rows=[(0, 0)] * loading.layout.ranks,
    )
    store.open_shard(shard, rows)
    return shard
