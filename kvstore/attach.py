"""Attach: lease a document and bring its copies to DDR or to a group's HBM; detach gives them back.

An attach is granted when its room is taken and its moves have begun; its layers become usable one by one. The swap
record is its receipt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .claims import Lease, check_leases
from .document import Document, DocumentId
from .errors import ClaimNotFound, HoldfastError, InvalidRequest, LayoutError, SpecMismatch
from .extent import ExtentId, within
from .layout import RUNS_LIMIT, Layout, scheme
from .ledger import Seen, SwapRecord
from .loader import Loader
from .loading import Loading, Phase
from .orders import Urgency
from .residency import Placement, Tier
from .residency import State as Residency
from .spec import KVSpec
from .state import DocumentRecord, ShardKey, State
from .uses import Attached

Waiting = Callable[[int | HoldfastError], None]


@dataclass(eq=False, slots=True, kw_only=True)
class Attach:
    """A lease, its loading, and who waits for its layers. `answered`: its holder knows the lease, or its refusal.

    `owner` is the version of the document that is leased: it may have grown since. `used` is how its use was told.
    """

    owner: Document
    lease: Lease
    loading: Loading
    waiting: list[tuple[int, Waiting]] = field(default_factory=list)
    answered: bool = False
    used: Attached | None = None


def prefill_layout(state: State, name: str, spec: KVSpec, token_count: int, layout: Layout) -> Layout:
    """The layout for tokens that the group prefills. Raises SpecMismatch or LayoutError."""
    if spec.page_format:
        raise SpecMismatch(f"group {name!r} prefills canonical KV, not pages; ingest with the spec's `canonical()`")
    return checked_layout(state, name, spec.fingerprint(), token_count, layout)


def checked_layout(state: State, name: str, fingerprint: bytes, token_count: int, layout: Layout | None) -> Layout:
    """The layout for these tokens in that group, contiguous by default. Raises SpecMismatch or LayoutError.

    Native KV of the group's model will do: its ranks decode it.
    """
    group = state.group(name)
    if not state.can_read(group.fingerprint, fingerprint):
        raise SpecMismatch(f"group {name!r} runs another model than the one that made this document")
    made = layout if layout is not None else scheme("contiguous", token_count, group.cp, group.tp)
    if len(made.runs) > RUNS_LIMIT:
        raise LayoutError(f"a layout of {len(made.runs)} runs is too fine; at most {RUNS_LIMIT}, so use longer stripes")
    if (made.cp, made.tp, made.token_count) != (group.cp, group.tp, token_count):
        raise LayoutError(
            f"the layout covers {made.token_count} tokens over cp={made.cp} tp={made.tp}; "
            f"group {name!r} needs {token_count} over cp={group.cp} tp={group.tp}"
        )
    return made


class Attaches:
    """Begins and ends attaches. `lease_ns` is how long a lease runs before it is overdue.

    `limit_bytes` says what all leases of a tenant may keep in DDR; None: anything.
    """

    def __init__(self, loader: Loader, lease_ns: int, limit_bytes: Callable[[str], int | None]) -> None:
        self.loader = loader
        self.uses = loader.store.planner.uses
        self.store = loader.store
        self.state = loader.store.records
        self.lease_ns = lease_ns
        self.limit_bytes = limit_bytes
        self.open: dict[int, Attach] = {}
        self.used: Callable[[DocumentId, str | None], None] = lambda _, __: None  # hears of each grant, and where

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
        """Lease a document and bring it to DDR (`group` None) or into a group.

        Without a group it may be a range of its tokens [start, stop): the extents that hold any of them. `granted`
        hears, once, when moves begin or why they cannot. Raises DocumentNotFound, DocumentIncomplete, GroupNotFound,
        SpecMismatch, LayoutError, InvalidRequest, DocumentTooLarge, LeasesOvercommitted or NoCapacity at once, leaving
        nothing behind. Who names a canonical spec gets the same model's pages too, and decodes them.
        """
        owner = self.state.document(document).document
        if fingerprint is not None and not self.state.can_read(fingerprint, owner.fingerprint):
            raise SpecMismatch(f"{document} holds KV of another model, or of another revision of it")
        start, stop = tokens if tokens is not None else (0, owner.token_count)
        if not 0 <= start < stop <= owner.token_count or (group is not None and tokens is not None):
            raise InvalidRequest(
                f"tokens [{start}, {stop}) of {document}: a range lies within its {owner.token_count} tokens, "
                "and a group takes the whole document"
            )
        placed = None
        if group is not None:
            shard = self.state.group(group).shards.get(ShardKey(owner.id, owner.token_count))
            wanted = layout if shard is None else shard.layout
            placed = checked_layout(self.state, group, owner.fingerprint, owner.token_count, wanted)
        now_ns = self.store.clock.monotonic_ns()
        lease = Lease(
            id=self.store.new_id(),
            owner=client,
            document=document,
            granted_ns=now_ns,
            deadline_ns=now_ns + self.lease_ns,
            tier=Tier.DDR if group is None else Tier.HBM,
        )
        attach = self._attach(lease, owner, group, placed, granted, (start, stop))
        lease.size_bytes = self._leased_bytes(attach.loading)
        if group is None:
            self._refuse_overleased(lease)
        begun = self.loader.under_way(attach.loading) if group is not None else None
        if begun is not None:
            theirs, attach.loading = attach.loading, begun
            begun.pass_to(theirs)
            self.loader.reads.hasten(begun.records)
        elif group is not None or not self._is_here(attach.loading):
            self.loader.start(attach.loading, deadline_ns)
            attach.loading.swap.predicted_ns = self.loader.predicted_ns(attach.loading)
        attach.used = self.uses.attached(self.state.documents[document], attach.loading.records)
        self.open[lease.id] = attach
        self.state.leases[lease.id] = lease
        self.state.ledger.swaps.append(attach.loading.swap)
        return attach

    def attach_object(
        self, client: int, record: DocumentRecord, deadline_ns: int, granted: Callable[[Attach | HoldfastError], None]
    ) -> Attach:
        """Lease an opaque object and bring it to DDR; it is one of many, so its use is told by who asks for them.

        Raises as `attach` does.
        """
        owner, now_ns = record.document, self.store.clock.monotonic_ns()
        lease = Lease(
            id=self.store.new_id(),
            owner=client,
            document=owner.id,
            granted_ns=now_ns,
            deadline_ns=now_ns + self.lease_ns,
            size_bytes=self.state.extents[owner.extents[0]].extent.slot_bytes,
        )
        self._refuse_overleased(lease)
        attach = self._attach(lease, owner, None, None, granted, (0, owner.token_count))
        self.open[lease.id] = attach
        self.state.leases[lease.id] = lease
        try:
            if not self._is_here(attach.loading):
                self.loader.start(attach.loading, deadline_ns)
        except HoldfastError:
            self._forget(attach)
            raise
        return attach

    def wait(self, attach: Attach, layers: int, done: Waiting) -> None:
        """See `wait_layers`."""
        attach.waiting.append((layers, done))
        self._wake(attach)

    def _attach(
        self,
        lease: Lease,
        owner: Document,
        group: str | None,
        layout: Layout | None,
        granted: Callable[[Attach | HoldfastError], None],
        tokens: tuple[int, int],
    ) -> Attach:
        def answer(result: Attach | HoldfastError) -> None:
            if not attach.answered:
                attach.answered = True
                if isinstance(result, Attach):
                    self.used(owner.id, group)
                granted(result)

        def ended(error: HoldfastError | None) -> None:
            if error is not None and not attach.answered:
                self._forget(attach)  # nobody knows this lease, so nobody would end it
                answer(error)
            self._wake(attach)

        start, stop = tokens
        names: Sequence[ExtentId] = owner.extents
        if stop - start < owner.token_count:
            names = within(names, start, stop, self.state.specs[owner.fingerprint])
        extents = [self.state.extents[extent] for extent in names]
        loading = Loading(
            document=owner.id,
            records=extents,
            spans={r.extent.id: (r.extent.start, r.extent.stop) for r in extents} if group is not None else {},
            group=group,
            layout=layout,
            urgency=Urgency.ATTACH,
            swap=self._swap(lease, owner, group, tokens),
            started_ns=lease.granted_ns,
            granted=lambda: answer(attach),
            layer_ready=lambda _: self._wake(attach),
            ended=ended,
        )
        attach = Attach(owner=owner, lease=lease, loading=loading)
        return attach

    def _swap(self, lease: Lease, owner: Document, group: str | None, tokens: tuple[int, int]) -> SwapRecord:
        start, stop = tokens
        return SwapRecord(
            id=lease.id,
            document=str(owner.id),
            group=group,
            client=lease.owner,
            started_wall_ns=self.store.clock.wall_ns(),
            token_count=stop - start,
            recompute_ns=self._recompute_ns(owner, group, start, stop),
        )

    def _recompute_ns(self, owner: Document, group: str | None, start: int, stop: int) -> int:
        """By the group itself, where there is one."""
        ranks = self.state.groups[group].ranks if group is not None else None
        return self.store.planner.prefill_ns(owner.fingerprint, start, stop, ranks)

    def _is_here(self, loading: Loading) -> bool:
        """Whether all of it can be read in DDR: then it is held, and ready, and waits for nobody.

        Quick, because there may be thousands of extents.
        """
        copies: list[Placement] = []
        for record in loading.records:
            copy = record.ddr
            if copy is None or copy.state is not Residency.RESIDENT:
                return False
            copies.append(copy)
        size_bytes = 0
        for copy in copies:
            copy.holds += 1
            size_bytes += copy.size_bytes
        loading.held = copies
        loading.phase = Phase.READY
        spec = self.state.specs[loading.records[0].extent.fingerprint]
        loading.layers = max(len(group.layers) for group in spec.groups)
        loading.swap.source_bytes[Tier.DDR.label] = size_bytes
        loading.swap.reattach_ns = self.store.clock.monotonic_ns() - loading.started_ns
        loading.swap.outcome = "ready"
        loading.granted()
        return True

    def _leased_bytes(self, loading: Loading) -> int:
        """What the lease keeps where it is. Extents of one layer group have one size, and each has as many."""
        if loading.group is not None and loading.layout is not None:
            group = self.state.groups[loading.group]
            return loading.layout.token_count * group.tp * group.row_bytes
        kinds = len(self.state.specs[loading.records[0].extent.fingerprint].groups)
        each = len(loading.records) // kinds
        return each * sum(record.extent.slot_bytes for record in loading.records[::each])

    def _refuse_overleased(self, lease: Lease) -> None:
        limit_bytes = self.limit_bytes(lease.document.tenant)
        if limit_bytes is not None:
            now_ns = self.store.clock.monotonic_ns()
            check_leases(lease, self.state.leases.values(), limit_bytes, now_ns, self.state.client_name)

    def claim(self, client: int, lease_id: int) -> Attach:
        """The client's attach, whose lease is renewed by being named. Raises ClaimNotFound."""
        attach = self.open.get(lease_id)
        if attach is None or attach.lease.owner != client:
            raise ClaimNotFound(f"no lease {lease_id} of this client; it ended")
        attach.lease.deadline_ns = self.store.clock.monotonic_ns() + self.lease_ns
        return attach

    def wait_layers(self, client: int, lease_id: int, layers: int, done: Waiting) -> None:
        """`done` hears the count of ready leading layers as soon as it reaches `layers`, or why it never will."""
        self.wait(self.claim(client, lease_id), layers, done)

    def _wake(self, attach: Attach) -> None:
        waiting, attach.waiting = attach.waiting, []
        for layers, done in waiting:
            if attach.loading.error is not None:
                done(attach.loading.error)
            elif attach.loading.layers >= layers or attach.loading.phase is Phase.READY:
                done(attach.loading.layers)
            else:
                attach.waiting.append((layers, done))

    def report(self, client: int, lease_id: int, seen: Seen) -> SwapRecord:
        """What the engine saw of an attach, added to its swap record, which is returned."""
        attach = self.claim(client, lease_id)
        if attach.used is not None:
            self.uses.reported(attach.used, seen)
        swap = attach.loading.swap
        self.state.ledger.reported(swap, seen)
        return swap

    def renew(self, client: int, lease_id: int) -> None:
        """Push a lease's deadline out again, and nothing else: a heartbeat for holders that have nothing to say."""
        self.claim(client, lease_id)

    def end(self, attach: Attach) -> None:
        """End a lease; its copies stay where they are until eviction wants their room."""
        self._forget(attach)
        if attach.used is not None:
            self.uses.released(attach.used)
        self.loader.release(attach.loading)
        for _, done in attach.waiting:
            done(ClaimNotFound(f"lease {attach.lease.id} ended"))
        attach.waiting.clear()

    def _forget(self, attach: Attach) -> None:
        self.open.pop(attach.lease.id, None)
        self.state.leases.pop(attach.lease.id, None)
