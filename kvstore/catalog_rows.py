"""Catalog rows: values as the rows of the catalog's tables, in the order of their columns, and back.

What is no row of ours raises ValueError, TypeError, msgspec.MsgspecError or InvalidSpec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from .audit import StoredExtent
from .claims import Pin, PinKind, Refresh
from .document import Document, DocumentId, WritePolicy
from .extent import Extent
from .keys import KEY_BYTES
from .orders import DropExtent, DropPin, PutPrefills, Record
from .prefills import Prefill
from .residency import Tier
from .seal import CHECKSUM_BYTES
from .slots import Slot
from .spec import KVSpec

EXTENT_COLUMNS: Final = """id, tenant, fingerprint, layer_group, start, valid_tokens, previous, block_keys, slot_bytes,
    segment, segment_offset"""  # all but the seal, which is read when it is needed

Row = tuple[Any, ...]  # what SQLite gives and takes: one value per column


def spec_of(row: Row) -> KVSpec:
    """A model's spec."""
    fingerprint, text = row
    spec = msgspec.json.decode(text, type=KVSpec)
    if spec.fingerprint() != fingerprint:
        raise ValueError(f"the spec of {spec.model!r} has another fingerprint")
    return spec


def prefills_of(row: Row) -> PutPrefills:
    """What its prefills took."""
    fingerprint, points = row
    return PutPrefills(bytes(fingerprint), msgspec.msgpack.decode(points, type=tuple[Prefill, ...]))


def extent_row(extent: Extent, checksums: bytes, slot: Slot) -> Row:
    """An extent, its seal and its slot."""
    assert slot.size_bytes == extent.slot_bytes, "an extent fills its slot"
    return (
        extent.id,
        extent.tenant,
        extent.fingerprint,
        extent.group,
        extent.start,
        extent.valid_tokens,
        extent.previous,
        extent.block_keys,
        extent.slot_bytes,
        checksums,
        slot.slab,
        slot.offset,
    )


def extent_of(row: Row) -> tuple[Extent, Slot]:
    """The extent of EXTENT_COLUMNS, and its slot."""
    *identity, keys, slot_bytes, segment, offset = row
    extent_id, tenant, fingerprint, group, start, valid_tokens, previous = identity
    if not isinstance(keys, bytes) or len(keys) % KEY_BYTES:
        raise ValueError(f"extent {extent_id} has no block keys")
    extent = Extent(
        id=extent_id,
        tenant=tenant,
        fingerprint=fingerprint,
        group=group,
        start=start,
        valid_tokens=valid_tokens,
        previous=previous,
        block_keys=keys,
        slot_bytes=slot_bytes,
    )
    return extent, Slot(segment, offset, slot_bytes)


def document_row(document: Document) -> Row:
    """A document."""
    return (
        document.id.tenant,
        document.id.name,
        document.fingerprint,
        document.token_count,
        msgspec.msgpack.encode(document.extents),
        document.write_policy.value,
        document.created_wall_ns,
        document.expires_wall_ns,
    )


def document_of(row: Row, share: Callable[[str], str]) -> Document:
    """The document; `share` makes equal extent ids one object."""
    tenant, name, fingerprint, token_count, extents, write_policy, created_wall_ns, expires_wall_ns = row
    return Document(
        id=DocumentId(tenant, name),
        fingerprint=fingerprint,
        token_count=token_count,
        extents=tuple(map(share, msgspec.msgpack.decode(extents, type=tuple[str, ...]))),
        write_policy=WritePolicy(write_policy),
        created_wall_ns=created_wall_ns,
        expires_wall_ns=expires_wall_ns,
    )


def pin_row(pin: Pin) -> Row:
    """A pin."""
    return (
        pin.document.tenant,
        pin.document.name,
        int(pin.floor),
        pin.size_bytes,
        pin.owner,
        pin.reason,
        pin.created_wall_ns,
        pin.expires_wall_ns,
        pin.kind.value,
        pin.ttl_ns,
        pin.refresh.value,
    )


def pin_of(row: Row) -> Pin:
    """The pin."""
    tenant, name, floor, size_bytes, owner, reason, created_wall_ns, expires_wall_ns, kind, ttl_ns, refresh = row
    return Pin(
        document=DocumentId(tenant, name),
        floor=Tier(floor),
        size_bytes=size_bytes,
        owner=owner,
        reason=reason,
        created_wall_ns=created_wall_ns,
        expires_wall_ns=expires_wall_ns,
        kind=PinKind(kind),
        ttl_ns=ttl_ns,
        refresh=Refresh(refresh),
    )


def stored_of(row: Row) -> StoredExtent:
    """The extent of EXTENT_COLUMNS and its seal, every value of the type it should have."""
    *columns, seal = row
    extent, slot = extent_of(tuple(columns))
    numbers = (*slot, extent.group, extent.start, extent.valid_tokens)
    if any(not isinstance(n, int) for n in numbers) or slot.size_bytes < 1:  # SQLite keeps any type in any column
        raise ValueError("a column holds a value of another type")
    if not isinstance(seal, bytes) or len(seal) % CHECKSUM_BYTES:
        raise ValueError(f"extent {extent.id} has no seal")
    return StoredExtent(extent, seal, slot)


# For an audit: a table's columns, how many of them are its key, how a row is read, what drops it (if it may be lost).
READERS: Final[dict[str, tuple[str, int, Callable[[Row], object], Callable[[Row], Record | None]]]] = {
    "specs": ("*", 1, spec_of, lambda _: None),
    "extents": (f"{EXTENT_COLUMNS}, checksums", 1, stored_of, lambda row: DropExtent(row[0])),
    "documents": ("*", 2, lambda row: document_of(row, str), lambda _: None),
    "pins": ("*", 2, pin_of, lambda row: DropPin(row[0], row[1])),
}
