"""Pinning: whether a pin could be kept, by its budgets and by the room beside what other hard pins keep. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .claims import Pin, PinKind
from .document import Document, DocumentId, WritePolicy
from .errors import InvalidRequest, PinsOvercommitted
from .extent import Extent
from .holders import Holder, largest
from .residency import Tier
from .slots import slots_of
from .state import Group, State


def check_pin(state: State, pin: Pin, document: Document, extents: Iterable[Extent], wall_ns: int) -> None:
    """Raises PinsOvercommitted, with the pins that would have to go, for what is over a budget or would not fit.

    `document` with these `extents` is what is pinned: perhaps a version that is not there yet.
    """
    state.pins.check(pin, wall_ns)
    if pin.kind is not PinKind.HARD:
        return
    others = [p for p in state.pins.all() if p.kind is PinKind.HARD and p.document != pin.document]
    if pin.counts_in(Tier.DDR):
        _check_ddr(state, pin, list(extents), [p for p in others if p.counts_in(Tier.DDR)], wall_ns)
    if pin.counts_in(Tier.HBM):
        _check_hbm(state, pin, document, [p for p in others if p.counts_in(Tier.HBM)], wall_ns)


def check_pins(state: State, pins: Sequence[Pin], wall_ns: int) -> None:
    """The same of many alike, of unnamed documents of one namespace, which are there: all, or none. Quick."""
    documents = {pin.document for pin in pins}
    first = pins[0]
    name = f"{first.document.namespace}/*"
    size_bytes = sum(pin.size_bytes for pin in pins)
    all_of_them = replace(first, document=DocumentId(first.document.tenant, name), size_bytes=size_bytes)
    state.pins.check(all_of_them, wall_ns, documents)
    if first.kind is PinKind.HARD and first.counts_in(Tier.DDR):
        extents = [state.extents[e].extent for pin in pins for e in state.documents[pin.document].document.extents]
        others = [p for p in state.pins.all() if p.kind is PinKind.HARD and p.document not in documents]
        _check_ddr(state, all_of_them, extents, [p for p in others if p.counts_in(Tier.DDR)], wall_ns)


def check_growth(state: State, document: Document, extents: Sequence[Extent], wall_ns: int) -> None:
    """Raises as `check_pin` if the document is pinned and, that large, could not be.

    Raises InvalidRequest where NVMe is to keep it, and would never have what it grows by.
    """
    pin = state.pins.get(document.id)
    if pin is not None:
        is_kept_below = pin.kind is PinKind.HARD and pin.floor is Tier.NVME
        if is_kept_below and document.write_policy is WritePolicy.MEMORY:
            raise InvalidRequest(f"{document.id} is pinned at nvme, and {WritePolicy.MEMORY} it would not get there")
        grown = replace(pin, size_bytes=sum(extent.slot_bytes for extent in extents))
        check_pin(state, grown, document, extents, wall_ns)


def _check_ddr(state: State, pin: Pin, extents: Sequence[Extent], others: Sequence[Pin], wall_ns: int) -> None:
    def fits(beside: Sequence[Pin]) -> bool:
        kept = {extent.id: extent for extent in extents}
        for other in beside:
            names = state.documents[other.document].document.extents
            kept |= {name: state.extents[name].extent for name in names}
        return state.ddr.could_hold(slots_of(kept.values()))

    if not fits(()):
        raise PinsOvercommitted(
            f"{pin.document} takes {pin.size_bytes} B and DDR holds {state.ddr.capacity_bytes} B: a hard pin would "
            "keep out everything else and never be met; pin it at nvme, or softly"
        )
    _make_fit(pin, Tier.DDR, others, fits, wall_ns)


def _check_hbm(state: State, pin: Pin, document: Document, others: Sequence[Pin], wall_ns: int) -> None:
    """Judged by the groups that run its model; where there is none yet, one may come that has room."""
    groups = [g for g in state.groups.values() if g.complete and state.can_read(g.fingerprint, document.fingerprint)]
    if not groups:
        return
    model = groups[0].fingerprint
    rivals = [p for p in others if state.can_read(model, state.documents[p.document].document.fingerprint)]

    def fits(beside: Sequence[Pin]) -> bool:
        counts = [document.token_count, *(state.documents[p.document].document.token_count for p in beside)]
        return any(_has_rows(group, counts) for group in groups)

    if not fits(()):
        raise PinsOvercommitted(
            f"{pin.document} has {document.token_count} tokens, more than the arenas of any group of its model; "
            "pin it at ddr or nvme, or softly"
        )
    _make_fit(pin, Tier.HBM, rivals, fits, wall_ns)


def _has_rows(group: Group, token_counts: Sequence[int]) -> bool:
    """Whether the smallest arena could take its share of all these, spread evenly."""
    return sum(-(-count // group.cp) for count in token_counts) <= min(pool.rows for pool in group.pools.values())


def _make_fit(pin: Pin, tier: Tier, others: Sequence[Pin], fits: Callable[[Sequence[Pin]], bool], wall_ns: int) -> None:
    """Raises PinsOvercommitted where the document does not fit beside the others, with the fewest that have to go."""
    kept = sorted(others, key=lambda other: (other.size_bytes, other.document))
    gone: list[Holder] = []
    while not fits(kept):
        gone.append(kept.pop().holder(wall_ns, tier))
    if gone:
        names = ", ".join(f"{holder.tenant}/{holder.document} ({holder.size_bytes} B)" for holder in gone)
        raise PinsOvercommitted(
            f"{pin.document} ({pin.size_bytes} B) does not fit into {tier.label} beside what hard pins keep there; "
            f"unpin {names}, or pin it at a lower tier, or softly",
            largest(gone),
        )
