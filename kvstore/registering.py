"""Registering: models are made known, and clients become the ranks of groups."""

from __future__ import annotations

from typing import Final

from .document import checked_name
from .errors import DocumentTooLarge, InUse, InvalidRequest, NoCapacity, SpecMismatch
from .geometry import arena_geometry, extent_geometry
from .layout import heads_of
from .orders import PutSpec, Write
from .slots import RowPool, SlotClass
from .spec import KVSpec
from .state import Backend, Group, State
from .store import Store

MODELS_LIMIT: Final = 4096  # of any tenant and adapter; far more than a machine serves


def check_spec(state: State, spec: KVSpec) -> None:
    """Raises NoCapacity where there are too many models, DocumentTooLarge if an extent of this one fits no slab."""
    if len(state.specs) >= MODELS_LIMIT:
        raise NoCapacity(f"{MODELS_LIMIT} models are registered; a spec whose fields change from call to call?")
    for extent_bytes in (extent_geometry(spec, group).size_bytes for group in range(len(spec.groups))):
        for pool, what in ((state.ddr, "ddr.slab_bytes"), (state.nvme, "nvme.segment_bytes")):
            if pool.slab_count and not pool.per_slab(SlotClass("", extent_bytes)):
                raise DocumentTooLarge(
                    f"an extent of {spec.model} takes {extent_bytes} B, more than {what} = {pool.slab_bytes} B"
                )


def register(store: Store, spec: KVSpec) -> bytes:
    """Make a model known; returns its fingerprint. Raises as `check_spec`."""
    fingerprint = spec.fingerprint()
    if fingerprint not in store.records.specs:
        check_spec(store.records, spec)
        store.records.specs[fingerprint] = spec
        store.submit(Write(id=store.new_id(), records=(PutSpec(spec),)))
    return fingerprint


def seat_rank(
    state: State, client: int, name: str, rank: int, cp: int, tp: int, spec: KVSpec, rows: int, backend: Backend
) -> Group:
    """Seat a client as one rank of a group, with an arena of `rows` token rows; returns the group.

    Raises InvalidRequest, LayoutError (heads that `tp` cannot share), SpecMismatch or InUse.
    """
    if cp < 1 or tp < 1 or not 0 <= rank < cp * tp or rows < 1:
        raise InvalidRequest(f"rank {rank} of cp={cp} tp={tp} with {rows} rows is no seat")
    if spec.page_format:
        raise InvalidRequest("the ranks of a group keep canonical rows; register it with the spec's `canonical()`")
    if len(spec.groups) != 1:
        raise InvalidRequest("managed HBM holds models with one layer group; this one has several")
    checked_name(name, "group")
    heads_of(0, tp, spec.groups[0].kv_heads)
    fingerprint = spec.fingerprint()
    group = state.groups.get(name)
    if group is None:
        geometry = arena_geometry(spec, 1, tp)
        group = Group(name=name, fingerprint=fingerprint, cp=cp, tp=tp, row_bytes=geometry.size_bytes)
        state.groups[name] = group
    if (group.cp, group.tp, group.fingerprint) != (cp, tp, fingerprint):
        raise SpecMismatch(f"group {name!r} has cp={group.cp} tp={group.tp} and perhaps another model")
    if rank in group.seats:
        raise InUse(f"rank {rank} of group {name!r} is taken")
    group.seats[rank] = client
    group.pools[rank] = RowPool(rows)
    group.backends[rank] = backend
    return group
