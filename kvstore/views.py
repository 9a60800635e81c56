"""Views: what people and clients are shown, as typed records built from the state. Looking changes nothing.

The socket sends them as msgpack, the admin API as JSON; field names end in their units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from .claim_views import PinView, pin_view
from .document import WritePolicy
from .extent import ExtentId
from .ledger import SwapRecord, Verdict
from .lines import Line, Standing
from .planner import Planner, Victim
from .prefix import Prefix
from .residency import Placement, Tier
from .state import DDR, NVME, DocumentRecord, ExtentRecord, State, hbm_device


class PrefixView(msgspec.Struct, frozen=True, kw_only=True):
    """How many leading tokens are complete in the cache, and how many of them have their nearest copy in which tier.

    `document` holds all of them; None where there are none.
    """

    token_count: int
    tier_tokens: dict[str, int]
    document: str | None = None


class DocumentView(msgspec.Struct, frozen=True, kw_only=True):
    """A document and where its KV is. `resident_bytes` counts by tier; `missing_tokens` are ranges to recompute.

    `write_policy` is "auto: " and what was decided where nobody named one; `write_reason` says why.
    """

    tenant: str
    name: str
    model: str
    fingerprint: str
    token_count: int
    extent_count: int
    size_bytes: int
    write_policy: str
    write_reason: str
    durable: bool
    complete: bool
    resident_bytes: dict[str, int]
    missing_tokens: list[tuple[int, int]]
    leases: int
    pin: PinView | None
    created_wall_ns: int
    last_access_seconds_ago: float | None
    use_count: int
    restore_seconds: float
    expires_wall_ns: int | None = None
    page_format: str = ""  # "": canonical


class StandingView(msgspec.Struct, frozen=True, kw_only=True):
    """Where a copy is in line to leave: `ahead` of `in_line` leaves that may leave now would leave before it."""

    tier: str
    ahead: int
    in_line: int
    rank: int
    is_leaf: bool
    is_movable: bool


class ExtentView(msgspec.Struct, frozen=True, kw_only=True):
    """One extent of a document, with the state of each copy.

    The policy's score parts, and its standing in line, are those of the nearest copy outside HBM.
    """

    start: int
    stop: int
    size_bytes: int
    copies: dict[str, str]
    scores: dict[str, float]
    standing: StandingView | None


class TierView(msgspec.Struct, frozen=True, kw_only=True):
    """A tier, or one group's HBM: bytes.

    Of DDR and NVMe: `fragmented_bytes` are free but of use to one class of slots only. Of NVMe: `withdrawn_bytes` of
    its configured capacity are not there, because the device is full; `written_bytes` since ever, by cause.
    """

    tier: str
    device: str
    capacity_bytes: int
    used_bytes: int
    leased_bytes: int
    pinned_bytes: int
    fragmented_bytes: int = 0
    withdrawn_bytes: int = 0
    written_bytes: dict[str, int] = {}
    write_amplification: float | None = None


class HopView(msgspec.Struct, frozen=True, kw_only=True):
    """One hop of a swap."""

    hop: str
    size_bytes: int
    moves: int
    elapsed_ns: int
    busy_ns: int


class SwapView(msgspec.Struct, frozen=True, kw_only=True):
    """The receipt of an attach. `queries` were answered with it."""

    id: int
    document: str
    group: str | None
    started_wall_ns: int
    token_count: int
    source_tier: str
    source_bytes: dict[str, int]
    moved_bytes: int
    hops: list[HopView]
    wait_ns: int
    reattach_ns: int | None
    predicted_ns: int
    recompute_ns: int
    exposed_ns: int | None
    prefill_ns: int | None
    decode_ns: int | None
    answer_tokens: int | None
    outcome: str
    strategy: str = ""
    strategy_reason: str = ""
    queries: int = 0


class VictimView(msgspec.Struct, frozen=True, kw_only=True):
    """A copy that leaves, or would."""

    extent: str
    documents: list[str]
    start: int
    stop: int
    tier: str
    action: str
    size_bytes: int
    restore_ns: int
    scores: dict[str, float]


class VerdictView(VictimView, frozen=True, kw_only=True):
    """A copy that left, when and why; `wanted_by` is the document that needed the room, where that is known."""

    wall_ns: int
    reason: str
    policy: str
    wanted_by: str = ""


def prefix_view(prefix: Prefix) -> PrefixView:
    """Show what a lookup found."""
    return PrefixView(
        token_count=prefix.token_count,
        tier_tokens={tier.label: tokens for tier, tokens in prefix.tiers.items()},
        document=prefix.document.name if prefix.document is not None else None,
    )


def document_view(state: State, planner: Planner, record: DocumentRecord) -> DocumentView:
    """Show a document."""
    document = record.document
    records = [state.extents[extent] for extent in document.extents]
    resident: dict[str, int] = {}
    for extent in records:
        for placement in extent.placements():
            if placement.readable:
                resident[placement.tier.label] = resident.get(placement.tier.label, 0) + placement.size_bytes
    for shard in state.shards():
        if shard.key == (document.id, document.token_count):
            size = sum(copy.size_bytes for copy in shard.copies.values() if copy.readable)
            resident[Tier.HBM.label] = resident.get(Tier.HBM.label, 0) + size
    missing = [(r.extent.start, r.extent.stop) for r in records if r.source() is None]
    now_ns = planner.clock.monotonic_ns()
    pin = state.pins.get(document.id)
    return DocumentView(
        tenant=document.id.tenant,
        name=document.id.name,
        model=state.specs[document.fingerprint].model,
        fingerprint=document.fingerprint.hex(),
        token_count=document.token_count,
        extent_count=len(records),
        size_bytes=sum(r.extent.slot_bytes for r in records),
        write_policy=_write_policy(record),
        write_reason=record.decision.reason if record.decision is not None else "as before the restart",
        durable=record.durable and all(r.nvme is not None and r.nvme.readable for r in records),
        complete=not missing,
        resident_bytes=resident,
        missing_tokens=joined(missing),
        leases=len(state.leased(document.id)),
        pin=pin_view(pin, planner.clock.wall_ns()) if pin is not None else None,
        created_wall_ns=document.created_wall_ns,
        last_access_seconds_ago=(now_ns - record.last_use_ns) / 1e9 if record.last_use_ns is not None else None,
        use_count=record.use_count,
        restore_seconds=sum(_restore_ns(planner, r) for r in records) / 1e9,
        expires_wall_ns=document.expires_wall_ns,
        page_format=state.specs[document.fingerprint].page_format,
    )


def _write_policy(record: DocumentRecord) -> str:
    named = record.document.write_policy
    if named is not WritePolicy.AUTO or record.decision is None:
        return named.value
    return f"{named.value}: {record.decision.policy.value}"


def _restore_ns(planner: Planner, record: ExtentRecord) -> int:
    """Time to have the extent in DDR again: nothing, a reload, or a recompute."""
    source = record.source()
    if source is None:
        return planner.recompute_ns(record)
    return planner.reload_ns(record, source.tier, Tier.DDR)


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Token ranges with neighbours joined."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(set(ranges)):
        if found and found[-1][1] >= start:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def extent_views(state: State, planner: Planner, record: DocumentRecord) -> list[ExtentView]:
    """Show a document's extents."""
    views = []
    lines: dict[Tier, Line] = {}
    for name in record.document.extents:
        extent = state.extents[name]
        copies = {p.tier.label: p.state.value for p in extent.placements()}
        for shard in state.shards():
            if shard.document == record.document.id and name in shard.copies:
                copies[hbm_device(shard.group)] = shard.copies[name].state.value
        standing = None
        nearest = next(iter(extent.placements()), None)
        if nearest is not None:
            if nearest.tier not in lines:
                lines[nearest.tier] = planner.line(nearest.tier)
            standing = planner.explain(extent, nearest, lines[nearest.tier])
        views.append(
            ExtentView(
                start=extent.extent.start,
                stop=extent.extent.stop,
                size_bytes=extent.extent.slot_bytes,
                copies=copies,
                scores=dict(standing.scores) if standing is not None else {},
                standing=standing_view(nearest, standing),
            )
        )
    return views


def standing_view(copy: Placement | None, standing: Standing | None) -> StandingView | None:
    """Show a standing."""
    if copy is None or standing is None:
        return None
    return StandingView(
        tier=copy.tier.label,
        ahead=standing.ahead,
        in_line=standing.in_line,
        rank=standing.rank,
        is_leaf=standing.is_leaf,
        is_movable=standing.is_movable,
    )


def tier_views(state: State) -> list[TierView]:
    """Show every device: HBM by group, DDR, NVMe."""
    leased: Counter[str] = Counter()
    for copy in state.held():
        leased[copy.device] += copy.size_bytes
    pinned: Counter[str] = Counter()
    for copy in pinned_copies(state):
        pinned[copy.device] += copy.size_bytes
    capacity = {hbm_device(group.name): group.capacity_bytes for group in state.groups.values()}
    pools = {DDR: state.ddr, NVME: state.nvme}
    capacity |= {device: pool.capacity_bytes for device, pool in pools.items()}
    wear = state.ledger.wear
    written = {"write-through": wear.write_through_bytes, "demotion": wear.demotion_bytes}
    views = []
    for device, size in capacity.items():
        tier = Tier.DDR if device == DDR else Tier.NVME if device == NVME else Tier.HBM
        views.append(
            TierView(
                tier=tier.label,
                device=device,
                capacity_bytes=size,
                used_bytes=state.ledger.occupancy(device),
                leased_bytes=leased[device],
                pinned_bytes=pinned[device],
                fragmented_bytes=pools[device].fragmented_bytes if device in pools else 0,
                withdrawn_bytes=pools[device].withdrawn_bytes if device in pools else 0,
                written_bytes=written if device == NVME else {},
                write_amplification=wear.amplification if device == NVME else None,
            )
        )
    return views


def pinned_copies(state: State) -> list[Placement]:
    """The copies that pins keep where they are: those at or above the lowest floor of their documents."""
    floors: dict[ExtentId, Tier] = {}
    for pin in state.pins.all():
        for extent in state.documents[pin.document].document.extents:
            floors[extent] = max(pin.floor, floors.get(extent, pin.floor))
    copies = [copy for extent in floors for copy in state.extents[extent].placements()]
    copies += [copy for shard in state.shards() for extent, copy in shard.copies.items() if extent in floors]
    return [copy for copy in copies if floors[copy.extent] >= copy.tier]


def swap_view(swap: SwapRecord) -> SwapView:
    """Show a swap record."""
    return SwapView(
        id=swap.id,
        document=swap.document,
        group=swap.group,
        started_wall_ns=swap.started_wall_ns,
        token_count=swap.token_count,
        source_tier=swap.source_tier,
        source_bytes=swap.source_bytes,
        moved_bytes=swap.moved_bytes,
        hops=[
            HopView(hop=str(hop), size_bytes=t.size_bytes, moves=t.moves, elapsed_ns=t.elapsed_ns, busy_ns=t.busy_ns)
            for hop, t in sorted(swap.hops.items(), reverse=True)
        ],
        wait_ns=swap.wait_ns,
        reattach_ns=swap.reattach_ns,
        predicted_ns=swap.predicted_ns,
        recompute_ns=swap.recompute_ns,
        exposed_ns=swap.exposed_ns,
        prefill_ns=swap.prefill_ns,
        decode_ns=swap.decode_ns,
        answer_tokens=swap.answer_tokens,
        outcome=swap.outcome,
        strategy=swap.strategy,
        strategy_reason=swap.strategy_reason,
        queries=swap.queries,
    )


def victim_views(victims: Sequence[Victim]) -> list[VictimView]:
    """Show a plan's victims."""
    return [
        VictimView(
            extent=v.extent,
            documents=list(v.documents),
            start=v.start,
            stop=v.stop,
            tier=v.tier.label,
            action=v.action,
            size_bytes=v.size_bytes,
            restore_ns=v.restore_ns,
            scores=v.scores,
        )
        for v in victims
    ]


def verdict_view(verdict: Verdict) -> VerdictView:
    """Show a verdict."""
    return VerdictView(
        extent=verdict.extent,
        documents=list(verdict.documents),
        start=verdict.start,
        stop=verdict.stop,
        tier=verdict.tier,
        action=verdict.action,
        size_bytes=verdict.size_bytes,
        restore_ns=verdict.restore_ns,
        scores=verdict.scores,
        wall_ns=verdict.wall_ns,
        reason=verdict.reason,
        policy=verdict.policy,
        wanted_by=verdict.wanted_by,
    )
