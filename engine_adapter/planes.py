"""Planes: the extents of a run as numpy arrays over shared memory, and copies between them and token-major arrays."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..kvstore.geometry import Geometry
from ..kvstore.runs import RunMessage

Array = npt.NDArray[Any]
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
    """A run of extents of a layer group with this geometry. `content` are the run's bytes."""

    def __init__(self, run: RunMessage, geometry: Geometry, dtype: str, content: memoryview) -> None:
        self.run = run
        self.geometry = geometry
        self.content = content
        self._dtype = dtype

    @cached_property
    def arrays(self) -> tuple[Array, Array]:
        """Its key and value planes: [extents, layers, kv heads, rows, dim] each, without a copy.

        MLA has no values: their dim is 0.
        """
        run, geometry = self.run, self.geometry
        dtype = np.dtype(NUMPY_DTYPES[self._dtype])
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

    def at(self, part: int, layer: int, cut: Cut) -> Array:
        """The rows of a cut in one layer's key (0) or value (1) planes: [extents, kv heads, rows, dim]."""
        rows = (cut.stop - cut.start) // cut.extents
        return self.arrays[part][cut.first : cut.first + cut.extents, layer, :, cut.row : cut.row + rows]

    def plane(self, extent: int, layer: int, part: int) -> memoryview:
        """The bytes of one plane, padding included."""
        offset = extent * self.run.slot_bytes + self.geometry.plane_offset(layer, part)
        return self.content[offset : offset + self.geometry.plane_bytes(part)]


def in_extents(array: Array, count: int) -> Array:
    """A view of [kv heads, tokens, dim] as `count` extents: [extents, kv heads, rows, dim]."""
    heads, tokens, dim = array.shape
    # A view or an error, never a copy that writes would be lost in.
    return array.reshape((heads, count, tokens // count, dim), copy=False).transpose(1, 0, 2, 3)
