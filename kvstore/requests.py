"""Requests: what each message of the wire asks of the service, and the reply it gets.

Knows messages and commands, no sockets. Commands that wait become awaitables here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import is_
from typing import TypeVar

from msgspec.structs import replace

from .attach import Attach
from .awaiting import Waiter
from .claim_messages import PinDocument
from .claim_requests import ClaimRequest, handle_claim, word
from .document import Document, DocumentId
from .errors import ClaimNotFound, DeadlineExceeded, HoldfastError, InvalidRequest, MalformedFrame
from .explain_view import explain_view
from .explain_wire import ExplainDocument, Explained
from .extent import Extent
from .freeing import emptied
from .hint_views import hint_view
from .hint_wire import CancelPrefetch, Hinted, PrefetchDocument
from .ingesting import Ingest
from .keying import keys_of, sent_tokens
from .layouts import LayoutMessage, ShardMessage
from .ledger import Seen
from .loading import Loading
from .model_clearing import Scope, Selection, cleared
from .model_messages import Cleared, ClearModel
from .object_messages import ObjectRequest
from .object_requests import CACHE_OBJECTS, NEW_OBJECTS, ObjectRequests
from .planner import Victim
from .prefills import Prefill
from .prefix_wire import AttachPrefix, Found, Keys, KeysOf, Lookup, LookupTokens
from .residency import Placement
from .runs import RunMessage, in_runs
from .service import NS, Service
from .state import ExtentRecord
from .views import DocumentView, document_view, prefix_view, swap_view, tier_views, victim_views
from .wire import (
    AbortIngest,
    AttachDocument,
    Attached,
    BeginIngest,
    CommitIngest,
    DeleteDocument,
    Detach,
    Documents,
    Done,
    FindRing,
    FreeDocument,
    FreedPlan,
    IngestOpened,
    KeepRing,
    LayersReady,
    ListDocuments,
    ListTiers,
    NextSlots,
    ObservePrefill,
    Receipt,
    RegisterSpec,
    Renew,
    Reply,
    Report,
    Request,
    RingFound,
    ShowDocument,
    SlotsGiven,
    SpecRegistered,
    Tiers,
    WaitLayers,
)

T = TypeVar("T")
Answered = Callable[[T | HoldfastError], None]
ALL_LAYERS = 1 << 31
LATELY_MAX = 256  # documents whose runs are remembered
LONGEST_SECONDS = 3600.0  # no wait is without end
NEW_WORK = (
    RegisterSpec,
    BeginIngest,
    AttachDocument,
    AttachPrefix,
    PinDocument,
    PrefetchDocument,
    FreeDocument,
    *NEW_OBJECTS,
)
CACHE_WORK = (BeginIngest, AttachDocument, AttachPrefix, Lookup, LookupTokens, *CACHE_OBJECTS)


class Requests:
    """Handles requests of clients that said hello."""

    def __init__(self, service: Service, serial: Callable[[int], int]) -> None:
        """`serial(slab)` names the slab's present memory, so that a client knows when to map it anew."""
        self._service = service
        self._serial = serial
        self._objects = ObjectRequests(service, serial, self._call, self._deadline_ns)
        self._lately: dict[DocumentId, tuple[list[Placement | None], list[RunMessage]]] = {}  # oldest attach first

    def is_new_work(self, body: Request) -> bool:
        """Whether a draining daemon refuses it."""
        return isinstance(body, NEW_WORK)

    def _refuse_bypassed(self, body: Request) -> None:
        """A bypass refuses all that finds, reads or stores KV, except what groups do: documents are their work."""
        bypass = self._service.state.bypass
        if bypass is None or not isinstance(body, CACHE_WORK):
            return
        if not isinstance(body, BeginIngest | AttachDocument) or body.group is None:
            self._service.state.ledger.counts["bypassed"] += 1
            raise bypass.refusal()

    async def handle(self, client: int, tenant: str, body: Request) -> Reply:
        """The reply. Raises HoldfastError."""
        self._refuse_bypassed(body)
        if isinstance(body, ObjectRequest):
            return await self._objects.handle(client, tenant, body)
        if isinstance(body, ClaimRequest):
            return await handle_claim(self._service, tenant, body, self._call)
        return await self._handle(client, tenant, body)

    async def _handle(self, client: int, tenant: str, body: Request) -> Reply:
        match body:
            case BeginIngest():
                return await self._begin(client, tenant, body)
            case CommitIngest():
                return await self._commit(client, body)
            case NextSlots():
                return await self._next_slots(client, body)
            case AttachDocument():
                return await self._attach(client, tenant, body)
            case AttachPrefix():
                return await self._attach_prefix(client, tenant, body)
            case WaitLayers(lease=lease, layers=layers):
                ready: int = await self._call(lambda done: self._service.wait_layers(client, lease, layers, done))
                return LayersReady(ready)
            case Report(lease=lease):
                # The last bytes may be used before their move is reported: a receipt counts them all.
                _ = await self._call(lambda done: self._service.wait_layers(client, lease, ALL_LAYERS, done))
                return self._simple(client, tenant, body)
            case FreeDocument():
                return await self._free(tenant, body)
            case DeleteDocument(name=name):
                return await self._done(lambda done: self._service.delete(DocumentId(tenant, name), done))
            case KeepRing(rate=rate):
                return await self._done(lambda done: self._service.measurements.keep_ring(rate, done))
            case KeysOf() | LookupTokens() | ClearModel():
                return await self._in_steps(tenant, body)
            case _:
                return self._simple(client, tenant, body)

    async def _in_steps(self, tenant: str, body: KeysOf | LookupTokens | ClearModel) -> Reply:
        """What may take long, and lets others in between."""
        if isinstance(body, ClearModel):
            scope = word(Scope, body.scope)
            chosen = Selection(fingerprints=frozenset(body.fingerprints), tenant=tenant, scope=scope)
            found = await cleared(self._service, chosen)
            return Cleared(found.deleted, found.kept_count)
        keys = b"".join(
            await keys_of(self._service, tenant, body.fingerprint, sent_tokens(body.tokens), dict(body.extras))
        )
        return Keys(keys) if isinstance(body, KeysOf) else self._look(tenant, Lookup(body.fingerprint, keys))

    def _simple(self, client: int, tenant: str, body: Request) -> Reply:
        service = self._service
        match body:
            case RegisterSpec(spec=spec):
                return SpecRegistered(service.register_spec(spec))
            case AbortIngest(ingest=ingest):
                service.abort_ingest(client, ingest)
            case Renew(lease=lease):
                service.renew(client, lease)
            case Detach(lease=lease):
                service.detach(client, lease)
            case Report(lease=lease):
                seen = Seen(
                    body.exposed_ns,
                    body.prefill_ns,
                    body.decode_ns,
                    body.answer_tokens,
                    body.strategy,
                    body.strategy_reason,
                    body.queries,
                )
                return Receipt(swap_view(service.report(client, lease, seen)))
            case ObservePrefill(fingerprint, points, ranks):
                # A clock that saw no time pass has measured nothing.
                measured = [Prefill(*point, ranks) for point in points if point[2] >= 1 / NS]
                service.measurements.observe_prefill(fingerprint, measured)
            case FindRing(setting=setting):
                return RingFound(service.measurements.ring(setting))
            case PrefetchDocument(name, group, queries, seconds, owner):
                wanted = DocumentId(tenant, name)
                hint = service.prefetching.hint(client, wanted, group, queries, seconds, owner)
                return Hinted(hint_view(service.state.hints, hint, service.clock))
            case CancelPrefetch(name, group, owner):
                service.prefetching.cancel(client, DocumentId(tenant, name), group, owner)
            case _:
                return self._look(tenant, body)
        return Done()

    def _look(self, tenant: str, body: Request) -> Reply:
        service = self._service
        match body:
            case ListDocuments():
                records = [r for d, r in sorted(service.state.documents.named.items()) if d.tenant == tenant]
                return Documents([document_view(service.state, service.planner, record) for record in records])
            case ShowDocument(name=name):
                return Documents([self._view(service.state.document(DocumentId(tenant, name)).document)])
            case ExplainDocument(name):
                return Explained(explain_view(service.state, service.planner, DocumentId(tenant, name)))
            case Lookup(fingerprint, keys):
                return Found(prefix_view(service.lookup(tenant, fingerprint, keys)))
            case ListTiers():
                return Tiers(tier_views(service.state))
            case _:
                raise MalformedFrame(f"{type(body).__name__} is not expected here")

    async def _begin(self, client: int, tenant: str, body: BeginIngest) -> Reply:
        tokens = sent_tokens(body.tokens)
        document = DocumentId(tenant, body.name)
        extras = dict(body.extras)
        keys = await keys_of(self._service, tenant, body.fingerprint, tokens, extras)
        opened: Ingest = await self._call(
            lambda done: self._service.begin_ingest(
                client,
                document,
                body.fingerprint,
                tokens,
                body.write_policy,
                body.group,
                body.chunk_tokens,
                self._deadline_ns(body.deadline_seconds),
                done,
                keys,
                body.layout.layout() if body.layout is not None else None,
                body.ttl_seconds,
                extras,
            ),
            late=lambda ingest: self._service.abort_ingest(client, ingest.id),
        )
        with self._taken_back(lambda: self._service.abort_ingest(client, opened.id)):
            if opened.error is not None:  # since the grant
                raise opened.error
            copies = [(extent, opened.filled.get(extent.id)) for extent in opened.missing]
            runs = self._runs(body.fingerprint, copies)
        passage = opened.passage if opened.group is None else None
        todo = passage.todo if passage is not None else []
        early = passage is not None and passage.early is not None
        waiting = [(extent.start, extent.valid_tokens, extent.group) for extent in todo]
        return IngestOpened(opened.id, opened.cached_tokens, runs, _shard(opened.loading), waiting, early)

    async def _commit(self, client: int, body: CommitIngest) -> Reply:
        deadline_ns = self._deadline_ns(body.deadline_seconds)
        seen: list[DocumentView] = []

        def start(done: Answered[Document]) -> None:
            def committed(result: Document | HoldfastError) -> None:
                if not isinstance(result, HoldfastError):
                    seen.append(self._view(result))  # at once: an unnamed one may be gone before the answer
                done(result)

            self._service.commit_ingest(client, body.ingest, committed, body.seals, deadline_ns)

        await self._call(start)
        return Documents(seen)

    async def _next_slots(self, client: int, body: NextSlots) -> Reply:
        given: tuple[Ingest, list[Extent]] = await self._call(
            lambda done: self._service.next_slots(client, body.ingest, body.filled, body.seals, done)
        )
        ingest, extents = given
        copies = [(extent, ingest.filled.get(extent.id)) for extent in extents]
        return SlotsGiven(self._runs(ingest.document.fingerprint, copies))

    async def _attach(self, client: int, tenant: str, body: AttachDocument) -> Reply:
        document = DocumentId(tenant, body.name)
        wanted = body.layout.layout() if body.layout is not None else None

        def attaching(done: Answered[Attach]) -> None:
            deadline_ns = self._deadline_ns(body.deadline_seconds)
            self._service.attach(client, document, body.fingerprint, body.group, wanted, deadline_ns, done, body.tokens)

        def start(done: Answered[Attach]) -> None:
            if not body.wait_seconds:
                attaching(done)
                return
            until_ns = self._deadline_ns(body.wait_seconds)
            waiter = Waiter(
                client=client, document=document, deadline_ns=until_ns, attach=lambda: attaching(done), refused=done
            )
            self._service.when_published(waiter)

        return await self._attached(client, start, body.group)

    async def _attach_prefix(self, client: int, tenant: str, body: AttachPrefix) -> Reply:
        tokens, extras = sent_tokens(body.tokens), dict(body.extras)
        keys = b"".join(await keys_of(self._service, tenant, body.fingerprint, tokens, extras))
        deadline_ns = self._deadline_ns(body.deadline_seconds)
        matched = 0

        def start(done: Answered[Attach]) -> None:
            nonlocal matched
            matched = self._service.attach_prefix(client, tenant, body.fingerprint, keys, deadline_ns, done)

        return replace(await self._attached(client, start, None), token_count=matched)

    async def _attached(self, client: int, start: Callable[[Answered[Attach]], None], group: str | None) -> Attached:
        """Await the grant, and say what was granted."""
        attach: Attach = await self._call(start, late=lambda attach: self._service.detach(client, attach.lease.id))
        owner = attach.owner
        with self._taken_back(lambda: self._service.detach(client, attach.lease.id)):
            if attach.loading.error is not None:  # since the grant
                raise attach.loading.error
            runs = self._attached_runs(owner, attach.loading.records) if group is None else []
        return Attached(
            attach.lease.id,
            owner.fingerprint,
            owner.token_count,
            self._service.state.specs[owner.fingerprint],
            runs,
            _shard(attach.loading),
            attach.loading.layers,
            owner.id.name,
        )

    @contextmanager
    def _taken_back(self, undo: Callable[[], None]) -> Iterator[None]:
        """Undo a grant that cannot be handed over: a slab whose memory cannot be made is found out only here."""
        try:
            yield
        except HoldfastError:
            with suppress(ClaimNotFound):
                undo()
            raise

    async def _free(self, tenant: str, body: FreeDocument) -> Reply:
        document = DocumentId(tenant, body.name)
        tier = emptied(body.to)
        if body.dry_run:
            return FreedPlan(victim_views(self._service.upkeep.plan_eviction(document, tier, 0)))
        plan: list[Victim] = []

        def start(done: Answered[None]) -> None:
            plan.extend(self._service.evict(document, tier, 0, self._deadline_ns(body.deadline_seconds), done))

        await self._call(start)
        return FreedPlan(victim_views(plan))

    async def _done(self, start: Callable[[Answered[None]], None]) -> Reply:
        """Done, when a command that answers nothing else says so."""
        await self._call(start)
        return Done()

    def _attached_runs(self, owner: Document, records: Sequence[ExtentRecord]) -> list[RunMessage]:
        """Its runs, as they were last time when it still lies where it lay; a copy never changes its slot."""
        copies = [record.ddr for record in records]
        known = self._lately.pop(owner.id, None)
        if known is None or len(known[0]) != len(copies) or not all(map(is_, known[0], copies)):
            extents = ((record.extent, record.ddr) for record in records)
            known = copies, self._runs(owner.fingerprint, extents)
        self._lately[owner.id] = known
        if len(self._lately) > LATELY_MAX:
            del self._lately[next(iter(self._lately))]
        return known[1]

    def _runs(self, fingerprint: bytes, copies: Iterable[tuple[Extent, Placement | None]]) -> list[RunMessage]:
        slots = [(extent, copy.slot) for extent, copy in copies if copy is not None and copy.slot is not None]
        return in_runs(slots, self._service.state.specs[fingerprint].extent_tokens, self._serial)

    def _view(self, document: Document) -> DocumentView:
        return document_view(self._service.state, self._service.planner, self._service.state.document(document.id))

    def _deadline_ns(self, seconds: float) -> int:
        if not 0 < seconds <= LONGEST_SECONDS:
            raise InvalidRequest(f"a deadline lies between 0 and {LONGEST_SECONDS:g} seconds, not {seconds}")
        return self._service.clock.monotonic_ns() + int(seconds * NS)

    async def _call(self, start: Callable[[Answered[T]], object], late: Callable[[T], None] | None = None) -> T:
        """Await a command's callback. When the caller is gone meanwhile, `late` undoes what was granted after all."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def undo(result: T) -> None:
            with suppress(ClaimNotFound):  # its client's end has ended it already
                assert late is not None
                late(result)

        def done(result: T | HoldfastError) -> None:
            if future.done():
                if late is not None and not isinstance(result, HoldfastError):
                    # Not from within the command that grants it.
                    loop.call_soon(undo, result)
            elif isinstance(result, HoldfastError):
                future.set_exception(result)
            else:
                future.set_result(result)

        start(done)
        if future.done():  # waiting for it would let the loop go round once
            return future.result()
        try:
            return await asyncio.wait_for(future, LONGEST_SECONDS)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer within {LONGEST_SECONDS:g} s") from error


def _shard(loading: Loading | None) -> ShardMessage | None:
    if loading is None or loading.shard is None:
        return None
    return ShardMessage(loading.shard.id, loading.generation, LayoutMessage.of(loading.shard.layout))
