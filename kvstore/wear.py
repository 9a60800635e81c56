"""Wear: counts what the NVMe device took."""

from __future__ import annotations

from .extent import Extent
from .orders import Urgency
from .state import State


def count_wear(state: State, extent: Extent, urgency: Urgency) -> None:
    """An extent was written: count its bytes, and how much of it is KV that the device never had before."""
    record = state.extents.get(extent.id)
    spec = state.specs[extent.fingerprint]
    token_bytes = spec.groups[extent.group].elements_per_token() * spec.element_bytes
    is_new = record is None or not record.stored
    is_demotion = urgency in (Urgency.DEMOTE, Urgency.RELIEF)
    wear = state.ledger.wear
    state.ledger.wear = wear._replace(
        write_through_bytes=wear.write_through_bytes + (0 if is_demotion else extent.slot_bytes),
        demotion_bytes=wear.demotion_bytes + (extent.slot_bytes if is_demotion else 0),
        kv_bytes=wear.kv_bytes + (extent.valid_tokens * token_bytes if is_new else 0),
    )
    if record is not None:
        record.stored = True
