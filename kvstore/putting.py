"""Putting: opaque objects come in, many with one message, and each is published, or refused, by itself.

Each is an ingest of one extent. Object i + 1 of a batch follows object i, so that eviction takes the tail first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from .document import Document, DocumentId, WritePolicy
from .errors import ClaimNotFound, DocumentExists, HoldfastError, InUse, InvalidRequest, NoCapacity
from .extent import Extent, ExtentId
from .ingesting import Ingest
from .keeping import Keeping
from .opaque import is_opaque, object_extent, object_extent_id, object_id, opaque_spec
from .registering import register
from .spec import KVSpec

OPAQUE_SPECS_MAX: Final = 2048  # namespaces times sizes times worths: half of what may be registered
Answered = Callable[["Put"], None]


class Incoming(NamedTuple):
    """What is true of all objects of a batch. `tokens_each`: what computing one again takes; 0: nobody says.

    `behind` is the key of the object that the first one follows, if it is there.
    """

    tenant: str
    namespace: str
    write_policy: WritePolicy
    tokens_each: int = 0
    ttl_ns: int | None = None
    behind: bytes | None = None


@dataclass(eq=False, slots=True, kw_only=True)
class Put:
    """A batch. By number in it: `ingests` have slots to fill, `refused` say why not; the rest is there already."""

    id: int
    client: int
    ingests: dict[int, Ingest] = field(default_factory=dict)
    refused: dict[int, HoldfastError] = field(default_factory=dict)
    answered: Answered
    pending: int = 1  # ours: all have been asked for


class Puts:
    """Begins and ends batches. `secret` gives a tenant's key secret, `limit` says how many unnamed documents may be."""

    def __init__(self, keeping: Keeping, secret: Callable[[str], bytes], limit: int) -> None:
        self.keeping = keeping
        self.ingests = keeping.upkeep.ingests
        self.store = keeping.store
        self.state = keeping.state
        self.uses = keeping.store.planner.uses
        self.open: dict[int, Put] = {}
        self._secret = secret
        self._limit = limit

    # Begin -------------------------------------------------------------------------------------

    def begin(
        self,
        client: int,
        incoming: Incoming,
        objects: Sequence[tuple[bytes, int]],
        deadline_ns: int,
        answered: Answered,
    ) -> None:
        """Take a slot for each (key, bytes). `answered` hears the batch when each has one, or is refused.

        If none has one it is over then. Raises InvalidName for a key `behind` which none can follow.
        """
        previous = self._behind(incoming)
        put = Put(id=self.store.new_id(), client=client, answered=answered)
        self.open[put.id] = put
        leaving = {copy.extent for copy in self.state.leaving}
        present = [] if previous is None else [previous]
        for number, (key, size_bytes) in enumerate(objects):
            try:
                ingest = self._made(client, incoming, key, size_bytes, previous, leaving)
                if isinstance(ingest, Ingest):
                    self._begin(put, number, ingest, present, deadline_ns)
                    previous = ingest.document.extents[0]
                    present = []
                else:
                    previous = ingest
                    present.append(ingest)
            except HoldfastError as error:
                put.refused[number] = error
        self._settled(put)

    def _behind(self, incoming: Incoming) -> ExtentId | None:
        if incoming.behind is None:
            return None
        known = self.state.documents.get(object_id(incoming.tenant, incoming.namespace, incoming.behind))
        return None if known is None else known.document.extents[0]

    def _begin(self, put: Put, number: int, ingest: Ingest, present: Sequence[ExtentId], deadline_ns: int) -> None:
        """`present` are those before it, which are not to leave for what follows them."""

        def granted(error: HoldfastError | None) -> None:
            if error is not None:
                put.ingests.pop(number, None)
                put.refused[number] = error
            self._settled(put)

        put.pending += 1
        put.ingests[number] = ingest
        try:
            self.ingests.begin(ingest, deadline_ns, granted)
        except HoldfastError:
            put.pending -= 1
            del put.ingests[number]
            raise
        for extent in present:
            record = self.state.extents.get(extent)  # it may have expired since
            source = record.source() if record is not None else None
            if source is not None:
                ingest.held.append(self.store.hold(source))
        self.ingests.room.pump()  # at once: few may wait for room

    def _settled(self, put: Put) -> None:
        put.pending -= 1
        if not put.pending:
            self._end_if_empty(put)
            put.answered(put)

    def _end_if_empty(self, put: Put) -> None:
        """Without a slot there is nothing to commit."""
        if not put.ingests:
            self.open.pop(put.id, None)

    def _made(
        self,
        client: int,
        incoming: Incoming,
        key: bytes,
        size_bytes: int,
        previous: ExtentId | None,
        leaving: set[ExtentId],
    ) -> Ingest | ExtentId:
        """The ingest of an object; of one that is there its extent."""
        document = object_id(incoming.tenant, incoming.namespace, key)
        known = self.state.documents.get(document)
        if known is not None and known.document.expired(self.store.clock.wall_ns()):
            self.keeping.upkeep.delete(document, reason="expired")
            known = None
        if known is None:
            return self._new(client, incoming, document, size_bytes, previous, leaving)
        if known.document.token_count != size_bytes:
            raise DocumentExists(
                f"{document} has {known.document.token_count} B, not {size_bytes}: delete it before it is replaced"
            )
        extent = self.state.extents[known.document.extents[0]].extent
        if self.ingests.present(extent):
            return extent.id
        created_wall_ns = max(self.store.clock.wall_ns(), known.document.created_wall_ns + 1)
        again = replace(known.document, created_wall_ns=created_wall_ns)
        return self._ingest(client, again, extent, incoming)

    def _new(
        self,
        client: int,
        incoming: Incoming,
        document: DocumentId,
        size_bytes: int,
        previous: ExtentId | None,
        leaving: set[ExtentId],
    ) -> Ingest:
        if len(self.state.documents.unnamed) + len(self.ingests.open) >= self._limit:
            raise NoCapacity(f"limits.unnamed = {self._limit} objects and unnamed prefixes exist; clear a namespace")
        spec, fingerprint = opaque_spec(incoming.namespace, size_bytes, incoming.tokens_each)
        if fingerprint not in self.state.specs:
            self._register(spec)
        secret, life = self._secret(document.tenant), 0
        name = object_extent_id(document, previous, secret)
        while name in self.state.extents or name in leaving:  # of an object that was deleted: perhaps other bytes
            life += 1
            name = object_extent_id(document, previous, secret, life)
        made = Document(
            id=document,
            fingerprint=fingerprint,
            token_count=size_bytes,
            extents=(name,),
            write_policy=incoming.write_policy,
            created_wall_ns=self.store.clock.wall_ns(),
        )
        return self._ingest(client, made, object_extent(made, spec, previous), incoming)

    def _register(self, spec: KVSpec) -> None:
        """Raises NoCapacity rather than keep out a model: sizes and worths may be anything."""
        mine = sum(map(is_opaque, self.state.specs.values()))
        if mine >= OPAQUE_SPECS_MAX:
            raise NoCapacity(
                f"{mine} kinds of objects are known: a namespace, a size or tokens_each that keeps changing?"
            )
        register(self.store, spec)

    def _ingest(self, client: int, document: Document, extent: Extent, incoming: Incoming) -> Ingest:
        return Ingest(
            id=self.store.new_id(),
            client=client,
            document=document,
            extents=(extent,),
            missing=(extent,),
            cached_tokens=0,
            group=None,
            layout=None,
            ttl_ns=incoming.ttl_ns,
        )

    # End ---------------------------------------------------------------------------------------

    def commit(self, client: int, put_id: int, seals: Sequence[bytes], deadline_ns: int, answered: Answered) -> None:
        """Publish the objects that were given slots, in order; one without a seal was not filled, and is given up.

        `answered` hears the batch again: `refused` has those that were not published. Raises ClaimNotFound, or
        InvalidRequest for another number of seals.
        """
        put = self._claimed(client, put_id)
        if len(seals) != len(put.ingests):
            raise InvalidRequest(f"{len(seals)} seals for {len(put.ingests)} objects: one each, empty if not filled")
        del self.open[put.id]
        put.answered, put.pending = answered, 1
        ingests, put.ingests = dict(put.ingests), {}
        sealed = {number: seal for number, seal in zip(sorted(ingests), seals, strict=True) if seal}
        for run in runs([(ingests[number].document, ingests[number].extents[0]) for number in sorted(sealed)]):
            self.uses.objects(run)
        for number, ingest in sorted(ingests.items()):
            self._commit(put, number, ingest, sealed.get(number), deadline_ns)
        self._settled(put)

    def _commit(self, put: Put, number: int, ingest: Ingest, seal: bytes | None, deadline_ns: int) -> None:
        def committed(error: HoldfastError | None) -> None:
            if error is None:
                self.uses.count(self.state.documents[ingest.document.id])
                self.keeping.hit(ingest.document.id)
            else:
                put.refused[number] = error
            self._settled(put)

        put.pending += 1
        try:
            self.ingests.get(ingest.id, put.client)
            if seal is None:
                raise InvalidRequest(f"{ingest.document.id} was not filled")
            self.ingests.commit(ingest, committed, [seal], deadline_ns)
        except HoldfastError as error:
            put.pending -= 1
            put.refused[number] = error
            if ingest.id in self.ingests.open:
                self.ingests.abort(ingest)

    def abort(self, client: int, number: int) -> None:
        """Drop a batch without a trace. Raises ClaimNotFound."""
        put = self._claimed(client, number)
        self.give_up(put, list(put.ingests))

    def give_up(self, put: Put, numbers: Sequence[int]) -> None:
        """Drop some of a batch's objects."""
        for number in numbers:
            ingest = put.ingests.pop(number)
            if ingest.id in self.ingests.open:
                self.ingests.abort(ingest)
            put.refused.setdefault(number, InUse(f"{ingest.document.id} was given up"))
        self._end_if_empty(put)

    def _claimed(self, client: int, number: int) -> Put:
        put = self.open.get(number)
        if put is None or put.client != client or put.pending:
            raise ClaimNotFound(f"no open put {number} of this client; it ended or was aborted")
        return put

    def forget(self, client: int) -> None:
        """The client is gone, and with it its ingests."""
        self.open = {number: put for number, put in self.open.items() if put.client != client}


def runs(objects: Sequence[tuple[Document, Extent]]) -> list[list[Document]]:
    """Objects that follow each other, together."""
    found: list[list[Document]] = []
    last: ExtentId | None = None
    for document, extent in objects:
        if last is not None and extent.previous == last:
            found[-1].append(document)
        else:
            found.append([document])
        last = extent.id
    return found
