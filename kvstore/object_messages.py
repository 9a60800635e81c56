"""Messages about opaque objects: many travel with one message, and are answered by their number in it.

`refused` says by number why an object was not stored, or not brought: (error code, message).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from .document import WritePolicy
from .message import Count, Line, Message, Size
from .object_views import NamespaceView
from .opaque import LISTED_AT_ONCE, OBJECT_KEY_MAX, OBJECTS_AT_ONCE
from .runs import PartMessage

Key = Annotated[bytes, msgspec.Meta(min_length=1, max_length=OBJECT_KEY_MAX)]
KeyPrefix = Annotated[bytes, msgspec.Meta(min_length=1, max_length=OBJECT_KEY_MAX)]
Keys = Annotated[list[Key], msgspec.Meta(min_length=1, max_length=OBJECTS_AT_ONCE)]
Refusals = dict[int, tuple[str, str]]


class BeginPut(Message, frozen=True):
    """Store these objects of so many bytes: slots are wanted. Each follows the one before it, the first `behind`.

    `tokens_each`: how many tokens have to be computed again where one is lost; 0: nobody says.
    """

    namespace: str
    keys: Keys
    sizes: Annotated[list[Size], msgspec.Meta(max_length=OBJECTS_AT_ONCE)]
    write_policy: WritePolicy
    deadline_seconds: float
    tokens_each: Count = 0
    ttl_seconds: float | None = None
    behind: Key | None = None


class CommitPut(Message, frozen=True):
    """These are filled: one seal for each slot that was given, in order; an empty one gives its object up."""

    put: int
    seals: Annotated[list[bytes], msgspec.Meta(max_length=OBJECTS_AT_ONCE)]
    deadline_seconds: float


class AbortPut(Message, frozen=True):
    """Drop a put."""

    put: int


class GetObjects(Message, frozen=True):
    """Lease these, and bring them to DDR; answered when each is there or will not be."""

    namespace: str
    keys: Keys
    deadline_seconds: float


class ReleaseObjects(Message, frozen=True):
    """End the leases of a GetObjects."""

    lease: int


class FindObjects(Message, frozen=True):
    """Which of these are there? Nothing is leased, and nothing learnt."""

    namespace: str
    keys: Keys


class TouchObjects(Message, frozen=True):
    """These are used, without being read."""

    namespace: str
    keys: Keys


class DeleteObjects(Message, frozen=True):
    """Forget these; answered when the catalog has forgotten them. What is leased, pinned or being stored stays."""

    namespace: str
    keys: Keys


class ListObjects(Message, frozen=True):
    """Some objects of a namespace, in the order in which they came, but for the first `skip`."""

    namespace: str
    skip: Count
    limit: Annotated[int, msgspec.Meta(ge=1, le=LISTED_AT_ONCE)]


class PinObjects(Message, frozen=True):
    """Pin those of these keys that are there, or all whose keys begin so; answered when the catalog has the pins.

    All of them, or none. See PinDocument.
    """

    namespace: str
    keys: Keys | None
    key_prefix: KeyPrefix | None
    tier: str
    ttl_seconds: float | None
    owner: str
    reason: str
    kind: str = "hard"
    refresh: str = "never"


class UnpinObjects(Message, frozen=True):
    """End the pins of these keys, or of all whose keys begin so; answered when the catalog has forgotten them."""

    namespace: str
    keys: Keys | None
    key_prefix: KeyPrefix | None


class ListNamespaces(Message, frozen=True):
    """The tenant's namespaces; or just one, which may have nothing."""

    namespace: str | None = None


class ClearNamespace(Message, frozen=True):
    """Forget all of its objects; answered when the catalog has. What is leased, pinned or being stored stays."""

    namespace: str


ObjectRequest = (
    BeginPut
    | CommitPut
    | AbortPut
    | GetObjects
    | ReleaseObjects
    | FindObjects
    | TouchObjects
    | DeleteObjects
    | ListObjects
    | PinObjects
    | UnpinObjects
    | ListNamespaces
    | ClearNamespace
)


class PutBegun(Message, frozen=True):
    """A slot for each object that is to be filled. One without a slot that is not refused is there already.

    Where there are no slots the put is over.
    """

    put: int
    slots: list[PartMessage | None]
    refused: Refusals = msgspec.field(default_factory=dict)


class PutEnded(Message, frozen=True):
    """All that had a seal are stored, but those refused."""

    refused: Refusals = msgspec.field(default_factory=dict)


class ObjectsLeased(Message, frozen=True):
    """Where those lie that are there: leased until ReleaseObjects."""

    lease: int
    slots: list[PartMessage | None]
    refused: Refusals = msgspec.field(default_factory=dict)


class ObjectsFound(Message, frozen=True):
    """The nearest tier of each, if any."""

    tiers: list[Line | None]


class ObjectsDeleted(Message, frozen=True):
    """Which were there, and are gone."""

    gone: list[bool]


class ObjectsListed(Message, frozen=True):
    """Keys, and how many bytes each has."""

    keys: list[bytes]
    sizes: list[Size]


class ObjectsCounted(Message, frozen=True):
    """How many were pinned, unpinned or deleted."""

    count: int


class Namespaces(Message, frozen=True):
    """Namespaces."""

    namespaces: list[NamespaceView]


ObjectReply = (
    PutBegun | PutEnded | ObjectsLeased | ObjectsFound | ObjectsDeleted | ObjectsListed | ObjectsCounted | Namespaces
)
