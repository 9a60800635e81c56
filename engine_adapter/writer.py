"""Writer: fills the slots of an open ingest in place, and seals each plane as soon as it is complete.

Sealing runs beside the writing, on a thread of its own, a little behind it: the planes are still in the CPU's cache.
Neither copying nor hashing holds the interpreter's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt

from ..kvstore.client import Client
from ..kvstore.errors import InvalidRequest
from ..kvstore.runs import RunMessage
from ..kvstore.seal import CHECKSUM_BYTES, checksum
from ..kvstore.spec import KVSpec
from ..kvstore.wire import IngestOpened
from .exchange import Exchange
from .pages import Array
from .planes import NUMPY_DTYPES, Cut, Planes

SEAL_BATCH_BYTES: Final = 4 << 20  # much less than a cache, much more than handing it over costs
EARLY_BATCH_BYTES: Final = 64 << 20  # the disk's work of 20 ms or so, and a round trip of 1


class _Target:
    """A run of extents to fill: which tokens of which layers are written, and the seals made so far."""

    def __init__(self, planes: Planes) -> None:
        self.planes = planes
        self.written: npt.NDArray[np.bool_] = np.zeros(
            (planes.geometry.layers, planes.run.stop - planes.run.start), dtype=bool
        )
        self.seal_bytes = planes.geometry.plane_count * CHECKSUM_BYTES
        self.sealed = bytearray(planes.run.count * self.seal_bytes)
        self.lacking = [set(range(planes.geometry.layers)) for _ in range(planes.run.count)]  # layers of each extent
        self.given: set[int] = set()  # extents handed over

    def write(self, layer: int, cut: Cut, array: Array, part: int) -> None:
        """Fill a cut's rows of one plane kind from [kv heads, tokens of the cut, dim]. Raises InvalidRequest."""
        self.check_open(cut)
        for ours, theirs in self.planes.beside(part, layer, cut, array):
            np.copyto(ours, theirs)

    def check_open(self, cut: Cut) -> None:
        """Raises InvalidRequest when some of it was handed over."""
        if not self.given.isdisjoint(range(cut.first, cut.first + cut.extents)):
            raise InvalidRequest(f"tokens from {cut.start} on are complete and have been handed over; write them once")

    def mark(self, layer: int, cut: Cut) -> list[tuple[int, int]]:
        """Note a cut as written; returns the (extent, layer) that are complete now."""
        run = self.planes.run
        written = self.written[layer]
        written[cut.start - run.start : cut.stop - run.start] = True
        if cut.extents == 1:
            first = cut.first * run.step
            if not written[first : first + run.step].all():
                return []
        extents = range(cut.first, cut.first + cut.extents)
        for extent in extents:
            self.lacking[extent].discard(layer)
        return [(extent, layer) for extent in extents]

    def seal(self, extent: int, layer: int) -> None:
        """Make the checksums of one layer of an extent."""
        parts = self.planes.geometry.parts
        for part in range(parts):
            at = extent * self.seal_bytes + (layer * parts + part) * CHECKSUM_BYTES
            self.sealed[at : at + CHECKSUM_BYTES] = checksum(self.planes.plane(extent, layer, part))

    def seal_all(self) -> list[bytes]:
        """Make the checksums of all extents; returns them."""
        for extent in range(self.planes.run.count):
            for layer in range(self.planes.geometry.layers):
                self.seal(extent, layer)
        return self.seals()

    def seal_of(self, extent: int) -> bytes:
        """Those of one extent."""
        return bytes(self.sealed[extent * self.seal_bytes : (extent + 1) * self.seal_bytes])

    def seals(self) -> list[bytes]:
        """One per extent that was not handed over."""
        return [self.seal_of(extent) for extent in range(self.planes.run.count) if extent not in self.given]


class IngestWriter:
    """An open ingest: write the KV of every missing token of every layer, then leave the `with` block to publish."""

    def __init__(self, client: Client, spec: KVSpec, opened: IngestOpened, token_count: int) -> None:
        self._client = client
        self._spec = spec
        self._token_count = token_count
        self._released = False
        self._lock = threading.Lock()
        self._opened = opened
        self._targets: list[_Target] = []
        self._places = {
            layer: (number, position)
            for number, group in enumerate(spec.groups)
            for position, layer in enumerate(group.layers)
        }
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="holdfast-sealer")
        self._complete: list[tuple[_Target, int, int]] = []  # to be handed over
        self._complete_bytes = 0
        self._sealing: list[Future[None]] = []
        self._whole: dict[tuple[_Target, int], None] = {}  # extents to be handed over early
        self._whole_bytes = 0
        self._waiting = {(group, start): tokens for start, tokens, group in opened.waiting}  # without a slot, in order
        self._exchange = Exchange(client, opened.ingest, self._sealer) if opened.waiting else None
        self._add(opened.runs)

    def _add(self, runs: Sequence[RunMessage]) -> None:
        """Slots to fill; those of a document in a window one by one, as they are handed over."""
        if self._exchange is not None:
            runs = [single for run in runs for single in run.singles()]
        views = self._client.views(runs)
        self._targets += [_Target(Planes(run, self._spec, view)) for run, view in zip(runs, views, strict=True)]
        for run in runs:
            self._waiting.pop((run.group, run.start), None)

    @property
    def cached_tokens(self) -> int:
        """Leading tokens whose KV the store has already."""
        return self._opened.cached_tokens

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Token ranges [start, stop) to write, one per extent, in order."""
        later = {(start, start + tokens) for start, tokens, _ in self._opened.waiting}
        return sorted({(part.start, part.start + part.valid_tokens) for part in self._opened.parts} | later)

    def write(self, layer: int, start: int, key: Array, value: Array) -> None:
        """Store one layer's KV of tokens [start, start + n): [kv heads, n, dim]. What is stored already is skipped.

        A document that is too large for DDR passes through it in a window: write every layer of a range of tokens
        before the next range, in pieces of at most half of the window.
        What is to be on NVMe soon goes there while the rest is written: write every layer of a range of tokens before
        the next range, and nothing twice.

        Raises InvalidRequest when the layer, the shape or the dtype is not the model's, when the tokens are not the
        document's or lie outside the window, and when the block has ended.
        """
        number, position = self._place(layer)
        self._check(number, key, value)
        stop = start + key.shape[1]
        for target, cut in self._cuts(number, start, stop):
            with self._touching():
                for part, array in enumerate((key, value)):
                    target.write(position, cut, array[:, cut.start - start : cut.stop - start], part)
                self._written(target, position, cut)

    def write_pages(self, layer: int, first_page: int, page_count: int, fill: Callable[[int, Array], None]) -> None:
        """Store one layer's pages [first_page, first_page + page_count) of a native document, as the engine has them.

        `fill(first, view)` is called with uint8 views [n, page bytes] of the store's memory, and copies pages
        first, first + 1, ... into them. What is stored already is skipped. In which order to write: see `write`.

        Raises InvalidRequest when the spec is not native, the layer not the model's, the pages not the document's or
        outside the window, and when the block has ended. What `fill` raises ends the ingest.
        """
        number, position = self._place(layer)
        if not self._spec.page_format:
            raise InvalidRequest("this document is stored in canonical form; `write` its keys and values")
        page_tokens = self._spec.block_tokens
        stop = (first_page + page_count) * page_tokens
        for target, cut in self._cuts(number, first_page * page_tokens, stop):
            with self._touching():
                target.check_open(cut)
                for first, extents in target.planes.native_pages(position, cut.start, cut.stop):
                    for number, view in enumerate(extents):
                        fill(first + number * len(view), view)
                self._written(target, position, cut)

    @contextmanager
    def _touching(self) -> Iterator[None]:
        """Whoever copies into slots holds up the end: after it they are others'. Raises InvalidRequest."""
        with self._lock:
            self._check_open()
            yield

    def _check_open(self) -> None:
        if self._released:
            raise InvalidRequest("this ingest has ended; write inside its block")

    def _place(self, layer: int) -> tuple[int, int]:
        """The layer group of a layer, and its position in there. Raises InvalidRequest."""
        self._check_open()
        if layer not in self._places:
            raise InvalidRequest(f"layer {layer} is not in this model")
        return self._places[layer]

    def _cuts(self, number: int, start: int, stop: int) -> Iterator[tuple[_Target, Cut]]:
        """What of tokens [start, stop) is to be written, in slots that were fetched for them. Raises InvalidRequest."""
        if not 0 <= start <= stop <= self._token_count:
            raise InvalidRequest(f"tokens [{start}, {stop}) are not in this document of {self._token_count} tokens")
        if self._exchange is not None:
            self._move_to(number, start, stop, self._exchange)
        for target in list(self._targets):
            if target.planes.run.group == number:
                for cut in target.planes.cuts(start, stop):
                    yield target, cut

    def _written(self, target: _Target, position: int, cut: Cut) -> None:
        """Note a cut of a layer as written; seal, or hand over, what is complete now."""
        complete = target.mark(position, cut)
        if self._exchange is None:
            self._seal(target, complete)
            if self._opened.early:
                self._give_early(target, complete)
        elif self._waiting and target.written.all():
            self._targets.remove(target)
            self._exchange.give(target.planes.run, target.seal_all)

    def _move_to(self, number: int, start: int, stop: int, exchange: Exchange) -> None:
        """Get slots for all of these tokens, in exchange for what is complete. Raises InvalidRequest."""
        given = exchange.given.get(number, 0)
        if start < given:
            raise InvalidRequest(f"tokens below {given} are complete and have been handed over; write forward only")
        while (first := self._first_waiting(number)) is not None and first < stop:
            runs = exchange.take()
            if runs is None:
                here = [t.planes.run for t in self._targets if t.planes.run.group == number]
                window = f"[{min(run.start for run in here)}, {max(run.stop for run in here)})" if here else "none"
                raise InvalidRequest(
                    f"tokens [{start}, {stop}) are outside the window of this document, which is too large for DDR: "
                    f"tokens {window} can be written; write all of their layers before what follows"
                )
            self._add(runs)

    def _first_waiting(self, number: int) -> int | None:
        """The first token of a layer group that has no slot yet."""
        return next((start for group, start in self._waiting if group == number), None)

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

    def _give_early(self, target: _Target, complete: list[tuple[int, int]]) -> None:
        """Note what is complete in every layer; as soon as it is worth it, hand it over, behind its sealing."""
        for extent, _ in complete:
            if not target.lacking[extent] and (target, extent) not in self._whole:
                self._whole[target, extent] = None
                self._whole_bytes += target.planes.geometry.size_bytes
        if self._whole_bytes >= EARLY_BATCH_BYTES:
            batch, self._whole, self._whole_bytes = list(self._whole), {}, 0
            for whole, extent in batch:
                whole.given.add(extent)
            self._hand_over()
            self._sealing.append(self._sealer.submit(self._give, batch))

    def _give(self, batch: list[tuple[_Target, int]]) -> None:
        parts = [target.planes.run.part(extent) for target, extent in batch]
        filled = [(part.start, part.group) for part in parts]
        self._client.next_slots(self._opened.ingest, filled, [target.seal_of(extent) for target, extent in batch])

    def _hand_over(self) -> None:
        batch, self._complete, self._complete_bytes = self._complete, [], 0
        self._sealing.append(self._sealer.submit(_seal_all, batch))

    def check_complete(self) -> None:
        """Raises InvalidRequest, naming what is missing, unless every token of every layer was written."""
        if self._exchange is not None:
            while self._waiting and (runs := self._exchange.take()) is not None:
                self._add(runs)
            for group, start in self._waiting:
                index = self._spec.groups[group].layers[0]
                raise InvalidRequest(f"layer {index}: token {start} was never written; nothing is published")
        for target in self._targets:
            if not target.written.all():
                run = target.planes.run
                layer, row = (int(index) for index in np.argwhere(~target.written)[0])
                index = self._spec.groups[run.group].layers[layer]
                raise InvalidRequest(f"layer {index}: token {run.start + row} was never written; nothing is published")

    def seals(self) -> list[bytes]:
        """The seals of all extents that were not handed over, as a commit wants them, when everything is written."""
        if self._exchange is not None:
            for target in self._targets:
                target.seal_all()
        self._hand_over()
        self._targets.sort(key=lambda target: (target.planes.run.group, target.planes.run.start))
        for sealing in self._sealing:
            sealing.result()
        return [seal for target in self._targets for seal in target.seals()]

    def release(self) -> None:
        """Let go of the shared memory; waits for a copy into it that a cancelled task has left under way."""
        with self._lock:
            self._released = True
        self._sealer.shutdown(cancel_futures=True)
        self._targets.clear()
        self._complete.clear()
        self._whole.clear()


def _seal_all(batch: list[tuple[_Target, int, int]]) -> None:
    for target, extent, layer in batch:
        target.seal(extent, layer)
