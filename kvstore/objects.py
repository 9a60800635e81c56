"""Objects: opaque bytes under keys of an engine's own, in namespaces of a tenant: the commands. See opaque.

Many travel with one message, and one that fails does not fail the others.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from .attach import Attaches
from .claims import Pin, PinKind, PinSelection, Refresh
from .document import DocumentId
from .errors import DocumentNotFound, HoldfastError, InUse, InvalidRequest
from .expiry import Expiry
from .getting import Get, Gets
from .keeping import Keeping
from .opaque import OBJECTS_AT_ONCE, checked_namespace, object_id, object_key
from .putting import Answered, Incoming, Puts
from .residency import Tier
from .state import DocumentRecord

PINNED_AT_ONCE: Final = 16_384
SPACES_KEPT: Final = 4096  # namespaces whose hits are counted

Told = Callable[[HoldfastError | None], None]


class Objects:
    """All commands on objects. `pump` lets what they have changed take its course."""

    def __init__(
        self,
        attaches: Attaches,
        keeping: Keeping,
        expiry: Expiry,
        secret: Callable[[str], bytes],
        limit: int,
        pump: Callable[[], None],
    ) -> None:
        self.keeping = keeping
        self.upkeep = keeping.upkeep
        self.state = keeping.state
        self.puts = Puts(keeping, secret, limit)
        self.gets = Gets(attaches, keeping, expiry)
        self._counts: OrderedDict[tuple[str, str], Counter[str]] = OrderedDict()
        self._pump = pump

    # In and out --------------------------------------------------------------------------------

    def begin_put(
        self,
        client: int,
        incoming: Incoming,
        objects: Sequence[tuple[bytes, int]],
        deadline_ns: int,
        answered: Answered,
    ) -> None:
        """See Puts.begin. Raises InvalidName or InvalidRequest."""
        checked_namespace(incoming.namespace)
        _check_count(objects)
        self.puts.begin(client, incoming, objects, deadline_ns, answered)
        self._pump()

    def commit_put(self, client: int, put: int, seals: Sequence[bytes], deadline_ns: int, answered: Answered) -> None:
        """See Puts.commit."""
        self.puts.commit(client, put, seals, deadline_ns, answered)
        self._pump()

    def abort_put(self, client: int, put: int) -> None:
        """See Puts.abort."""
        self.puts.abort(client, put)
        self._pump()

    def get(
        self,
        client: int,
        tenant: str,
        namespace: str,
        keys: Sequence[bytes],
        deadline_ns: int,
        answered: Callable[[Get], None],
    ) -> None:
        """See Gets.begin. Raises InvalidRequest."""
        _check_count(keys)

        def counted(get: Get) -> None:
            self._count(tenant, namespace, len(keys), len(get.found))
            answered(get)

        self.gets.begin(client, tenant, namespace, keys, deadline_ns, counted)
        self._pump()

    def release(self, client: int, get: int) -> None:
        """See Gets.release."""
        self.gets.release(client, get)
        self._pump()

    def counts(self, tenant: str, namespace: str) -> Counter[str]:
        """How often objects of a namespace were `asked` for since the daemon started, and how many were `hits`."""
        return self._counts.get((tenant, namespace), Counter())

    def _count(self, tenant: str, namespace: str, asked: int, hits: int) -> None:
        counts = self._counts.setdefault((tenant, namespace), Counter())
        self._counts.move_to_end((tenant, namespace))
        counts["asked"] += asked
        counts["hits"] += hits
        if len(self._counts) > SPACES_KEPT:
            self._counts.popitem(last=False)

    # By key ------------------------------------------------------------------------------------

    def find(self, tenant: str, namespace: str, keys: Sequence[bytes]) -> list[Tier | None]:
        """The nearest tier that has each, if any. Nothing is leased, and nothing learnt. Raises InvalidRequest."""
        _check_count(keys)
        found = []
        for record in self._known(tenant, namespace, keys):
            source = None if record is None else self.state.extents[record.document.extents[0]].source()
            found.append(None if source is None else source.tier)
        return found

    def touch(self, tenant: str, namespace: str, keys: Sequence[bytes]) -> None:
        """These are used, without being read. Raises InvalidRequest."""
        _check_count(keys)
        used = self.gets.use([record for record in self._known(tenant, namespace, keys) if record is not None])
        for use in used:
            self.gets.uses.released(use)
        self._pump()

    def listed(self, tenant: str, namespace: str, skip: int, limit: int) -> list[tuple[bytes, int]]:
        """At most `limit` keys and sizes, in the order in which they came, but for the first `skip`."""
        documents = self.state.documents
        some = islice(documents.of(tenant, checked_namespace(namespace)), skip, skip + limit)
        return [(object_key(one), documents[one].document.token_count) for one in some]

    def _known(self, tenant: str, namespace: str, keys: Sequence[bytes]) -> list[DocumentRecord | None]:
        documents = self.state.documents
        wall_ns = self.keeping.store.clock.wall_ns()
        records = [documents.get(object_id(tenant, namespace, key)) for key in keys]
        return [None if record is None or record.document.expired(wall_ns) else record for record in records]

    def delete(
        self, tenant: str, namespace: str, keys: Sequence[bytes], done: Callable[[list[bool] | HoldfastError], None]
    ) -> None:
        """Forget these. `done` hears which were there and are gone, when the catalog has forgotten them too.

        Those that are leased, pinned or being stored stay. Raises InvalidRequest.
        """
        _check_count(keys)
        self.forget_all([object_id(tenant, namespace, key) for key in keys], done)

    def forget_all(self, documents: Sequence[DocumentId], done: Callable[[list[bool] | HoldfastError], None]) -> None:
        """See `delete`."""
        gone: list[bool] = []
        wait = _Together(lambda error: done(gone if error is None else error))
        gone += [self._delete(document, wait) for document in documents]
        wait.begin()
        self._pump()

    def _delete(self, document: DocumentId, wait: _Together) -> bool:
        try:
            self.upkeep.delete(document, wait.one())
        except (DocumentNotFound, InUse):
            wait.none()
            return False
        return True

    # Pins --------------------------------------------------------------------------------------

    def chosen(
        self, tenant: str, namespace: str, keys: Sequence[bytes] | None, prefix: bytes | None
    ) -> list[DocumentId]:
        """The objects that are there of these keys, or whose keys begin so; all of the namespace where both are None.

        Raises InvalidRequest for both, and for more than can be pinned at once.
        """
        if keys is not None and prefix is not None:
            raise InvalidRequest("name objects by their keys or by a prefix of their keys, not both")
        documents = self.state.documents
        if keys is not None:
            named = dict.fromkeys(object_id(tenant, namespace, key) for key in keys)
            return [document for document in named if document in documents]
        front = f"{namespace}/{(prefix or b'').hex()}"
        found = [document for document in documents.of(tenant, namespace) if document.name.startswith(front)]
        if len(found) > PINNED_AT_ONCE:
            raise InvalidRequest(f"{len(found)} objects are meant, more than {PINNED_AT_ONCE}: use longer prefixes")
        return found

    def pin(
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
        """See Keeping.pin_objects."""
        pins = self.keeping.pin_objects(documents, floor, ttl_seconds, owner, reason, kind, refresh, done)
        for pin in pins:
            self.upkeep.room.writes.came_back(self.state.documents[pin.document], "pinned")
        self._pump()
        return pins

    def unpin(self, documents: Sequence[DocumentId], done: Told) -> list[Pin]:
        """See Keeping.unpin_all."""
        pins = self.keeping.unpin_all(PinSelection(documents=set(documents)), done)
        self._pump()
        return pins

    # Ends --------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Let time pass, end what did not come, and bring near what is pinned."""
        self.gets.pump()
        self.keeping.bring_more()

    def forget(self, client: int) -> None:
        """The client is gone, and with it its ingests and leases."""
        self.puts.forget(client)
        self.gets.forget(client)


class _Together:
    """Hears many commands out, and tells the first error that one of them had, or that none had any."""

    def __init__(self, done: Told) -> None:
        self._done = done
        self._pending = 1
        self._error: HoldfastError | None = None

    def one(self) -> Told:
        """Wait for one more."""
        self._pending += 1
        return self._heard

    def none(self) -> None:
        """The last one was not begun."""
        self._pending -= 1

    def begin(self) -> None:
        """All have been begun."""
        self._heard(None)

    def _heard(self, error: HoldfastError | None) -> None:
        self._pending -= 1
        self._error = self._error or error
        if not self._pending:
            self._done(self._error)


def _check_count(objects: Sequence[object]) -> None:
    if not 1 <= len(objects) <= OBJECTS_AT_ONCE:
        raise InvalidRequest(f"1 to {OBJECTS_AT_ONCE} objects travel with one message, not {len(objects)}")
