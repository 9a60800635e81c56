"""Service: the commands of the daemon, synchronous and on one thread; the only door to the state.

Three promises. *Acknowledged*: a commit was answered, so the document is complete and visible. *Durable*: a document is
shown as durable, so its bytes were synced before its extents' rows were committed, and those before its own row; it
survives a kill, and a power loss as far as fsync goes. *Absent*: anything else leaves no trace after a restart, neither
row nor slot nor file, and so does what was deleted and answered. Nothing in between is served: a hole is named, and
bytes that do not match their seal are never handed out. (tests: crash_harness, test_crash, test_power_loss)

Edges call commands and deliver what workers report (`finished`, `advanced`); `tick` lets time pass. A command that has
to wait takes a callback. Nothing here does I/O: orders go to the effects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..eviction.policy import POLICIES, Policy
from .adoption import Adoption
from .attach import Attach, Attaches
from .awaiting import Awaiting, Waiter
from .claimed import Claimed
from .claims import Pin, PinKind, Pins, PinSelection, Refresh
from .clock import Clock
from .config import Config
from .document import Document, DocumentId, WritePolicy
from .drafting import Drafts
from .errors import ConfigError, GroupFailed, HoldfastError, InvalidSpec, PrefixNotFound, SpecMismatch
from .expiry import Expiry
from .extent import Extent
from .growth import close_retired
from .ingest import Ingests
from .ingesting import Ingest
from .keeping import Keeping
from .keys import NO_EXTRAS, Extras, Tokens
from .layout import Layout
from .ledger import Ledger, Seen, SwapRecord
from .loader import Loader
from .measurements import NOTHING, Measured, Measurements
from .objects import Objects
from .opaque import is_opaque
from .orders import Effects, Outcome
from .planner import Planner, Victim
from .prefetching import Prefetching
from .prefix import Prefix, attachable, longest
from .quotas import Quotas
from .registering import register, seat_rank
from .residency import Tier
from .reuse import Ghosts
from .room import Room
from .slots import SlabPool, Slot
from .spec import KVSpec
from .state import UNSAID, Backend, Left, State
from .store import Store
from .transients import Transients
from .upkeep import Upkeep
from .watermarks import Watermarks
from .writes import Writes

NS = 1_000_000_000


def policy_maker(config: Config) -> Callable[[], Policy]:
    """What makes the policy that is configured. Raises ConfigError."""
    found = POLICIES.get(config.eviction.policy)
    if found is None:
        raise ConfigError(f"eviction.policy {config.eviction.policy!r} is unknown; use one of {', '.join(POLICIES)}")
    return found


class Service:
    """All commands. `secret` gives a tenant's key secret; `effects` carries out orders."""

    def __init__(self, config: Config, clock: Clock, effects: Effects, secret: Callable[[str], bytes]) -> None:
        self.config = config
        self.clock = clock
        self._secret = secret
        ddr = SlabPool(config.ddr.capacity_bytes, config.ddr.slab_bytes)
        nvme = SlabPool(config.nvme.capacity_bytes, config.nvme.segment_bytes)
        pins, ledger = Pins.configured(config), Ledger(config.limits.swap_records)
        ghosts = Ghosts(config.eviction.ghost_entries)
        self.state = State(ddr, nvme, pins, ledger, ghosts, Quotas(config.tenants))
        self.planner = Planner(self.state, policy_maker(config)(), clock)
        self.store = Store(self.state, self.planner, effects, clock)
        self.writes = Writes(self.store, config.nvme.backlog_bytes, config.nvme.when_behind)
        self.room = Room(self.store, self.writes, config.limits.pending_reservations)
        self.loader = Loader(self.store, self.room, config.ddr.window_bytes)
        self.ingests = Ingests(self.store, self.room, self.loader)
        self.drafts = Drafts(self.ingests, config.limits, secret)
        self.awaiting = Awaiting(self.state, self.ingests.open, config.limits.pending_reservations)
        lease_ns = int(config.limits.lease_seconds * NS)
        self.attaches = Attaches(self.loader, lease_ns, lambda name: config.tenant(name).ddr_lease_bytes)
        self.prefetching = Prefetching(self.loader)
        self.attaches.used = self.prefetching.used
        self.room.judge = Claimed(self.state, clock, self.attaches.open, self.ingests.open)
        self.upkeep = Upkeep(self.loader, self.ingests)
        self.keeping = Keeping(self.upkeep)
        self.measurements = Measurements(self.store)
        self.adoption = Adoption(self.upkeep)
        self.expiry = Expiry(self.upkeep)
        self.transients = Transients(self.upkeep)
        self.watermarks = Watermarks(self.loader, config.ddr, config.nvme)
        self.objects = Objects(self.attaches, self.keeping, self.expiry, secret, config.limits.unnamed, self._pump)

    # Reports and time --------------------------------------------------------------------------

    def finished(self, order_id: int, outcome: Outcome) -> None:
        """An order ended."""
        self.store.finished(order_id, outcome)
        self._pump()

    def advanced(self, order_id: int, layers: int) -> None:
        """A read has brought its first `layers` layers."""
        self.store.advanced(order_id, layers)

    def tick(self) -> None:
        """Let time pass: deadlines of those who wait, ends of pins."""
        self.store.retry_drops()
        self.upkeep.retry_writes()
        self.room.expire(self.clock.monotonic_ns())
        self.ingests.spill.expire(self.clock.monotonic_ns())
        self.upkeep.expire()
        self.expiry.tick()
        self.transients.tick()
        self.keeping.expire()
        self.prefetching.expire()
        self.writes.tick()
        self.watermarks.tick()
        self._pump()

    def _pump(self) -> None:
        self.awaiting.pump(self.clock.monotonic_ns())
        close_retired(self.store)
        self.upkeep.settle()
        self.ingests.spill.pump()
        self.room.pump()
        self.objects.pump()
        self.prefetching.pump()
        self.upkeep.settle()
        self.transients.pump()
        self.store.notes.flush()

    def restore(
        self,
        specs: Iterable[KVSpec],
        extents: Iterable[tuple[Extent, Slot]],
        documents: Iterable[Document],
        pins: Iterable[Pin],
        measured: Measured = NOTHING,
        left: Left | None = None,
    ) -> None:
        """Take over what the catalog holds, and what `left` says is still in DDR. Before anything else."""
        self.measurements.restore(measured)
        self.upkeep.restore(specs, extents, documents)
        if left is not None:
            self.adoption.adopt(left)
        self.keeping.restore(pins)
        self.transients.restore()
        self.store.notes.flush()

    def write_back(self) -> None:
        """Queue everything that should outlive the daemon and is not on NVMe yet (a drain asks for it)."""
        self.writes.write_back()
        self.adoption.verified = self.writes.write_back  # what is still being verified
        self._pump()

    # Models and groups -------------------------------------------------------------------------

    def register_spec(self, spec: KVSpec) -> bytes:
        """Make a model known; returns its fingerprint. Raises DocumentTooLarge if an extent fits no slab."""
        if is_opaque(spec):
            raise InvalidSpec("opaque objects are stored by their keys; their specs are the daemon's own")
        return register(self.store, spec)

    def register_rank(
        self,
        client: int,
        name: str,
        rank: int,
        cp: int,
        tp: int,
        fingerprint: bytes,
        rows: int,
        backend: Backend = UNSAID,
    ) -> None:
        """See seats."""
        group = seat_rank(self.state, client, name, rank, cp, tp, self._spec(fingerprint), rows, backend)
        if group.complete:
            self.planner.open_group(group)

    def _spec(self, fingerprint: bytes) -> KVSpec:
        spec = self.state.specs.get(fingerprint)
        if spec is None or is_opaque(spec):
            raise SpecMismatch("this model is not registered; send its KVSpec first")
        return spec

    def introduce(self, client: int, pid: int) -> None:
        """A client is connected, whose process the daemon can see."""
        self.state.pids[client] = pid

    def holds(self, client: int) -> bool:
        """Whether a client has a seat, a lease or an ingest: bytes of ours that it may be reading or writing."""
        return (
            any(client in group.seats.values() for group in self.state.groups.values())
            or any(ingest.client == client for ingest in self.ingests.open.values())
            or any(attach.lease.owner == client for attach in self.attaches.open.values())
        )

    def disconnect(self, client: int) -> None:
        """The client is gone for good: its groups, leases and ingests end, and everything it held is free."""
        for group in [g for g in self.state.groups.values() if client in g.seats.values()]:
            rank = next(rank for rank, seat in group.seats.items() if seat == client)
            error = GroupFailed(f"group {group.name!r}: rank {rank} is gone")
            self.loader.fail_group(group.name, error)
            self.store.fail_group(group.name, error)
            self.ingests.fail_group(group.name, error)
        for ingest in [i for i in self.ingests.open.values() if i.client == client]:
            self.ingests.abort(ingest)
        for attach in [a for a in self.attaches.open.values() if a.lease.owner == client]:
            self.attaches.end(attach)
        self.objects.forget(client)
        self.awaiting.forget(client)
        self.prefetching.forget(client)
        self.state.pids.pop(client, None)
        self.state.ddr.lift(client)
        self._pump()

    # Ingest ------------------------------------------------------------------------------------

    def begin_ingest(
        self,
        client: int,
        document: DocumentId,
        fingerprint: bytes,
        tokens: Tokens,
        write_policy: WritePolicy,
        group: str | None,
        chunk_tokens: int,
        deadline_ns: int,
        granted: Callable[[Ingest | HoldfastError], None],
        keys: Sequence[bytes] = (),
        layout: Layout | None = None,
        ttl_seconds: float | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> Ingest:
        """Open an ingest. A group prefills in zigzag chunks of `chunk_tokens` behind what is cached, or as `layout`.

        It may continue a document of that name; without a name it is an unnamed prefix, which takes the place of those
        that it continues. `keys` are the tokens', where the caller has made them (`keying`).
        `granted` hears, once, when its room is taken, or why it cannot be. Raises at once for bad input.
        """
        ingest = self.drafts.draft(
            client,
            document,
            self._spec(fingerprint),
            tokens,
            write_policy,
            group,
            chunk_tokens,
            keys,
            layout,
            ttl_seconds,
            extras,
        )
        self.ingests.begin(ingest, deadline_ns, lambda error: granted(error if error is not None else ingest))
        self._pump()
        return ingest

    def commit_ingest(
        self,
        client: int,
        ingest_id: int,
        done: Callable[[Document | HoldfastError], None],
        seals: Sequence[bytes] = (),
        deadline_ns: int | None = None,
    ) -> None:
        """Publish an ingest; `done` hears the document when it is complete and visible. Seals: see Ingests.commit.

        The deadline bounds the wait for the disk (nvme.when_behind = wait): past it the ingest leaves no trace.
        """
        ingest = self.ingests.get(ingest_id, client)

        def committed(error: HoldfastError | None) -> None:
            if error is None:
                self.planner.uses.count(self.state.documents[ingest.document.id])
                self.transients.published(ingest)
                self.keeping.hit(ingest.document.id)
            done(error if error is not None else ingest.document)

        self.ingests.commit(ingest, committed, seals, deadline_ns)
        self._pump()

    def next_slots(
        self,
        client: int,
        ingest_id: int,
        filled: Sequence[tuple[int, int]],
        seals: Sequence[bytes],
        done: Callable[[tuple[Ingest, list[Extent]] | HoldfastError], None],
    ) -> None:
        """Hand over filled extents, each as (first token, layer group); see Ingests.next_slots."""
        ingest = self.ingests.get(ingest_id, client)
        self.ingests.next_slots(
            ingest,
            filled,
            seals,
            lambda result: done(result if isinstance(result, HoldfastError) else (ingest, result)),
        )
        self._pump()

    def abort_ingest(self, client: int, ingest_id: int) -> None:
        """Drop an open ingest without a trace."""
        self.ingests.abort(self.ingests.get(ingest_id, client))
        self._pump()

    # Attach ------------------------------------------------------------------------------------

    def attach(
        self,
        client: int,
        document: DocumentId,
        fingerprint: bytes | None,
        group: str | None,
        layout: Layout | None,
        deadline_ns: int,
        granted: Callable[[Attach | HoldfastError], None],
        tokens: tuple[int, int] | None = None,
    ) -> Attach:
        """See Attaches.attach and Expiry.refuse."""
        self.expiry.refuse(document)
        attach = self.attaches.attach(client, document, fingerprint, group, layout, deadline_ns, granted, tokens)
        self.keeping.hit(document)
        self.writes.came_back(self.state.documents[document], "attached again")
        self._pump()
        return attach

    def attach_prefix(
        self,
        client: int,
        tenant: str,
        fingerprint: bytes,
        keys: bytes,
        deadline_ns: int,
        granted: Callable[[Attach | HoldfastError], None],
    ) -> int:
        """Lease the longest prefix that is there, by its block keys, and bring it to DDR; returns its tokens.

        Raises PrefixNotFound, and what `attach` raises.
        """
        self._spec(fingerprint)
        found = attachable(self.state, tenant, fingerprint, keys, self.clock.wall_ns())
        if found.document is None:
            raise PrefixNotFound("nothing in the cache begins as these tokens do")
        tokens = 0, found.token_count
        self.attach(client, found.document, fingerprint, None, None, deadline_ns, granted, tokens)
        return found.token_count

    def when_published(self, waiter: Waiter) -> None:
        """See Awaiting. Raises NoCapacity, and what the attach raises when the document is there already."""
        if waiter.document in self.state.documents:
            waiter.attach()
        else:
            self.awaiting.park(waiter)
            self._pump()

    def wait_layers(self, client: int, lease_id: int, layers: int, done: Callable[[int | HoldfastError], None]) -> None:
        """See Attaches.wait_layers."""
        self.attaches.wait_layers(client, lease_id, layers, done)

    def report(self, client: int, lease_id: int, seen: Seen) -> SwapRecord:
        """See Attaches.report."""
        return self.attaches.report(client, lease_id, seen)

    def renew(self, client: int, lease_id: int) -> None:
        """Push a lease's deadline out again."""
        self.attaches.renew(client, lease_id)

    def detach(self, client: int, lease_id: int) -> None:
        """End a lease; its copies stay where they are until eviction wants their room."""
        self.attaches.end(self.attaches.claim(client, lease_id))
        self.prefetching.stir()
        self._pump()

    # Lookup ------------------------------------------------------------------------------------

    def keying(self, tenant: str, fingerprint: bytes) -> tuple[KVSpec, bytes]:
        """What a tenant's block keys are made with. Raises SpecMismatch."""
        return self._spec(fingerprint), self._secret(tenant)

    def lookup(self, tenant: str, fingerprint: bytes, keys: bytes) -> Prefix:
        """How much of a prefix the tenant has (see prefix); no use that eviction learns from.

        Raises SpecMismatch, or InvalidRequest for what is no sequence of keys.
        """
        self._spec(fingerprint)
        return longest(self.state, tenant, fingerprint, keys, self.clock.wall_ns())

    # Upkeep ------------------------------------------------------------------------------------

    def pin(
        self,
        document: DocumentId,
        floor: Tier,
        ttl_seconds: float | None,
        owner: str,
        reason: str,
        kind: PinKind = PinKind.HARD,
        refresh: Refresh = Refresh.NEVER,
        done: Callable[[HoldfastError | None], None] = lambda _: None,
    ) -> Pin:
        """See Keeping.pin."""
        pin = self.keeping.pin(document, floor, ttl_seconds, owner, reason, kind, refresh, done)
        self.writes.came_back(self.state.documents[document], "pinned")
        self._pump()
        return pin

    def unpin(self, document: DocumentId, done: Callable[[HoldfastError | None], None] = lambda _: None) -> Pin:
        """See Keeping.unpin."""
        pin = self.keeping.unpin(document, done)
        self._pump()
        return pin

    def unpin_all(
        self, wanted: PinSelection, done: Callable[[HoldfastError | None], None] = lambda _: None
    ) -> list[Pin]:
        """See Keeping.unpin_all."""
        pins = self.keeping.unpin_all(wanted, done)
        self._pump()
        return pins

    def evict(
        self,
        document: DocumentId | None,
        tier: Tier,
        size_bytes: int,
        deadline_ns: int,
        done: Callable[[HoldfastError | None], None],
    ) -> tuple[Victim, ...]:
        """See Upkeep.evict."""
        plan = self.upkeep.evict(document, tier, size_bytes, deadline_ns, done)
        self._pump()
        return plan

    def delete(self, document: DocumentId, done: Callable[[HoldfastError | None], None] = lambda _: None) -> None:
        """See Upkeep.delete."""
        self.upkeep.delete(document, done)
        self._pump()
