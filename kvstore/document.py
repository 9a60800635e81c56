"""Document: a tenant's named token sequence under one KVSpec; a manifest of ordered extents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, NamedTuple

from .errors import InvalidName, InvalidRequest
from .extent import ExtentId

NAME_LIMIT: Final = 255
PROMPT: Final = "prompt"  # the namespace of prefixes that nobody has named
TTL_SECONDS_MAX: Final = 1e9  # thirty years


class DocumentId(NamedTuple):
    """A document's name within its tenant; `namespace/key` of one that no user has named."""

    tenant: str
    name: str

    @property
    def namespace(self) -> str | None:
        """Of an unnamed document, which is one that no user can name so. None of one that has a user's name."""
        namespace, slash, _ = self.name.rpartition("/")
        return namespace if slash else None

    @property
    def family(self) -> str:
        """Those whose documents come back, or do not, alike: a tenant's, and those of each of its namespaces."""
        namespace = self.namespace
        return self.tenant if namespace is None else f"{self.tenant}/{namespace}"

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


def is_named(document: str) -> bool:
    """Whether a DocumentId that was written out has a user's name."""
    return document.count("/") == 1


def prompt_id(tenant: str, key: bytes) -> DocumentId:
    """The unnamed prefix whose last block has this key."""
    return DocumentId(tenant, f"{PROMPT}/{key.hex()}")


class WritePolicy(StrEnum):
    """When a document's KV goes to NVMe."""

    AUTO = "auto"  # THROUGH if it is expected back, else BACK; decided at commit
    THROUGH = "write-through"  # at commit; durable soon after it is acknowledged
    BACK = "write-back"  # when DDR evicts it
    MEMORY = "memory-only"  # never; DDR eviction drops it


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A committed document. `extents` are in document order, layer group by layer group.

    It is deleted at `expires_wall_ns`, or as soon after as nobody needs it (see expiry); None: never.
    """

    id: DocumentId
    fingerprint: bytes
    token_count: int
    extents: tuple[ExtentId, ...]
    write_policy: WritePolicy
    created_wall_ns: int
    expires_wall_ns: int | None = None

    def expired(self, wall_ns: int) -> bool:
        """Whether its time is up."""
        return self.expires_wall_ns is not None and self.expires_wall_ns <= wall_ns


def ttl_ns_of(ttl_seconds: float | None) -> int | None:
    """A time to live in nanoseconds; None: without end. Raises InvalidRequest."""
    if ttl_seconds is None:
        return None
    if not 0 < ttl_seconds <= TTL_SECONDS_MAX:  # refuses NaN too
        raise InvalidRequest(f"ttl_seconds lies between 0 and {TTL_SECONDS_MAX:g}, not {ttl_seconds}")
    return max(1, int(ttl_seconds * 1_000_000_000))


def dated(document: Document, known: Document | None, ttl_ns: int | None, wall_ns: int) -> Document:
    """The document, published now with that time to live; without one it keeps what its name had and is not over."""
    if ttl_ns is not None:
        return replace(document, expires_wall_ns=wall_ns + ttl_ns)
    kept = known.expires_wall_ns if known is not None and not known.expired(wall_ns) else None
    return replace(document, expires_wall_ns=kept)


def checked_name(name: str, what: str = "document") -> str:
    """The name, if it may name a document or tenant. Raises InvalidName."""
    if not name or len(name.encode()) > NAME_LIMIT:
        raise InvalidName(f"a {what} name has 1 to {NAME_LIMIT} bytes, not {len(name.encode())}")
    if not name.isprintable() or name != name.strip() or "/" in name or name in (".", ".."):
        raise InvalidName(
            f"{what} name {name!r}: no slashes (a tenant is named apart), control characters or outer spaces, "
            "nor one or two dots"
        )
    return name
