"""Verify: an extent on NVMe, read again and compared with its seal, without a place in DDR."""

from __future__ import annotations

import mmap

from .errors import CorruptExtent
from .geometry import Geometry
from .seal import checksum, sealed_as
from .segments import Segments
from .slots import Slot


def verify(segments: Segments, slot: Slot, geometry: Geometry, seal: bytes) -> None:
    """Read every plane and compare it. Raises CorruptExtent or StorageFailed."""
    # Aligned, as direct reads need it.
    with mmap.mmap(-1, geometry.size_bytes) as buffer, memoryview(buffer) as content:
        segments.read(slot, 0, content)
        for plane, offset, size in geometry.planes(0, geometry.layers):
            found, sealed = checksum(content[offset : offset + size]), sealed_as(seal, plane)
            if found != sealed:
                raise CorruptExtent(
                    f"segment {slot.slab}, offset {slot.offset + offset}, plane {plane}: "
                    f"checksum {found.hex()}, sealed as {sealed.hex()}"
                )
