"""Paging: native extents to and from the rows of a rank's arena, through canonical memory of their own.

One layer of one extent at a time, and of it only the pages and heads that the copies touch: so this memory stays small,
and a layer can be used before the next is decoded. The arena sees canonical extents only, wherever its rows are; for a
device that the CPU cannot address it is the host that decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..kvstore.geometry import Geometry, extent_geometry
from ..kvstore.layout import Copy
from ..kvstore.spec import KVSpec
from .pages import Array, key_value, page_format
from .planes import NUMPY_DTYPES

Buffers = Mapping[int, memoryview]


class Arena(Protocol):
    """A rank's memory: see ring_attention.arena.HBMArena."""

    @property
    def rows(self) -> int:
        """Token rows."""
        ...

    def load(
        self, copies: Sequence[Copy], buffers: Buffers, geometry: Geometry, layer_start: int, layer_stop: int
    ) -> None:
        """Fill rows from extents of this geometry."""
        ...

    def save(
        self, copies: Sequence[Copy], buffers: Buffers, geometry: Geometry, layer_start: int, layer_stop: int
    ) -> None:
        """Fill extents of this geometry from rows."""
        ...

    def forget(self, slab: memoryview) -> None:
        """The slab is about to be unmapped: let go of what was made of it."""
        ...


class Paging:
    """Moves extents of one native spec that has one layer group."""

    def __init__(self, spec: KVSpec) -> None:
        """Raises UnknownPageFormat."""
        self._format = page_format(spec)
        self._extent = extent_geometry(spec)
        self._dtype = np.dtype(NUMPY_DTYPES[spec.dtype])
        self._memory = np.empty(self._extent.layer_bytes, np.uint8)  # no box is larger

    def load(self, arena: Arena, copies: Sequence[Copy], buffers: Buffers, layer: int) -> None:
        """Fill arena rows (the copies' target) from native extents (their source), for one layer."""
        for buffer, own in _by_extent(copies):
            box = self._box(own, layer)
            for canonical, native in zip(box.canonical, self._within(box, buffers[buffer], layer), strict=True):
                np.copyto(canonical, native)
            arena.load(box.copies, {buffer: box.content.data}, box.geometry, layer, layer + 1)

    def save(self, arena: Arena, copies: Sequence[Copy], buffers: Buffers, layer: int) -> None:
        """Fill native extents (the copies' target, writable) from arena rows (their source), for one layer.

        Nothing else is written: of the same pages other ranks write other tokens, or other heads.
        """
        for buffer, own in _by_extent([copy.reversed() for copy in copies]):
            box = self._box(own, layer)
            moves = [copy.reversed() for copy in box.copies]
            arena.save(moves, {buffer: box.content.data}, box.geometry, layer, layer + 1)
            for canonical, native in zip(box.canonical, self._within(box, buffers[buffer], layer), strict=True):
                for page, heads, tokens in self._filled(box.copies):
                    native[page, heads, tokens] = canonical[page, heads, tokens]

    def _box(self, copies: Sequence[Copy], layer: int) -> _Box:
        form, tokens, element_bytes = self._format, self._format.tokens, self._dtype.itemsize
        page = min(copy.source_row for copy in copies) // tokens
        pages = -(-max(copy.source_row + copy.row_count for copy in copies) // tokens) - page
        head = min(copy.source_head for copy in copies)
        geometry = Geometry(
            layers=1,
            heads=max(copy.source_head + copy.head_count for copy in copies) - head,
            rows=pages * tokens,
            key_bytes=form.key_dim * element_bytes,
            value_bytes=form.value_dim * element_bytes,
            first_layer=layer,
        )
        moved = [
            replace(copy, source_row=copy.source_row - page * tokens, source_head=copy.source_head - head)
            for copy in copies
        ]
        return _Box(page, pages, head, geometry, moved, self._memory[: geometry.size_bytes], self._dtype)

    def _within(self, box: _Box, buffer: memoryview, layer: int) -> list[Array]:
        """Keys and values of the box in an extent's pages: views [pages, heads, tokens, dim]."""
        extent, elements = self._extent, self._format.elements
        offset = extent.plane_offset(layer, 0)
        pages = np.frombuffer(buffer, self._dtype, extent.rows * elements, offset).reshape(extent.rows, elements)
        heads = slice(box.head, box.head + box.geometry.heads)
        both = key_value(self._format, pages[box.page : box.page + box.pages])
        return [view[:, heads] for view in both[: box.geometry.parts]]

    def _filled(self, copies: Sequence[Copy]) -> Iterator[tuple[int, slice, slice]]:
        """What copies cover of a box, page by page: (page, heads, tokens of the page)."""
        size = self._format.tokens
        for copy in copies:
            heads = slice(copy.source_head, copy.source_head + copy.head_count)
            row, stop = copy.source_row, copy.source_row + copy.row_count
            while row < stop:
                page, token = divmod(row, size)
                upto = min(size, token + stop - row)
                yield page, heads, slice(token, upto)
                row += upto - token


class _Box:
    """Canonical memory for the pages and heads of one layer of an extent that some copies touch.

    `copies` are told from its first head and row. `canonical` are its keys and values: [pages, heads, tokens, dim].
    """

    def __init__(
        self,
        page: int,
        pages: int,
        head: int,
        geometry: Geometry,
        copies: list[Copy],
        content: npt.NDArray[np.uint8],
        dtype: np.dtype[np.generic],
    ) -> None:
        self.page = page
        self.pages = pages
        self.head = head
        self.geometry = geometry
        self.copies = copies
        self.content = content
        self.canonical: list[Array] = []
        for _, offset, size in geometry.planes(geometry.first_layer, geometry.first_layer + 1):
            plane = self.content[offset : offset + size].view(dtype)
            shape = (geometry.heads, pages, geometry.rows // pages, plane.size // (geometry.heads * geometry.rows))
            self.canonical.append(plane.reshape(shape).transpose(1, 0, 2, 3))


def _by_extent(copies: Sequence[Copy]) -> Iterator[tuple[int, list[Copy]]]:
    """Copies by the extent that is their source."""
    for buffer, own in groupby(sorted(copies, key=lambda copy: copy.source), key=lambda copy: copy.source):
        yield buffer, list(own)
