"""Object requests: what the messages about opaque objects ask of the service, and the replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final, Protocol, TypeVar

from .claim_requests import tier_named, word
from .claims import Pin, PinKind, Refresh
from .document import ttl_ns_of
from .errors import ClaimNotFound, HoldfastError, InvalidRequest
from .getting import Get
from .object_messages import (
    AbortPut,
    BeginPut,
    ClearNamespace,
    CommitPut,
    DeleteObjects,
    FindObjects,
    GetObjects,
    ListNamespaces,
    ListObjects,
    Namespaces,
    ObjectReply,
    ObjectRequest,
    ObjectsCounted,
    ObjectsDeleted,
    ObjectsFound,
    ObjectsLeased,
    ObjectsListed,
    PinObjects,
    PutBegun,
    PutEnded,
    Refusals,
    ReleaseObjects,
    TouchObjects,
    UnpinObjects,
)
from .object_views import namespace_views
from .objects import Objects
from .opaque import OBJECTS_AT_ONCE, checked_namespace
from .putting import Incoming, Put
from .runs import PartMessage
from .service import Service
from .slots import Slot
from .wire import Done

T = TypeVar("T")
Answered = Callable[[T | HoldfastError], None]
NEW_OBJECTS: Final = (BeginPut, GetObjects, PinObjects)
CACHE_OBJECTS: Final = (BeginPut, GetObjects, FindObjects)  # what a bypass refuses
SETTLED_OBJECTS: Final = (BeginPut, DeleteObjects, ClearNamespace)  # answered when the warm index has heard of it


class Call(Protocol):
    """Awaits a command's callback; see Requests."""

    async def __call__(self, start: Callable[[Answered[T]], object], late: Callable[[T], None] | None = None) -> T: ...


class ObjectRequests:
    """Handles them. `deadline_ns` turns a client's seconds into a time; `serial(slab)` names the slab's memory."""

    def __init__(
        self, service: Service, serial: Callable[[int], int], call: Call, deadline_ns: Callable[[float], int]
    ) -> None:
        self._service = service
        self._serial = serial
        self._call = call
        self._deadline_ns = deadline_ns

    @property
    def _objects(self) -> Objects:
        return self._service.objects

    async def handle(self, client: int, tenant: str, body: ObjectRequest) -> ObjectReply | Done:
        """The reply. Raises HoldfastError."""
        objects = self._objects
        match body:
            case BeginPut():
                return await self._begin(client, tenant, body)
            case CommitPut():
                return await self._commit(client, body)
            case GetObjects():
                return await self._get(client, tenant, body)
            case DeleteObjects(namespace, keys):
                gone: list[bool] = await self._call(lambda done: objects.delete(tenant, namespace, keys, done))
                return ObjectsDeleted(gone)
            case PinObjects() | UnpinObjects():
                return await self._pin(tenant, body)
            case ListNamespaces():
                return Namespaces(await namespace_views(self._service, tenant, body.namespace))
            case ClearNamespace(namespace):
                return ObjectsCounted(await cleared(self._call, objects, tenant, namespace))
            case _:
                return self._simple(client, tenant, body)

    def _simple(self, client: int, tenant: str, body: ObjectRequest) -> ObjectReply | Done:
        objects = self._objects
        match body:
            case FindObjects(namespace, keys):
                tiers = objects.find(tenant, namespace, keys)
                return ObjectsFound([None if tier is None else tier.label for tier in tiers])
            case ListObjects(namespace, skip, limit):
                listed = objects.listed(tenant, namespace, skip, limit)
                return ObjectsListed([key for key, _ in listed], [size_bytes for _, size_bytes in listed])
            case AbortPut(put=put):
                objects.abort_put(client, put)
            case ReleaseObjects(lease=lease):
                objects.release(client, lease)
            case TouchObjects(namespace, keys):
                objects.touch(tenant, namespace, keys)
        return Done()

    async def _begin(self, client: int, tenant: str, body: BeginPut) -> PutBegun:
        if len(body.sizes) != len(body.keys):
            raise InvalidRequest(f"{len(body.sizes)} sizes for {len(body.keys)} keys")
        ttl_ns = ttl_ns_of(body.ttl_seconds)
        incoming = Incoming(tenant, body.namespace, body.write_policy, body.tokens_each, ttl_ns, body.behind)
        wanted = list(zip(body.keys, body.sizes, strict=True))
        deadline_ns = self._deadline_ns(body.deadline_seconds)
        put: Put = await self._call(
            lambda done: self._objects.begin_put(client, incoming, wanted, deadline_ns, done),
            late=lambda put: self._objects.abort_put(client, put.id),
        )
        slots: list[PartMessage | None] = [None] * len(wanted)
        for number, ingest in list(put.ingests.items()):
            copy = ingest.filled.get(ingest.document.extents[0])
            try:
                if ingest.error is not None:  # since the grant
                    raise ingest.error
                assert copy is not None
                slots[number] = self._part(copy.slot, ingest.document.token_count)
            except HoldfastError as error:
                put.refused[number] = error
                self._objects.puts.give_up(put, [number])
        return PutBegun(put.id, slots, _refusals(put.refused))

    async def _commit(self, client: int, body: CommitPut) -> PutEnded:
        deadline_ns = self._deadline_ns(body.deadline_seconds)
        put: Put = await self._call(
            lambda done: self._objects.commit_put(client, body.put, body.seals, deadline_ns, done)
        )
        return PutEnded(_refusals(put.refused))

    async def _get(self, client: int, tenant: str, body: GetObjects) -> ObjectsLeased:
        deadline_ns = self._deadline_ns(body.deadline_seconds)

        def undo(get: Get) -> None:
            with suppress(ClaimNotFound):
                self._objects.release(client, get.id)

        get: Get = await self._call(
            lambda done: self._objects.get(client, tenant, body.namespace, body.keys, deadline_ns, done), late=undo
        )
        slots: list[PartMessage | None] = [None] * len(body.keys)
        for number, attach in get.found.items():
            copy = attach.loading.records[0].ddr
            assert copy is not None, "it is leased"
            slots[number] = self._part(copy.slot, attach.owner.token_count)
        return ObjectsLeased(get.id, slots, _refusals(get.refused))

    async def _pin(self, tenant: str, body: PinObjects | UnpinObjects) -> ObjectsCounted:
        objects = self._objects
        documents = objects.chosen(tenant, body.namespace, body.keys, body.key_prefix)
        pins: list[Pin] = []

        def start(done: Answered[None]) -> None:
            if isinstance(body, UnpinObjects):
                pins.extend(objects.unpin(documents, done))
                return
            floor, kind, refresh = tier_named(body.tier), word(PinKind, body.kind), word(Refresh, body.refresh)
            pins.extend(objects.pin(documents, floor, body.ttl_seconds, body.owner, body.reason, kind, refresh, done))

        await self._call(start)
        return ObjectsCounted(len(pins))

    def _part(self, slot: Slot | None, size_bytes: int) -> PartMessage:
        assert slot is not None
        return PartMessage(slot.slab, slot.offset, slot.size_bytes, self._serial(slot.slab), 0, size_bytes)


async def cleared(call: Call, objects: Objects, tenant: str, namespace: str) -> int:
    """Forget the objects that a namespace has now, some at a time: others are not to wait long. How many are gone."""
    count = 0
    documents = list(objects.state.documents.of(tenant, checked_namespace(namespace)))
    for first in range(0, len(documents), OBJECTS_AT_ONCE):
        some = documents[first : first + OBJECTS_AT_ONCE]
        gone: list[bool] = await call(partial(objects.forget_all, some))
        count += sum(gone)
    return count


def _refusals(refused: Mapping[int, HoldfastError]) -> Refusals:
    return {number: (error.code, error.message) for number, error in refused.items()}
