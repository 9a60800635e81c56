"""Seal: the checksums of a buffer's planes, packed: eight bytes a plane, little-endian xxh3_64, in canonical order.

Packed because there are many: as Python integers the seals of 100,000 extents would take a quarter of a GiB.
"""

from __future__ import annotations

from typing import Final

from xxhash import xxh3_64_intdigest

from .geometry import Geometry

CHECKSUM_BYTES: Final = 8


def checksum(plane: memoryview | bytes) -> bytes:
    """The packed checksum of one plane, padding included."""
    return xxh3_64_intdigest(plane).to_bytes(CHECKSUM_BYTES, "little")


def seal_planes(content: memoryview | bytes, geometry: Geometry) -> bytes:
    """The seal of a whole buffer: `geometry.plane_count` checksums."""
    planes = geometry.planes(0, geometry.layers)
    return b"".join(checksum(content[offset : offset + size]) for _, offset, size in planes)


def sealed_as(seal: bytes, plane: int) -> bytes:
    """The checksum that a seal holds for that plane."""
    return seal[plane * CHECKSUM_BYTES : (plane + 1) * CHECKSUM_BYTES]
