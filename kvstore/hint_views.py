"""Views of hints: what was announced, what has become of it, and the order of what waits. Looking changes nothing."""

from __future__ import annotations

import msgspec

from .clock import Clock
from .hints import OPEN, Hint, Hints
from .upcoming import in_order


class HintView(msgspec.Struct, frozen=True, kw_only=True):
    """A hint. `target` is a device; `position` is 0 for what is brought near next, null for what does not wait.

    `predicted_ns` is the load of what is still missing at the target, `belief` how likely its owner's word is taken to
    be, `remaining_seconds` until it expires. `displaced_bytes` left for it.
    """

    id: int
    tenant: str
    document: str
    target: str
    queries: int
    owner: str
    state: str
    reason: str
    position: int | None
    predicted_ns: int
    belief: float
    waited_seconds: float
    remaining_seconds: float
    overtaken: int
    moved_bytes: int
    displaced_bytes: int


class HintsView(msgspec.Struct, frozen=True, kw_only=True):
    """Hints that have not ended, those that wait in their order, and the last that ended, the newest first.

    `queries_waiting` are those that are announced; `counts` are totals since the daemon's start.
    """

    hints: list[HintView]
    ended: list[HintView]
    queries_waiting: int
    counts: dict[str, int]


def hint_view(hints: Hints, hint: Hint, clock: Clock, position: int | None = None) -> HintView:
    """Show a hint."""
    now_ns = clock.monotonic_ns()
    return HintView(
        id=hint.id,
        tenant=hint.document.tenant,
        document=hint.document.name,
        target=hint.device,
        queries=hint.queries,
        owner=hint.owner,
        state=hint.state.value,
        reason=hint.reason,
        position=position,
        predicted_ns=hint.load_ns,
        belief=hints.belief(hint),
        waited_seconds=(now_ns - hint.came_ns) / 1e9,
        remaining_seconds=(hint.expires_ns - now_ns) / 1e9,
        overtaken=hint.overtaken,
        moved_bytes=hint.moved_bytes,
        displaced_bytes=sum(hint.displaced.values()),
    )


def hints_view(hints: Hints, counts: dict[str, int], clock: Clock, limit: int) -> HintsView:
    """Show all that are live, and at most `limit` of those that have ended. `counts` are the ledger's."""
    order = [one.id for one in in_order(hints.upcoming(), clock.monotonic_ns())]
    places = {number: place for place, number in enumerate(order)}
    live = sorted(hints.live.values(), key=lambda hint: (hint.state in OPEN, places.get(hint.id, len(order)), hint.id))
    ended = list(hints.ended)[::-1][:limit]
    return HintsView(
        hints=[hint_view(hints, hint, clock, places.get(hint.id)) for hint in live],
        ended=[hint_view(hints, hint, clock) for hint in ended],
        queries_waiting=sum(hint.queries for hint in live),
        counts={name: counts.get(name, 0) for name in HINT_COUNTS},
    )


HINT_COUNTS = (
    "hints",
    "hints_promoted",
    "hints_used",
    "hints_in_time",
    "hints_expired",
    "hints_evicted",
    "hints_cancelled",
    "hints_refused",
    "prefetched_bytes",
    "prefetched_unused",
)
