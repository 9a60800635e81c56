"""Prefetching: bring documents near before their queries run, one at a time, behind everybody who waits already.

A hint takes free room, and what eviction grants where that is worth less than the load it saves (`Hints.weighs_more`):
nothing that is leased, pinned (softly too), shielded by another hint, or the last copy. Where a group has no room for
its document, that is brought to DDR meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Final

from .attach import checked_layout
from .document import NAME_LIMIT, Document, DocumentId
from .errors import DocumentTooLarge, HoldfastError, InvalidRequest
from .hints import OPEN, WASTED, Hint, HintState
from .layout import Layout
from .ledger import SwapRecord
from .loader import Loader
from .loading import Loading, Phase
from .orders import Urgency
from .planner import Victim
from .residency import State, Tier
from .room import Cleared
from .state import DDR, ShardKey, hbm_device
from .store import Store
from .upcoming import Upcoming, next_up, passed_over

NS: Final = 1_000_000_000
HINT_SECONDS: Final = 600.0  # how long a hint without a deadline is believed
LONGEST_SECONDS: Final = 3600.0
MOVE_SECONDS: Final = 300.0  # how long a load waits for room inside a window; nobody waits for it, but none is endless
STIR_NS: Final = NS  # how soon those that found no room look again
NOBODY: Final = 0  # the client number of the daemon itself, and of people


def unasked(
    store: Store,
    document: Document,
    group: str | None,
    layout: Layout | None,
    ended: Callable[[HoldfastError | None], None],
) -> Loading:
    """All of a document on its way to DDR, or to a group, though nobody waits for it: it holds nothing at its end."""
    records = [store.records.extents[extent] for extent in document.extents]
    return Loading(
        document=document.id,
        records=records,
        spans={r.extent.id: (r.extent.start, r.extent.stop) for r in records} if group is not None else {},
        group=group,
        layout=layout,
        urgency=Urgency.PREFETCH,
        swap=SwapRecord(
            id=store.new_id(),
            document=str(document.id),
            group=group,
            client=NOBODY,
            started_wall_ns=store.clock.wall_ns(),
            token_count=document.token_count,
        ),
        started_ns=store.clock.monotonic_ns(),
        granted=lambda: None,
        layer_ready=lambda _: None,
        ended=ended,
        released=True,
    )


class Prefetching:
    """Carries hints out; hears of uses, evictions, time and clients that leave."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.store = loader.store
        self.state = loader.store.records
        self.hints = self.state.hints
        self._moving: tuple[Hint, Loading] | None = None
        self._stirred_ns = 0
        self._is_stirred = False  # those that found no room may look again, when all others have
        self._left = 0  # evictions that were noticed

    # Hints -------------------------------------------------------------------------------------

    def hint(
        self, client: int, document: DocumentId, group: str | None, queries: int, seconds: float | None, owner: str
    ) -> Hint:
        """So many queries on a document are coming, in at most so many seconds where that is known.

        The same owner's hint on the same target is brought up to date. Raises DocumentNotFound, GroupNotFound,
        SpecMismatch, InvalidRequest, or NoCapacity when there are too many.
        """
        known = self.state.document(document).document
        if group is not None:
            checked_layout(self.state, group, known.fingerprint, known.token_count, None)
        if queries < 1 or not 0 < (seconds or HINT_SECONDS) <= LONGEST_SECONDS or len(owner) > NAME_LIMIT:
            raise InvalidRequest(
                f"a hint is of at least one query, within {LONGEST_SECONDS:g} s, and its owner's name has at most "
                f"{NAME_LIMIT} characters"
            )
        now_ns = self.store.clock.monotonic_ns()
        hint = self.hints.find((client, owner), document, group)
        if hint is None:
            hint = Hint(
                id=self.store.new_id(),
                client=client,
                owner=owner,
                document=document,
                group=group,
                device=DDR if group is None else hbm_device(group),
                queries=queries,
                size_bytes=sum(self.state.extents[extent].extent.slot_bytes for extent in known.extents),
                came_ns=now_ns,
                deadline_ns=None,
                expires_ns=now_ns,
                load_ns=0,
            )
            try:
                self.hints.add(hint)
            except HoldfastError:
                self.state.ledger.counts["hints_refused"] += 1
                raise
            self.state.ledger.counts["hints"] += 1
        hint.queries = queries
        hint.deadline_ns = None if seconds is None else now_ns + int(seconds * NS)
        hint.expires_ns = hint.deadline_ns or now_ns + int(HINT_SECONDS * NS)
        hint.load_ns = self._load_ns(hint)
        hint.able = True
        self.pump()
        return hint

    def cancel(self, client: int, document: DocumentId, group: str | None, owner: str) -> None:
        """The queries are not coming after all; nothing happens where there is no such hint any more."""
        hint = self.hints.find((client, owner), document, group)
        if hint is not None:
            self._end(hint, HintState.CANCELLED, "its owner took it back")
            self.pump()

    def forget(self, client: int) -> None:
        """The client is gone, and its queries with it."""
        for hint in [hint for hint in self.hints.live.values() if hint.client == client]:
            self._end(hint, HintState.CANCELLED, "its client is gone")

    def used(self, document: DocumentId, group: str | None) -> None:
        """An attach of the document: what was announced is here."""
        for hint in self.hints.of((document,), group):
            if hint.state is HintState.PROMOTED:
                self.state.ledger.counts["hints_in_time"] += 1
            self._end(hint, HintState.USED, "" if hint.state is HintState.PROMOTED else f"while it was {hint.state}")

    def expire(self) -> None:
        """Let time pass, and notice what has gone meanwhile."""
        now_ns = self.store.clock.monotonic_ns()
        for hint in list(self.hints.live.values()):
            if hint.document not in self.state.documents:
                self._end(hint, HintState.CANCELLED, "its document was deleted")
            elif hint.group is not None and hint.group not in self.state.groups:
                self._end(hint, HintState.CANCELLED, f"group {hint.group!r} is gone")
            elif hint.expires_ns <= now_ns:
                self._end(hint, HintState.EXPIRED, "nobody came in time")
        if now_ns - self._stirred_ns >= STIR_NS:
            self.stir()

    def stir(self) -> None:
        """Something may have changed: those that found no room are tried again, after those not tried since then."""
        self._stirred_ns = self.store.clock.monotonic_ns()
        self._is_stirred = True

    def _end(self, hint: Hint, state: HintState, reason: str) -> None:
        """A load that is under way goes on, for the cache's sake or for whoever took it over."""
        if hint.state is HintState.MOVING and self._moving is not None and self._moving[0] is hint:
            hint.moved_bytes += self._moving[1].swap.moved_bytes
        counts = self.state.ledger.counts
        counts[f"hints_{state.value}"] += 1
        if hint.moved_bytes and state in (*WASTED, HintState.CANCELLED):
            counts["prefetched_unused"] += 1
        self.hints.end(hint, state, reason)
        self.stir()

    # Promotion ---------------------------------------------------------------------------------

    def pump(self) -> None:
        """Bring the next document near, if nobody waits for room and nothing is being brought already.

        Of those that find no room one is tried each time, because looking takes a millisecond per thousand extents.
        """
        self._notice_evictions()
        if not self._is_stirred and not any(hint.able and hint.state in OPEN for hint in self.hints.live.values()):
            return
        cleared = Cleared.NOW
        while cleared is Cleared.NOW and not self._is_busy and not self.loader.room.waiting:
            waiting = self.hints.upcoming()
            chosen = self._next(waiting) if waiting else None
            if chosen is None:
                return
            hint = self.hints.live[chosen.id]
            cleared = self._try(hint)
            if cleared is Cleared.NOW:
                self._overtake(waiting, chosen)
            elif cleared is Cleared.REFUSED:
                hint.able = False

    @property
    def _is_busy(self) -> bool:
        """Whether a load is under way that nobody has taken over."""
        if self._moving is None:
            return False
        loading = self._moving[1]
        return loading.released and loading.phase is Phase.MOVING

    def _next(self, waiting: Sequence[Upcoming]) -> Upcoming | None:
        """Whose turn it is; those that found no room are looked at again when all others were, and if it may help."""
        now_ns = self.store.clock.monotonic_ns()
        chosen = next_up(waiting, now_ns)
        if chosen is None and self._is_stirred:
            self._is_stirred = False
            for one in waiting:
                self.hints.live[one.id].able = True
            chosen = next_up([replace(one, able=True) for one in waiting], now_ns)
        return chosen

    def _overtake(self, waiting: Sequence[Upcoming], chosen: Upcoming) -> None:
        for number in passed_over(waiting, chosen):
            if number in self.hints.live:
                self.hints.live[number].overtaken += 1

    def _try(self, hint: Hint) -> Cleared:
        """Bring it to where it is wanted, or to DDR meanwhile. One that never can be brought ends."""
        cleared = self._start(hint, hint.group)
        if cleared is Cleared.REFUSED and hint.group is not None and hint.state is HintState.WAITING:
            cleared = self._start(hint, None)
        return cleared

    def _start(self, hint: Hint, group: str | None) -> Cleared:
        known = self.state.documents.get(hint.document)
        if known is None:
            self._end(hint, HintState.CANCELLED, "its document was deleted")
            return Cleared.NOW
        before, hint.state = hint.state, HintState.MOVING
        before_ns = hint.load_ns
        try:
            loading = self._loading(hint, known.document, group)
            hint.load_ns = self.loader.predicted_ns(loading)
            self._moving = (hint, loading)
            cleared = self.loader.start_now(
                loading, partial(self._approves, hint, DDR if group is None else hbm_device(group)), MOVE_SECONDS
            )
        except HoldfastError as error:
            self._moving = None
            if isinstance(error, DocumentTooLarge) and group != hint.group:
                hint.state, hint.load_ns = before, before_ns
                return Cleared.REFUSED
            self._end(hint, HintState.REFUSED, error.message)
            return Cleared.NOW
        if cleared is not Cleared.NOW:
            hint.state, hint.load_ns, self._moving = before, before_ns, None
        return cleared

    def _loading(self, hint: Hint, document: Document, group: str | None) -> Loading:
        layout = None
        if group is not None:
            shard = self.state.group(group).shards.get(ShardKey(document.id, document.token_count))
            wanted = shard.layout if shard is not None else None
            layout = checked_layout(self.state, group, document.fingerprint, document.token_count, wanted)
        loading = unasked(self.store, document, group, layout, lambda error: self._arrived(hint, loading, error))
        return loading

    def _load_ns(self, hint: Hint) -> int:
        """Predicted time of what is missing at the target now."""
        document = self.state.document(hint.document).document
        return self.loader.predicted_ns(self._loading(hint, document, hint.group))

    def _approves(self, hint: Hint, target: str, victims: Sequence[Victim]) -> bool:
        """Whether these may leave for a hint."""
        leaving = {DDR: 0, target: 0}
        for victim in victims:
            device = target if victim.tier is Tier.HBM else DDR
            leaving[device] += victim.size_bytes
            documents, now_ns = self.state.extents[victim.extent].documents, self.store.clock.wall_ns()
            is_expected = self.state.is_expected(documents, victim.tier, device)
            is_pinned = self.state.pins.quarters(documents, victim.tier, now_ns) > 0
            if is_expected or is_pinned or victim.action == "drop":
                return False
        for device, size_bytes in leaving.items():
            tier = Tier.DDR if device == DDR else Tier.HBM
            if size_bytes and not self.state.is_expected(frozenset((hint.document,)), tier, device):
                return False  # beyond the share of hints
        if not self.hints.weighs_more(hint, [victim.restore_ns for victim in victims]):
            return False
        hint.displaced.update(leaving)
        return True

    def _arrived(self, hint: Hint, loading: Loading, error: HoldfastError | None) -> None:
        counts = self.state.ledger.counts
        counts["prefetched_bytes"] += loading.swap.moved_bytes
        counts["reattaches"] += loading.swap.moved_bytes > 0
        self.stir()
        if hint.state is not HintState.MOVING:
            return  # it has ended meanwhile
        hint.moved_bytes += loading.swap.moved_bytes
        if error is not None:
            self._end(hint, HintState.REFUSED, error.message)
            return
        try:
            hint.load_ns = self._load_ns(hint)
        except HoldfastError as gone:  # its document or its group, meanwhile
            self._end(hint, HintState.CANCELLED, gone.message)
            return
        is_there = loading.group == hint.group
        hint.state = HintState.PROMOTED if is_there else HintState.STAGED
        hint.able = is_there  # the group has just said that it has no room
        counts["hints_promoted"] += is_there
        self.hints.changed()

    # What leaves -------------------------------------------------------------------------------

    def _notice_evictions(self) -> None:
        """Look at the hints whose documents newest verdicts name; at all where the log does not go back so far."""
        ledger = self.state.ledger
        left = sum(ledger.counts[f"evictions_{tier.label}"] for tier in Tier)
        if left == self._left:
            return
        since, self._left = left - self._left, left
        newest = islice(reversed(ledger.verdicts), since)
        named = {document for verdict in newest for document in verdict.documents}
        is_known = since <= len(ledger.verdicts)
        for hint in list(self.hints.live.values()):
            is_concerned = not is_known or str(hint.document) in named
            is_brought = hint.state in (HintState.PROMOTED, HintState.STAGED)
            if is_concerned and is_brought and not self._is_near(hint):
                self._end(hint, HintState.EVICTED, "its room was needed before its queries came")

    def _is_near(self, hint: Hint) -> bool:
        record = self.state.documents.get(hint.document)
        if record is None:
            return True  # deleted, which is noticed elsewhere
        document = record.document
        if hint.state is HintState.PROMOTED and hint.group is not None:
            group = self.state.groups.get(hint.group)
            shard = group.shards.get(ShardKey(document.id, document.token_count)) if group is not None else None
            return shard is not None and shard.complete
        copies = [self.state.extents[extent].ddr for extent in document.extents]
        return all(copy is not None and copy.state is not State.DRAINING for copy in copies)
