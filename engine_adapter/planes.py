"""Planes: the extents of a run as numpy arrays over shared memory, side by side with token-major arrays.

Canonical and native extents are looked at alike: native pages through the strides of their format.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np

from ..kvstore.errors import InvalidRequest
from ..kvstore.geometry import extent_geometry
from ..kvstore.runs import RunMessage
from ..kvstore.spec import KVSpec
from .pages import Array, key_value, page_format

NUMPY_DTYPES: Final = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
}


class Cut(NamedTuple):
    """Tokens [start, stop) of a document, in `extents` consecutive extents from number `first` on, at row `row`.

    Either some rows of one extent, or all rows of several.
    """

    first: int
    extents: int
    row: int
    start: int
    stop: int


class Planes:
    """A run of extents of a layer group of this model. `content` are the run's bytes."""

    def __init__(self, run: RunMessage, spec: KVSpec, content: memoryview) -> None:
        self.run = run
        self.geometry = extent_geometry(spec, run.group)
        self.content = content
        self._spec = spec

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its elements, as numpy has them."""
        return np.dtype(NUMPY_DTYPES[self._spec.dtype])

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(kv heads, dim) of its keys and of its values. MLA has no values: their dim is 0."""
        group = self._spec.groups[self.run.group]
        return (group.kv_heads, group.key_dim), (group.kv_heads, group.value_dim)

    @cached_property
    def pages(self) -> Array:
        """A native run's pages: [extents, layers, pages, elements], without a copy."""
        assert self._spec.page_format, "canonical extents have no pages"
        run, geometry, size = self.run, self.geometry, self.dtype.itemsize
        shape = (run.count, geometry.layers, geometry.rows, geometry.key_bytes // size)
        strides = (run.slot_bytes, geometry.layer_bytes, geometry.key_bytes, size)
        return np.ndarray(shape, self.dtype, buffer=self.content, strides=strides)

    @cached_property
    def _arrays(self) -> tuple[Array, Array]:
        """Its key and value planes without a copy: [extents, layers, kv heads, rows, dim] each.

        Those of native extents have pages before heads, and rows of a page.
        """
        run, geometry, dtype = self.run, self.geometry, self.dtype
        if self._spec.page_format:
            return key_value(page_format(self._spec, run.group), self.pages)
        arrays = []
        for part in (0, 1):
            row_bytes = geometry.row_bytes(part)
            shape = (run.count, geometry.layers, geometry.heads, geometry.rows, row_bytes // dtype.itemsize)
            if not row_bytes:
                arrays.append(np.empty(shape, dtype))
                continue
            strides = (run.slot_bytes, geometry.layer_bytes, geometry.rows * row_bytes, row_bytes, dtype.itemsize)
            offset = geometry.plane_offset(0, part)
            arrays.append(np.ndarray(shape, dtype, buffer=self.content, offset=offset, strides=strides))
        return arrays[0], arrays[1]

    def cuts(self, start: int, stop: int) -> Iterator[Cut]:
        """What of tokens [start, stop) lies here, as few cuts, in order."""
        run = self.run
        position, stop = max(start, run.start), min(stop, run.stop)
        while position < stop:
            first, row = divmod(position - run.start, run.step)
            count = (stop - position) // run.step if not row else 0
            upto = position + count * run.step if count else min(stop, run.start + (first + 1) * run.step)
            yield Cut(first, max(count, 1), row, position, upto)
            position = upto

    def extent(self, index: int) -> Cut:
        """All rows of one extent."""
        start = self.run.start + index * self.run.step
        return Cut(index, 1, 0, start, min(start + self.run.step, self.run.stop))

    def clipped(self, index: int, start: int, stop: int) -> Cut:
        """The rows of one extent that hold tokens [start, stop)."""
        cut = self.extent(index)
        low, high = max(start, cut.start), min(stop, cut.stop)
        return Cut(index, 1, low - cut.start, low, high)

    def beside(self, part: int, layer: int, cut: Cut, array: Array) -> Iterator[tuple[Array, Array]]:
        """Pairs of equal views that cover a cut: of one layer's key (0) or value (1) planes, and of the caller's array.

        `array` is [kv heads, tokens of the cut, dim]. A pair is copied in whichever direction.
        """
        planes = self._arrays[part][cut.first : cut.first + cut.extents, layer]
        if not self._spec.page_format:
            rows = (cut.stop - cut.start) // cut.extents
            yield planes[:, :, cut.row : cut.row + rows], _split(array, cut.extents).transpose(1, 0, 2, 3)
            return
        page_tokens = self._spec.block_tokens
        done = 0
        while done < array.shape[1]:
            page, row = divmod(cut.row + done, page_tokens)
            whole = (array.shape[1] - done) // page_tokens if not row else 0
            if whole:  # of several extents all pages, of one extent those that lie in the cut
                inside = _split(array[:, done : done + whole * page_tokens], whole)
                pages = whole // cut.extents
                inside = inside.reshape((inside.shape[0], cut.extents, pages, *inside.shape[2:]), copy=False)
                yield planes[:, page : page + pages], inside.transpose(1, 2, 0, 3, 4)
                done += whole * page_tokens
            else:
                count = min(page_tokens - row, array.shape[1] - done)
                yield planes[0, page, :, row : row + count], array[:, done : done + count]
                done += count

    def of_cut(self, part: int, layer: int, cut: Cut) -> Array:
        """The rows of a cut of one extent: [kv heads, rows, dim]. A view; of native pages a copy."""
        assert cut.extents == 1, cut
        if not self._spec.page_format:
            return self._arrays[part][cut.first, layer, :, cut.row : cut.row + cut.stop - cut.start]
        heads, dim = self.shapes[part]
        array = np.empty((heads, cut.stop - cut.start, dim), self.dtype)
        for ours, theirs in self.beside(part, layer, cut, array):
            np.copyto(theirs, ours)
        return array

    def native_pages(self, layer: int, start: int, stop: int) -> Iterator[tuple[int, Array]]:
        """The pages that hold any of tokens [start, stop), in order, in as few pieces as can be.

        Each is (number of its first page in the document, raw bytes [extents, pages of each, page bytes]), a view.
        Raises InvalidRequest for canonical KV.
        """
        if not self._spec.page_format:
            raise InvalidRequest("this document is stored in canonical form; it has no pages")
        page_tokens = self._spec.block_tokens
        for cut in self.cuts(start, stop):
            each = (cut.stop - cut.start) // cut.extents
            first, upto = cut.row // page_tokens, -(-(cut.row + each) // page_tokens)
            pages = self.pages[cut.first : cut.first + cut.extents, layer, first:upto]
            yield (cut.start - cut.row) // page_tokens + first, pages.view(np.uint8)

    def plane(self, extent: int, layer: int, part: int) -> memoryview:
        """The bytes of one plane, padding included."""
        offset = extent * self.run.slot_bytes + self.geometry.plane_offset(layer, part)
        return self.content[offset : offset + self.geometry.plane_bytes(part)]


def _split(array: Array, count: int) -> Array:
    """A view of [kv heads, tokens, dim] as [kv heads, count, tokens of each, dim]."""
    heads, tokens, dim = array.shape
    # A view or an error, never a copy that writes would be lost in.
    return array.reshape((heads, count, tokens // count, dim), copy=False)
