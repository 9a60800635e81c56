"""Geometry: where a (layer, part, head, row) lies in a flat buffer.

One class describes canonical extents (planes padded to 4 KiB) and the shards in a rank's arena alike, so that
re-sharding is arithmetic between two geometries. Bytes only; it knows nothing of tensors.

Canonical order: for each layer the K plane, then the V plane; in a plane for each kv head; for each row; the dim.
A layer is contiguous (streaming), a head range in a plane is contiguous (TP), a token run is one run per head (CP).

A native extent keeps an engine's pages instead: one plane a layer, whose rows are pages. What lies in a page is not
known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .spec import KVSpec

PLANE_ALIGN_BYTES: Final = 4096  # one layer is one aligned direct read


def _round_up(value: int, align: int) -> int:
    return -(-value // align) * align


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A buffer of `layers` x (key, value) planes of `heads` x `rows` x row bytes, each padded to `align`.

    A part with row size 0 (the value part of MLA) has no plane. `first_layer` is the buffer's first, where it holds
    some layers of an extent only.
    """

    layers: int
    heads: int
    rows: int
    key_bytes: int
    value_bytes: int
    align: int = 1
    first_layer: int = 0

    @property
    def parts(self) -> int:
        """Planes per layer: 2, or 1 for a latent cache."""
        return 2 if self.value_bytes else 1

    @property
    def plane_count(self) -> int:
        """Planes in the buffer, in canonical order: layer-major, key before value."""
        return self.layers * self.parts

    def row_bytes(self, part: int) -> int:
        """Bytes of one head's row in the key (0) or value (1) plane."""
        assert part in (0, 1), part
        return self.value_bytes if part else self.key_bytes

    def plane_bytes(self, part: int) -> int:
        """Bytes of a plane, padding included."""
        return _round_up(self.heads * self.rows * self.row_bytes(part), self.align)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer: its planes, padding included."""
        return sum(self.plane_bytes(part) for part in range(self.parts))

    @property
    def size_bytes(self) -> int:
        """Bytes of the buffer."""
        return self.layers * self.layer_bytes

    def plane_offset(self, layer: int, part: int) -> int:
        """Where a plane begins."""
        assert self.first_layer <= layer < self.first_layer + self.layers, layer
        assert 0 <= part < self.parts, part
        return (layer - self.first_layer) * self.layer_bytes + (self.plane_bytes(0) if part else 0)

    def offset(self, layer: int, part: int, head: int, row: int) -> int:
        """Where a row begins."""
        assert 0 <= head < self.heads, head
        assert 0 <= row < self.rows, row
        return self.plane_offset(layer, part) + (head * self.rows + row) * self.row_bytes(part)

    def planes(self, layer_start: int, layer_stop: int) -> list[tuple[int, int, int]]:
        """(plane index, offset, size) of the planes of layers [layer_start, layer_stop)."""
        assert self.first_layer <= layer_start <= layer_stop <= self.first_layer + self.layers
        return [
            ((layer - self.first_layer) * self.parts + part, self.plane_offset(layer, part), self.plane_bytes(part))
            for layer in range(layer_start, layer_stop)
            for part in range(self.parts)
        ]


def extent_geometry(spec: KVSpec, group: int = 0) -> Geometry:
    """Geometry of an extent of one layer group: full-capacity strides, so appending moves nothing.

    That of a native extent has one head, and a page in each row.
    """
    shape = spec.groups[group]
    if spec.page_format:
        return Geometry(
            layers=len(shape.layers),
            heads=1,
            rows=spec.extent_blocks,
            key_bytes=spec.page_bytes(group),
            value_bytes=0,
            align=PLANE_ALIGN_BYTES,
        )
    return Geometry(
        layers=len(shape.layers),
        heads=shape.kv_heads,
        rows=spec.extent_tokens,
        key_bytes=shape.key_dim * spec.element_bytes,
        value_bytes=shape.value_dim * spec.element_bytes,
        align=PLANE_ALIGN_BYTES,
    )


def arena_geometry(spec: KVSpec, rows: int, tp: int = 1, group: int = 0) -> Geometry:
    """Geometry of a rank's HBM arena for one layer group: `rows` token rows of the rank's share of heads."""
    shape = spec.groups[group]
    return Geometry(
        layers=len(shape.layers),
        heads=max(1, shape.kv_heads // tp),
        rows=rows,
        key_bytes=shape.key_dim * spec.element_bytes,
        value_bytes=shape.value_dim * spec.element_bytes,
    )
