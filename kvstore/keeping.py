"""Keeping: pins as commands. What operators want near is brought there, and told to the catalog so that it outlives us.

A pin holds at once, and is answered when the catalog has it. Where the catalog refuses, the answer is its error: the
pin holds all the same, and the catalog is told again at every tick; only a restart before that loses it. Ending a pin
is answered in the same way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from .claims import NS, TOLD_PART, Pin, PinKind, PinSelection, Refresh
from .document import NAME_LIMIT, Document, DocumentId, WritePolicy
from .errors import HoldfastError, InvalidRequest
from .opaque import is_opaque
from .orders import DropPin, PutPin
from .pinning import check_pin, check_pins
from .planner import Victim
from .prefetching import unasked
from .residency import State, Tier
from .room import Cleared
from .state import DocumentRecord
from .upkeep import Upkeep

PREFETCH_DEADLINE_NS: Final = 300 * NS  # nobody waits for it, but no wait is without end
TTL_SECONDS_MAX: Final = 10**9

Told = Callable[[HoldfastError | None], None]


class Keeping:
    """Begins, refreshes and ends pins."""

    def __init__(self, upkeep: Upkeep) -> None:
        self.upkeep = upkeep
        self.loader = upkeep.loader
        self.store = upkeep.store
        self.state = upkeep.state
        upkeep.ingests.grew = self._grew
        self._told_wall_ns: dict[DocumentId, int] = {}  # the ends of refreshing pins, as the catalog has them
        self._far: deque[DocumentId] = deque()  # pinned, and not brought near yet

    def expire(self) -> None:
        """End the pins whose time is up."""
        for document in self._told_wall_ns.keys() - self.state.pins.documents:
            del self._told_wall_ns[document]  # deleted, and its soft pin with it
        expired = self.state.pins.expired(self.store.clock.wall_ns())
        if expired:
            self.unpin_all(PinSelection(documents={pin.document for pin in expired}))

    def pin(
        self,
        document: DocumentId,
        floor: Tier,
        ttl_seconds: float | None,
        owner: str,
        reason: str,
        kind: PinKind = PinKind.HARD,
        refresh: Refresh = Refresh.NEVER,
        done: Told = lambda _: None,
    ) -> Pin:
        """Keep a document at or above a tier, and bring it there. `done` hears when the catalog has it.

        Raises PinsOvercommitted with the pins that would have to go, or InvalidRequest, changing nothing.
        """
        record = self.state.document(document)
        made = self._maker(floor, ttl_seconds, owner, reason, kind, refresh)
        pin = made(record)
        self._check(pin, record.document)
        self._put([pin], done)
        self._follow([pin])
        return pin

    def pin_objects(
        self,
        documents: Sequence[DocumentId],
        floor: Tier,
        ttl_seconds: float | None,
        owner: str,
        reason: str,
        kind: PinKind,
        refresh: Refresh,
        done: Told,
    ) -> list[Pin]:
        """The same of unnamed documents of one namespace: all of them, or none. Raises as `pin` does."""
        if floor is Tier.HBM:
            raise InvalidRequest("objects never come to hbm: pin them at ddr or nvme")
        made = self._maker(floor, ttl_seconds, owner, reason, kind, refresh)
        pins = [made(self.state.document(document)) for document in documents]
        if not pins:
            done(None)
            return []
        check_pins(self.state, pins, self.store.clock.wall_ns())
        self._put(pins, done)
        self._follow(pins)
        return pins

    def _maker(
        self, floor: Tier, ttl_seconds: float | None, owner: str, reason: str, kind: PinKind, refresh: Refresh
    ) -> Callable[[DocumentRecord], Pin]:
        """What makes such pins of documents. It and this raise InvalidRequest."""
        now_ns = self.store.clock.wall_ns()
        if ttl_seconds is not None and not 0 < ttl_seconds < TTL_SECONDS_MAX:
            raise InvalidRequest(f"ttl_seconds must be positive, not {ttl_seconds}")
        if refresh is not Refresh.NEVER and ttl_seconds is None:
            raise InvalidRequest("a pin without an end has none to refresh: give it ttl_seconds")
        if max(len(owner), len(reason)) > NAME_LIMIT:
            raise InvalidRequest(f"a pin's owner and reason have at most {NAME_LIMIT} characters")
        ttl_ns = None if ttl_seconds is None else max(1, int(ttl_seconds * NS))

        def made(record: DocumentRecord) -> Pin:
            document = record.document
            if kind is PinKind.HARD and floor is Tier.NVME and document.write_policy is WritePolicy.MEMORY:
                raise InvalidRequest(
                    f"{document.id} is {WritePolicy.MEMORY}, so NVMe never has it: pin it at ddr, or softly"
                )
            return Pin(
                document=document.id,
                floor=floor,
                size_bytes=sum(self.state.extents[extent].extent.slot_bytes for extent in document.extents),
                owner=owner,
                reason=reason,
                created_wall_ns=now_ns,
                expires_wall_ns=None if ttl_ns is None else now_ns + ttl_ns,
                kind=kind,
                ttl_ns=ttl_ns,
                refresh=refresh,
            )

        return made

    def _follow(self, pins: Sequence[Pin]) -> None:
        """What these begin: what they name stays, is written down, and is brought near."""
        for pin in pins:
            record = self.state.documents[pin.document]
            if pin.kind is PinKind.HARD:
                if pin.floor is not Tier.NVME:
                    self._keep(record.document)
                self._make_durable(record)
        self._far.extend(pin.document for pin in pins)
        self.bring_more()
        self.upkeep.give_up_pinned()

    def _check(self, pin: Pin, document: Document) -> None:
        extents = [self.state.extents[extent].extent for extent in document.extents]
        check_pin(self.state, pin, document, extents, self.store.clock.wall_ns())

    def _put(self, pins: Sequence[Pin], done: Told = lambda _: None) -> None:
        for pin in pins:
            self.state.pins.put(pin)
            if pin.refresh is not Refresh.NEVER and pin.expires_wall_ns is not None:
                self._told_wall_ns[pin.document] = pin.expires_wall_ns
            else:
                self._told_wall_ns.pop(pin.document, None)
        self.upkeep.tell_all({pin.document: PutPin(pin) for pin in pins}, done=done)

    def _make_durable(self, owner: DocumentRecord) -> None:
        """As its hard pin, it is to survive a restart."""
        if owner.document.write_policy is not WritePolicy.MEMORY and not owner.writes_through:
            self.upkeep.room.writes.keep(owner, "pinned")

    def hit(self, document: DocumentId) -> None:
        """The document is used: its pin's life starts again, if that was asked for.

        The catalog hears of it when its word is an eighth of the pin's life late, so a restart may cost a pin that
        much; recency never waits for a commit.
        """
        pin = self.state.pins.get(document)
        if pin is None or pin.refresh is Refresh.NEVER:
            return
        pin = pin.refreshed(self.store.clock.wall_ns())
        assert pin.ttl_ns is not None
        assert pin.expires_wall_ns is not None
        if pin.expires_wall_ns - self._told_wall_ns[document] >= pin.ttl_ns // TOLD_PART:
            self._put([pin])
        else:
            self.state.pins.put(pin)

    def _grew(self, document: Document) -> None:
        """A pin holds the longer version too."""
        pin = self.state.pins.get(document.id)
        if pin is not None:
            size_bytes = sum(self.state.extents[extent].extent.slot_bytes for extent in document.extents)
            self._put([replace(pin, size_bytes=size_bytes)])
            if pin.kind is PinKind.HARD:
                self._make_durable(self.state.documents[document.id])

    def unpin(self, document: DocumentId, done: Told = lambda _: None) -> Pin:
        """Let it sink again; `done` hears when the catalog has forgotten the pin. Raises ClaimNotFound."""
        pin = self.state.pins.remove(document)
        self._drop([pin], done)
        return pin

    def unpin_all(self, wanted: PinSelection, done: Told = lambda _: None) -> list[Pin]:
        """End all of these pins, in one commit, which `done` hears of. `State.pins.select` is the dry run."""
        pins = self.state.pins.select(wanted)
        for pin in pins:
            self.state.pins.remove(pin.document)
        if pins:
            self._drop(pins, done)
        else:
            done(None)
        return pins

    def _drop(self, pins: Sequence[Pin], done: Told) -> None:
        drops: Mapping[DocumentId, DropPin] = {pin.document: DropPin(*pin.document) for pin in pins}
        for document in drops:
            self._told_wall_ns.pop(document, None)
        self.upkeep.tell_all(drops, done=done)

    def restore(self, pins: Iterable[Pin]) -> None:
        """Restart: take over the pins of documents that are there, and bring those documents near.

        Their lives have gone on by the wall clock meanwhile: what is over is not brought near first.
        """
        now_ns = self.store.clock.wall_ns()
        alike: dict[tuple[object, ...], list[Pin]] = {}
        for pin in pins:
            if pin.expires_wall_ns is not None and pin.expires_wall_ns <= now_ns:
                self.upkeep.tell(pin.document, DropPin(*pin.document))
            elif pin.document not in self.state.documents:  # it was never durable
                self._not_restored(pin)
            else:
                spec = self.state.specs[self.state.documents[pin.document].document.fingerprint]
                one = pin.document.family if is_opaque(spec) else pin.document
                alike.setdefault((one, pin.kind, pin.floor), []).append(pin)
        restored = [pin for some in alike.values() for pin in self._restored(some)]
        restored.sort(key=lambda pin: pin.kind is PinKind.HARD)  # soft ones do not wait behind others
        self._far.extend(pin.document for pin in restored)
        self.bring_more()

    def _restored(self, pins: list[Pin]) -> list[Pin]:
        """Those of these that fit still. Objects may have thousands, so those that are alike are asked together."""
        try:
            if len(pins) == 1:
                self._check(pins[0], self.state.document(pins[0].document).document)
            else:
                check_pins(self.state, pins, self.store.clock.wall_ns())
        except HoldfastError:  # the budget shrank
            if len(pins) == 1:
                self._not_restored(pins[0])
                return []
            half = len(pins) // 2
            return [*self._restored(pins[:half]), *self._restored(pins[half:])]
        for pin in pins:
            self.state.pins.put(pin)
            if pin.refresh is not Refresh.NEVER and pin.expires_wall_ns is not None:
                self._told_wall_ns[pin.document] = pin.expires_wall_ns
        return pins

    def _not_restored(self, pin: Pin) -> None:
        self.state.ledger.counts["pins_not_restored"] += 1
        self.upkeep.tell(pin.document, DropPin(*pin.document))

    def bring_more(self) -> None:
        """Bring what is pinned near, as many at once as leave others a place in the line for room."""
        room = self.loader.room
        while self._far and room.waiting < max(1, room.limit // 2):
            pin = self.state.pins.get(self._far.popleft())
            if pin is not None:
                self._bring(pin)

    def _keep(self, document: Document) -> None:
        """What is on its way out of DDR stays."""
        for extent in document.extents:
            copy = self.state.extents[extent].ddr
            if copy is not None and copy.state is State.DRAINING:
                self.store.unhold(self.store.hold(copy))

    def _bring(self, pin: Pin) -> None:
        """Bring a document to DDR, if it is pinned there or above; best effort, because nobody waits for it.

        For a soft pin only what no pin names leaves, and only if nobody waits for room: what waits holds its copies.
        """
        if pin.floor is Tier.NVME:
            return
        document = self.state.documents[pin.document].document
        copies = [self.state.extents[extent].ddr for extent in document.extents]
        if all(copy is not None and copy.state is State.RESIDENT for copy in copies):
            return
        loading = unasked(self.store, document, None, None, lambda _: None)
        try:
            if pin.kind is PinKind.HARD:
                self.loader.start(loading, self.store.clock.monotonic_ns() + PREFETCH_DEADLINE_NS)
            elif self.loader.room.waiting or (
                self.loader.start_now(loading, self._approves, PREFETCH_DEADLINE_NS / NS) is not Cleared.NOW
            ):
                self.state.ledger.counts["prefetches_refused"] += 1
        except HoldfastError:
            self.state.ledger.counts["prefetches_refused"] += 1

    def _approves(self, victims: Sequence[Victim]) -> bool:
        wall_ns = self.store.clock.wall_ns()
        owners = ((self.state.extents[victim.extent].documents, victim.tier) for victim in victims)
        return not any(self.state.pins.quarters(documents, tier, wall_ns) for documents, tier in owners)
