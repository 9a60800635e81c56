"""Loading: one document's extents on their way to DDR, or on into the rows of a group's shard. See loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from .arrivals import Arrivals
from .document import DocumentId
from .errors import CorruptExtent, DocumentIncomplete, HoldfastError, StorageFailed
from .extent import ExtentId
from .layout import Layout
from .ledger import Hop, SwapRecord
from .orders import Urgency
from .residency import Placement, Tier
from .room import Reservation
from .state import ExtentRecord, Shard, ShardKey

RECOMPUTE: Final = "ingest the document again to recompute them; what lies behind is kept"


class Phase(StrEnum):
    """Where a loading is."""

    WAITING = "waiting"
    MOVING = "moving"
    READY = "ready"
    FAILED = "failed"


@dataclass(eq=False, slots=True, kw_only=True)
class Loading:
    """One document's extents on their way to DDR (`group` None) or to a shard.

    A document that is larger than a window passes through DDR a few extents at a time, its last ones first: `queued`
    have not begun, `inside` are on their way, `passed` have arrived in the shard and give up their slots in DDR to
    those that follow. So what is left of it in DDR is its front.

    `spans` are all extents that the shard makes rows for; `records` those of them that are loaded. `granted` is
    called when all room is taken and moves begin, `layer_ready` when another leading layer has arrived everywhere,
    `ended` once, with the error if any. The copies in `held` stay held until `Loader.release`.
    """

    document: DocumentId
    records: Sequence[ExtentRecord]
    spans: dict[ExtentId, tuple[int, int]]
    group: str | None
    layout: Layout | None
    urgency: Urgency
    swap: SwapRecord
    started_ns: int
    granted: Callable[[], None]
    layer_ready: Callable[[int], None]
    ended: Callable[[HoldfastError | None], None]
    phase: Phase = Phase.WAITING
    shard: Shard | None = None
    generation: int = 0
    reservation: Reservation | None = None
    sources: dict[ExtentId, Placement] = field(default_factory=dict)
    held: list[Placement] = field(default_factory=list)
    arrivals: Arrivals = field(default_factory=lambda: Arrivals({}))  # of layers at the target
    layers: int = 0  # leading layers reported
    queued: list[ExtentRecord] = field(default_factory=list)
    inside: set[ExtentId] = field(default_factory=set)
    passed: deque[ExtentRecord] = field(default_factory=deque)
    gives_way: bool = False  # its copies in DDR may leave before its first move, so it needs room for them too
    patience_ns: int = 0  # how long it may wait for room, each time that it has to
    in_flight: int = 0
    released: bool = False
    kept: bool = False  # failed, but its holder may still be using what is in DDR, or the shard's rows
    error: HoldfastError | None = None

    @property
    def key(self) -> ShardKey:
        """The version of the document that goes to a group."""
        assert self.layout is not None, "a group has a layout"
        return ShardKey(self.document, self.layout.token_count)

    def may_pass_to(self, wanted: Loading) -> bool:
        """Whether it brings the same to the same group, has begun, and nobody waits for it."""
        is_free = self.released and self.phase is Phase.MOVING and self.group is not None
        return is_free and self.group == wanted.group and self.key == wanted.key

    def pass_to(self, wanted: Loading) -> None:
        """Somebody waits for it now: it goes on as theirs, and tells them from here on."""
        wanted.swap.source_bytes, wanted.swap.hops = self.swap.source_bytes, self.swap.hops
        self.swap, self.started_ns, self.urgency = wanted.swap, wanted.started_ns, wanted.urgency
        self.granted, self.layer_ready, self.ended = wanted.granted, wanted.layer_ready, wanted.ended
        self.released = False
        self.granted()

    def missing_bytes(self, shard: Shard | None) -> tuple[dict[Hop, int], int]:
        """What has to move over which hops, beside what its shard has; and the size of one move."""
        read_bytes = load_bytes = move_bytes = 0
        for record in self.records:
            source = record.source()
            if source is None or (shard is not None and record.extent.id in shard.copies):
                continue
            move_bytes = record.extent.slot_bytes
            if source.tier is Tier.NVME:
                read_bytes += move_bytes
            if self.group is not None:
                load_bytes += move_bytes
        return {Hop(Tier.NVME, Tier.DDR): read_bytes, Hop(Tier.DDR, Tier.HBM): load_bytes}, move_bytes

    def came_from(self, tier: Tier, record: ExtentRecord) -> None:
        """Write the extent's bytes on the receipt, by the tier that gives them."""
        source = self.swap.source_bytes
        source[tier.label] = source.get(tier.label, 0) + record.extent.slot_bytes


def incomplete(loading: Loading, *records: ExtentRecord) -> DocumentIncomplete:
    """Some of its KV is gone: the error that names the tokens."""
    return DocumentIncomplete(f"{loading.document}: {_tokens(records)} are gone; {RECOMPUTE}")


def unreadable(loading: Loading, record: ExtentRecord, error: HoldfastError) -> HoldfastError:
    """A read has failed: the same error, with the tokens that it would have brought."""
    if not isinstance(error, CorruptExtent | StorageFailed):
        return error  # the daemon shuts down
    return type(error)(f"{loading.document}: {_tokens([record])} cannot be read ({error.message}); {RECOMPUTE}")


def _tokens(records: Iterable[ExtentRecord]) -> str:
    """Ranges in order, neighbours together."""
    merged: list[list[int]] = []
    for start, stop in sorted({(record.extent.start, record.extent.stop) for record in records}):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([start, stop])
    return ", ".join(f"tokens [{start}, {stop})" for start, stop in merged)
