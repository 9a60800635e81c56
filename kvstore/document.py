"""Document: a tenant's named token sequence under one KVSpec; a manifest of ordered extents."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from .errors import InvalidName
from .extent import ExtentId

NAME_LIMIT: Final = 255


class DocumentId(NamedTuple):
    """A document's name within its tenant."""

    tenant: str
    name: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


class WritePolicy(StrEnum):
    """When a document's KV goes to NVMe."""

    AUTO = "auto"  # THROUGH if it is expected back, else BACK; decided at commit
    THROUGH = "write-through"  # at commit; durable soon after it is acknowledged
    BACK = "write-back"  # when DDR evicts it
    MEMORY = "memory-only"  # never; DDR eviction drops it


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A committed document. `extents` are in document order, layer group by layer group."""

    id: DocumentId
    fingerprint: bytes
    token_count: int
    extents: tuple[ExtentId, ...]
    write_policy: WritePolicy
    created_wall_ns: int


def checked_name(name: str, what: str = "document") -> str:
    """The name, if it may name a document or tenant. Raises InvalidName."""
    if not name or len(name.encode()) > NAME_LIMIT:
        raise InvalidName(f"a {what} name has 1 to {NAME_LIMIT} bytes, not {len(name.encode())}")
    if not name.isprintable() or name != name.strip() or "/" in name or name in (".", ".."):
        raise InvalidName(f"{what} name {name!r}: no slashes, control characters or outer spaces, nor one or two dots")
    return name
