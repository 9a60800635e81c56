"""Object client: a client's commands on opaque objects as methods, many objects with one message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

from .connection import REPLY_SECONDS
from .document import WritePolicy
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
    ObjectsCounted,
    ObjectsDeleted,
    ObjectsFound,
    ObjectsLeased,
    ObjectsListed,
    PinObjects,
    PutBegun,
    PutEnded,
    ReleaseObjects,
    TouchObjects,
    UnpinObjects,
)
from .object_views import NamespaceView
from .opaque import LISTED_AT_ONCE
from .runs import PartMessage
from .wire import Done, Request

R = TypeVar("R")
LOOK_SECONDS: Final = 60.0
CLEAR_SECONDS: Final = 600.0  # of a million objects
MARGIN_SECONDS: Final = 5.0  # the daemon answers at its deadline; give the answer time to arrive


class Ask(Protocol):
    """Sends a request and returns its reply; raises what the daemon refuses with, or Unavailable."""

    def __call__(self, kind: type[R], body: Request, deadline_seconds: float = REPLY_SECONDS) -> R: ...


class ObjectClient:
    """At most OBJECTS_AT_ONCE objects a call. `views` gives slots as writable buffers."""

    def __init__(self, ask: Ask, views: Callable[[Sequence[PartMessage]], list[memoryview]]) -> None:
        self._ask = ask
        self.views = views

    def begin_put(
        self,
        namespace: str,
        objects: Sequence[tuple[bytes, int]],
        *,
        write_policy: WritePolicy = WritePolicy.AUTO,
        deadline_seconds: float = 10.0,
        tokens_each: int = 0,
        ttl_seconds: float | None = None,
        behind: bytes | None = None,
    ) -> PutBegun:
        """Take slots for objects, each (key, bytes), to be filled and sealed."""
        keys, sizes = [key for key, _ in objects], [size_bytes for _, size_bytes in objects]
        body = BeginPut(namespace, keys, sizes, write_policy, deadline_seconds, tokens_each, ttl_seconds, behind)
        return self._ask(PutBegun, body, deadline_seconds + MARGIN_SECONDS)

    def commit_put(self, put: int, seals: Sequence[bytes], deadline_seconds: float = 60.0) -> PutEnded:
        """Publish what was filled: a seal for each slot that was given, in order, or b"" to give it up."""
        return self._ask(PutEnded, CommitPut(put, list(seals), deadline_seconds), deadline_seconds + MARGIN_SECONDS)

    def abort_put(self, put: int) -> None:
        """Drop it without a trace."""
        self._ask(Done, AbortPut(put))

    def get(self, namespace: str, keys: Sequence[bytes], deadline_seconds: float = 30.0) -> ObjectsLeased:
        """Lease what is there, brought to DDR and verified."""
        body = GetObjects(namespace, list(keys), deadline_seconds)
        return self._ask(ObjectsLeased, body, deadline_seconds + MARGIN_SECONDS)

    def release(self, lease: int) -> None:
        """End the leases of a get. Its views must not be used any more."""
        self._ask(Done, ReleaseObjects(lease))

    def find(self, namespace: str, keys: Sequence[bytes], deadline_seconds: float = REPLY_SECONDS) -> list[str | None]:
        """The nearest tier of each; None: it is not there. Nothing is leased, and nothing learnt."""
        return self._ask(ObjectsFound, FindObjects(namespace, list(keys)), deadline_seconds).tiers

    def listed(self, namespace: str, skip: int, limit: int = LISTED_AT_ONCE) -> list[tuple[bytes, int]]:
        """Keys and sizes, in the order in which they came, but for the first `skip`."""
        found = self._ask(ObjectsListed, ListObjects(namespace, skip, limit))
        return list(zip(found.keys, found.sizes, strict=True))

    def touch(self, namespace: str, keys: Sequence[bytes]) -> None:
        """Say that these are used, without reading them."""
        self._ask(Done, TouchObjects(namespace, list(keys)))

    def delete(self, namespace: str, keys: Sequence[bytes]) -> list[bool]:
        """Forget these; which were there, and are gone. What is leased, pinned or being stored stays."""
        return self._ask(ObjectsDeleted, DeleteObjects(namespace, list(keys))).gone

    def pin(
        self,
        namespace: str,
        keys: Sequence[bytes] | None,
        key_prefix: bytes | None,
        tier: str = "ddr",
        *,
        ttl_seconds: float | None = None,
        owner: str = "",
        reason: str = "",
        kind: str = "hard",
        refresh: str = "never",
    ) -> int:
        """Keep those of these keys that are there, or all whose keys begin so, at or above a tier: all or none.

        How many. See Client.pin.
        """
        listed = None if keys is None else list(keys)
        body = PinObjects(namespace, listed, key_prefix, tier, ttl_seconds, owner, reason, kind, refresh)
        return self._ask(ObjectsCounted, body).count

    def unpin(self, namespace: str, keys: Sequence[bytes] | None, key_prefix: bytes | None) -> int:
        """Let them sink again; how many were pinned."""
        listed = None if keys is None else list(keys)
        return self._ask(ObjectsCounted, UnpinObjects(namespace, listed, key_prefix)).count

    def namespaces(self, namespace: str | None = None) -> list[NamespaceView]:
        """The tenant's namespaces that have objects; or just one, whether it has any or not."""
        return self._ask(Namespaces, ListNamespaces(namespace), LOOK_SECONDS).namespaces

    def clear(self, namespace: str) -> int:
        """Forget all objects of a namespace; how many. What is leased, pinned or being stored stays."""
        return self._ask(ObjectsCounted, ClearNamespace(namespace), CLEAR_SECONDS).count
