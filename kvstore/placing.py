"""Placing: which copies a record has in DDR and on NVMe. Eviction's forests and rankings hear of every change here."""

from __future__ import annotations

from .residency import Event, Placement, Tier
from .state import DDR, NVME, ExtentRecord, State


def place(state: State, record: ExtentRecord, tier: Tier, copy: Placement | None) -> None:
    """Make it the record's copy in DDR or on NVMe, or let the record have none there."""
    before = record.ddr if tier is Tier.DDR else record.nvme
    if tier is Tier.DDR:
        record.ddr = copy
    else:
        record.nvme = copy
    ranking = state.rankings[DDR if tier is Tier.DDR else NVME]
    if before is None and copy is not None:
        ranking.came(copy.extent, copy.size_bytes)
    elif before is not None and copy is None:
        ranking.left(before.extent)
    state.forests.follow(record.extent, record.ddr, record.nvme)
    state.changes.note(record.extent.id)
    if record.ddr is None and record.nvme is None:
        for document in record.documents:
            if document.namespace is not None:
                state.faded.setdefault(document, None)


def drain(state: State, record: ExtentRecord) -> None:
    """The DDR copy is to leave when it has been written out."""
    assert record.ddr is not None
    record.ddr.apply(Event.DRAIN)
    state.draining[record.extent.id] = record.ddr
    state.forests.follow(record.extent, record.ddr, record.nvme)


def stay(state: State, placement: Placement) -> None:
    """What drains is to stay after all."""
    placement.apply(Event.HIT)
    record = state.extents.get(placement.extent)
    if record is not None:
        state.forests.follow(record.extent, record.ddr, record.nvme)
