"""Reads: what comes from NVMe into DDR slots, and who waits for it. Loadings of one document share a read.

A copy that an earlier daemon left in DDR is waited for in the same way, until it has been verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .errors import HoldfastError
from .extent import ExtentId
from .geometry import Geometry, extent_geometry
from .ledger import Hop, HopTime
from .loading import Loading, unreadable
from .orders import Hasten, Outcome, ReadIn, Urgency
from .placing import place
from .residency import Placement, Tier
from .state import ExtentRecord
from .store import Store


class Reads:
    """Starts reads and tells `arrived(loading, record, layers)` and `failed` of those who wait in `waiting`.

    `unverified` says of which extents the DDR copy is there and waits for its check, and how to have that done at once.
    """

    def __init__(
        self,
        store: Store,
        arrived: Callable[[Loading, ExtentRecord, int], None],
        failed: Callable[[Loading, HoldfastError], None],
    ) -> None:
        self.store = store
        self.waiting: dict[ExtentId, list[Loading]] = {}
        self.unverified: dict[ExtentId, Callable[[], None]] = {}
        self._arrived = arrived
        self._failed = failed
        self._unhurried: dict[ExtentId, int] = {}  # reads that nobody waited for when they were ordered

    def geometry(self, record: ExtentRecord) -> Geometry:
        """Canonical geometry of an extent."""
        return extent_geometry(self.store.records.specs[record.extent.fingerprint], record.extent.group)

    def depth(self, record: ExtentRecord) -> int:
        """Layers of an extent."""
        return len(self.store.records.specs[record.extent.fingerprint].groups[record.extent.group].layers)

    def join(self, loading: Loading, record: ExtentRecord) -> None:
        """Wait for the read that fills the DDR copy, or for its check."""
        verify_now = self.unverified.get(record.extent.id)
        loading.came_from(Tier.NVME if verify_now is None else Tier.DDR, record)
        self.waiting.setdefault(record.extent.id, []).append(loading)
        if loading.urgency is Urgency.ATTACH:
            if verify_now is not None:
                verify_now()
            self.hasten([record])

    def hasten(self, records: Iterable[ExtentRecord]) -> None:
        """Somebody waits for these by now, if they are being read."""
        if not self._unhurried:
            return
        found = [self._unhurried.pop(record.extent.id, None) for record in records]
        reads = frozenset(number for number in found if number is not None)
        if reads:
            self.store.submit(Hasten(reads=reads))

    def start(self, record: ExtentRecord, source: Placement, urgency: Urgency) -> None:
        """Read an NVMe copy into a DDR slot, which there has to be."""
        target = self.store.take(record.extent, Tier.DDR)
        assert target is not None, "granted without a slot"
        place(self.store.records, record, Tier.DDR, target)
        self.into(record, source, target, urgency)

    def into(self, record: ExtentRecord, source: Placement, target: Placement, urgency: Urgency) -> None:
        """Read an NVMe copy into the record's DDR slot."""
        assert target.slot is not None
        assert source.slot is not None
        target.holds += 1
        source.holds += 1
        started_ns = self.store.clock.monotonic_ns()
        order = ReadIn(
            id=self.store.new_id(),
            extent=record.extent.id,
            source=source.slot,
            target=target.slot,
            geometry=self.geometry(record),
            urgency=urgency,
        )
        if urgency is not Urgency.ATTACH:
            self._unhurried[order.extent] = order.id
        self.store.submit(order, lambda outcome: self._done(record, source, target, outcome, started_ns))
        self.store.watch(order.id, lambda layers: self._has_layers(record, target, layers))

    def _has_layers(self, record: ExtentRecord, target: Placement, layers: int) -> None:
        if layers == self.geometry(record).layers:
            return  # `_done` follows, and passes the last ones on
        target.layers_ready = layers
        for loading in list(self.waiting.get(record.extent.id, ())):
            self._arrived(loading, record, layers)

    def _done(
        self, record: ExtentRecord, source: Placement, target: Placement, outcome: Outcome, started_ns: int
    ) -> None:
        waiting = self.waiting.pop(record.extent.id, [])
        self._unhurried.pop(record.extent.id, None)
        if outcome.error is not None:
            self.store.distrust(record, source, outcome.error)
            self.store.unhold(source)
            self.lose(record, target, waiting, outcome.error)
            return
        self.store.trust(record)
        self.store.unhold(source)
        hop = Hop(Tier.NVME, Tier.DDR)
        now_ns = self.store.clock.monotonic_ns()
        self.store.records.ledger.moved(hop, target.size_bytes, outcome.busy_ns, started_ns, now_ns)
        for loading in waiting:
            loading.swap.hops.setdefault(hop, HopTime()).add(target.size_bytes, outcome.busy_ns, started_ns, now_ns)
        self.land(record, target, outcome.checksums, waiting)

    def land(self, record: ExtentRecord, target: Placement, seal: bytes, waiting: Sequence[Loading]) -> None:
        """A DDR copy is complete: those who waited go on with it, and the hold for their sake ends."""
        target.layers_ready = self.geometry(record).layers
        self.store.filled(record, target, seal)
        for loading in waiting:
            held = loading.sources[record.extent.id]
            if held is not target:
                loading.sources[record.extent.id] = self.store.hold(target)
                self.store.unhold(held)
            self._arrived(loading, record, target.layers_ready)
        self.store.unhold(target)

    def lose(self, record: ExtentRecord, target: Placement, waiting: Sequence[Loading], error: HoldfastError) -> None:
        """A DDR copy will not come: those who waited fail, and the hold for their sake ends."""
        for loading in waiting:
            self._failed(loading, unreadable(loading, record, error))
        target.holds -= 1
        self.store.fail(target)
