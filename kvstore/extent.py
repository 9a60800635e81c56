"""Extent: a run of blocks for one layer group, the unit that is stored, moved and evicted.

Identity only; where its copies are is residency's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .geometry import extent_geometry
from .spec import KVSpec

ExtentId = str  # hex of the key of its last block, then ":" and the layer group's index


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """`valid_tokens` tokens from document position `start`, of one layer group.

    The id is made from the chained key of the last block, so it names the whole prefix: two documents with a common
    prefix share extents, and each extent has exactly one `previous`. `block_keys` are its blocks' keys, one
    after another: packed, because there are many.
    """

    id: ExtentId
    tenant: str
    fingerprint: bytes
    group: int
    start: int
    valid_tokens: int
    previous: ExtentId | None
    block_keys: bytes
    slot_bytes: int

    @property
    def stop(self) -> int:
        """Document position behind the last token."""
        return self.start + self.valid_tokens


def extent_count(token_count: int, spec: KVSpec) -> int:
    """How many extents that many tokens make, over all layer groups."""
    return len(spec.groups) * -(-token_count // spec.extent_tokens)


def within(ids: Sequence[ExtentId], start: int, stop: int, spec: KVSpec) -> list[ExtentId]:
    """Of a document's extents those that hold any of its tokens [start, stop), group by group."""
    step, first, last = len(ids) // len(spec.groups), start // spec.extent_tokens, -(-stop // spec.extent_tokens)
    return [extent for front in range(0, len(ids), step) for extent in ids[front + first : front + last]]


def named(ids: Sequence[ExtentId], token_count: int, spec: KVSpec, tenant: str) -> tuple[Extent, ...]:
    """The extents of a document of which only their ids are left: as `cut` makes them, without their block keys."""
    keys = [bytes(1)] * -(-token_count // spec.block_tokens)
    extents = cut(keys, token_count, spec, tenant)
    assert len(extents) == len(ids), "a manifest has one id per extent"
    found: list[Extent] = []
    for extent, name in zip(extents, ids, strict=True):
        previous = found[-1].id if extent.previous is not None else None
        found.append(replace(extent, id=name, previous=previous, block_keys=b""))
    return tuple(found)


def cut(keys: Sequence[bytes], token_count: int, spec: KVSpec, tenant: str) -> tuple[Extent, ...]:
    """The extents of a token sequence with these block keys, group by group, each in document order."""
    extents = []
    fingerprint = spec.fingerprint()
    step = spec.extent_blocks
    for group in range(len(spec.groups)):
        slot_bytes = extent_geometry(spec, group).size_bytes
        previous = None
        for first in range(0, len(keys), step):
            block_keys = keys[first : first + step]
            start = first * spec.block_tokens
            extent = Extent(
                id=f"{block_keys[-1].hex()}:{group}",
                tenant=tenant,
                fingerprint=fingerprint,
                group=group,
                start=start,
                valid_tokens=min(token_count - start, spec.extent_tokens),
                previous=previous,
                block_keys=b"".join(block_keys),
                slot_bytes=slot_bytes,
            )
            extents.append(extent)
            previous = extent.id
    return tuple(extents)
