"""Writer: fills the slots of an open ingest in place, and seals each plane as soon as it is complete.

Sealing runs beside the writing, on a thread of its own, a little behind it: the planes are still in the CPU's cache.
Neither copying nor hashing holds the interpreter's lock.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt

from ..kvstore.client import Client
from ..kvstore.errors import InvalidRequest
from ..kvstore.geometry import extent_geometry
from ..kvstore.seal import CHECKSUM_BYTES, checksum
from ..kvstore.spec import KVSpec
from ..kvstore.wire import IngestOpened
from .planes import NUMPY_DTYPES, Array, Cut, Planes, in_extents

SEAL_BATCH_BYTES: Final = 4 << 20  # much less than a cache, much more than handing it over costs


class _Target:
    """A run of extents to fill: which tokens of which layers are written, and the seals made so far."""

    def __init__(self, planes: Planes) -> None:
        self.planes = planes
        self.written: npt.NDArray[np.bool_] = np.zeros(
            (planes.geometry.layers, planes.run.stop - planes.run.start), dtype=bool
        )
        self.seal_bytes = planes.geometry.plane_count * CHECKSUM_BYTES
        self.sealed = bytearray(planes.run.count * self.seal_bytes)

    def write(self, layer: int, cut: Cut, array: Array, part: int) -> None:
        """Fill a cut's rows of one plane kind from [kv heads, tokens of the cut, dim]."""
        np.copyto(self.planes.at(part, layer, cut), in_extents(array, cut.extents))

    def mark(self, layer: int, cut: Cut) -> list[tuple[int, int]]:
        """Note a cut as written; returns the (extent, layer) that are complete now."""
        run = self.planes.run
        written = self.written[layer]
        written[cut.start - run.start : cut.stop - run.start] = True
        extents = range(cut.first, cut.first + cut.extents)
        if cut.extents == 1:
            first = cut.first * run.step
            return [(e, layer) for e in extents if written[first : first + run.step].all()]
        return [(extent, layer) for extent in extents]

    def seal(self, extent: int, layer: int) -> None:
        """Make the checksums of one layer of an extent."""
        parts = self.planes.geometry.parts
        for part in range(parts):
            at = extent * self.seal_bytes + (layer * parts + part) * CHECKSUM_BYTES
            self.sealed[at : at + CHECKSUM_BYTES] = checksum(self.planes.plane(extent, layer, part))

    def seals(self) -> list[bytes]:
        """One per extent."""
        size = self.seal_bytes
        return [bytes(self.sealed[n * size : (n + 1) * size]) for n in range(self.planes.run.count)]


class IngestWriter:
    """An open ingest: write the KV of every missing token of every layer, then leave the `with` block to publish."""

    def __init__(self, client: Client, spec: KVSpec, opened: IngestOpened, token_count: int) -> None:
        self._spec = spec
        self._token_count = token_count
        self._released = False
        self._opened = opened
        views = client.views(opened.runs)
        geometries = [extent_geometry(spec, group) for group in range(len(spec.groups))]
        self._targets = [
            _Target(Planes(run, geometries[run.group], spec.dtype, view))
            for run, view in zip(opened.runs, views, strict=True)
        ]
        self._places = {
            layer: (number, position)
            for number, group in enumerate(spec.groups)
            for position, layer in enumerate(group.layers)
        }
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="holdfast-sealer")
        self._complete: list[tuple[_Target, int, int]] = []  # to be handed over
        self._complete_bytes = 0
        self._sealing: list[Future[None]] = []

    @property
    def cached_tokens(self) -> int:
        """Leading tokens whose KV the store has already."""
        return self._opened.cached_tokens

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Token ranges [start, stop) to write, one per extent, in order."""
        return sorted({(part.start, part.start + part.valid_tokens) for part in self._opened.parts})

    def write(self, layer: int, start: int, key: Array, value: Array) -> None:
        """Store one layer's KV of tokens [start, start + n): [kv heads, n, dim]. What is stored already is skipped.

        Raises InvalidRequest when the layer, the shape or the dtype is not the model's, when the tokens are not the
        document's, and when the block has ended.
        """
        if self._released:
            raise InvalidRequest("this ingest has ended; write inside its block")
        if layer not in self._places:
            raise InvalidRequest(f"layer {layer} is not in this model")
        number, position = self._places[layer]
        self._check(number, key, value)
        stop = start + key.shape[1]
        if not 0 <= start <= stop <= self._token_count:
            raise InvalidRequest(f"tokens [{start}, {stop}) are not in this document of {self._token_count} tokens")
        for target in self._targets:
            if target.planes.run.group != number:
                continue
            for cut in target.planes.cuts(start, stop):
                for part, array in enumerate((key, value)):
                    target.write(position, cut, array[:, cut.start - start : cut.stop - start], part)
                self._seal(target, target.mark(position, cut))

    def _check(self, number: int, key: Array, value: Array) -> None:
        group = self._spec.groups[number]
        dtype = np.dtype(NUMPY_DTYPES[self._spec.dtype])
        for name, array, dim in (("key", key, group.key_dim), ("value", value, group.value_dim)):
            if not isinstance(array, np.ndarray):
                raise InvalidRequest(
                    f"{name} is no numpy array but {type(array).__module__}.{type(array).__qualname__}"
                )
            tokens = key.shape[1] if key.ndim == 3 else "tokens"
            if array.shape != (group.kv_heads, tokens, dim) or array.dtype != dtype:
                wanted = f"{dtype} ({group.kv_heads}, {tokens}, {dim})"
                raise InvalidRequest(f"{name} is {array.dtype} {array.shape}; this model has {wanted}")

    def _seal(self, target: _Target, complete: list[tuple[int, int]]) -> None:
        """Seal what is complete, and what was complete and is written again."""
        self._complete += ((target, extent, layer) for extent, layer in complete)
        self._complete_bytes += len(complete) * target.planes.geometry.layer_bytes
        if self._complete_bytes >= SEAL_BATCH_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        batch, self._complete, self._complete_bytes = self._complete, [], 0
        self._sealing.append(self._sealer.submit(_seal_all, batch))

    def check_complete(self) -> None:
        """Raises InvalidRequest, naming what is missing, unless every token of every layer was written."""
        for target in self._targets:
            if not target.written.all():
                run = target.planes.run
                layer, row = (int(index) for index in np.argwhere(~target.written)[0])
                index = self._spec.groups[run.group].layers[layer]
                raise InvalidRequest(f"layer {index}: token {run.start + row} was never written; nothing is published")

    def seals(self) -> list[bytes]:
        """The seals of all extents, as a commit wants them, when everything has been written."""
        self._hand_over()
        for sealing in self._sealing:
            sealing.result()
        return [seal for target in self._targets for seal in target.seals()]

    def release(self) -> None:
        """Let go of the shared memory."""
        self._released = True
        self._sealer.shutdown(cancel_futures=True)
        self._targets.clear()
        self._complete.clear()


def _seal_all(batch: list[tuple[_Target, int, int]]) -> None:
    for target, extent, layer in batch:
        target.seal(extent, layer)
