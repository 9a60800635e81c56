"""Verify: an extent on NVMe, read again and compared with its seal, without a place in DDR."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

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
        compare(slot, geometry.planes(0, geometry.layers), content, seal)


def compare(slot: Slot, planes: Sequence[tuple[int, int, int]], content: memoryview, seal: bytes) -> None:
    """Compare adjacent planes (index, offset, bytes) of a slot, read into `content`. Raises CorruptExtent."""
    first = planes[0][1]
    for plane, offset, size in planes:
        found, sealed = checksum(content[offset - first : offset - first + size]), sealed_as(seal, plane)
        if found != sealed:
            raise CorruptExtent(
                f"segment {slot.slab}, offset {slot.offset + offset}, plane {plane}: "
                f"checksum {found.hex()}, sealed as {sealed.hex()}"
            )
