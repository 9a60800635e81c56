"""Staging: the way between extents in DDR and the rows of an arena that the CPU cannot address.

Slabs are registered as pinned memory the first time one is seen, so that a copy runs at the bus's speed and beside
other work. An extent's layers are contiguous there: they go over in one copy, on a stream of our own, and are scattered
on the device; one copy per head or per run would cost more in calls than in bytes. On a CPU device the same steps run
without stream and registration: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..kvstore.geometry import Geometry
from .moves import Buffers, Bytes, Move, Rows

Parts = Sequence[Tensor]  # the arena's planes as bytes, by part: [L, Hkv, R, row bytes]


class Staging:
    """Moves bytes to and from one device. One thread at a time may use it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pinned: dict[int, mmap.mmap] = {}  # address -> what is registered there, kept mapped until `unpin`

    @property
    def pinned_bytes(self) -> int:
        """Bytes of slabs that are registered."""
        return sum(len(mapping) for mapping in self._pinned.values())

    def load(
        self, parts: Parts, moves: Sequence[Move], buffers: Buffers, geometry: Geometry, layers: tuple[int, int]
    ) -> None:
        """Fill arena rows from extents, for layers [start, stop). Returns when they may be read on any stream."""
        start, stop = layers
        with self._on_stream():
            self._follow()
            for buffer, own in _by_buffer(moves):
                first = geometry.plane_offset(start, 0)
                staged = self._brought(buffers[buffer], first, first + (stop - start) * geometry.layer_bytes)
                indices = [(_on(move.arena, self._device), _on(move.extent, self._device)) for move in own]
                for layer, part, plane in _planes(staged, geometry, start, stop):
                    for arena, extent in indices:
                        parts[part][layer][arena] = plane[extent]
        self._wait()

    def save(
        self, parts: Parts, moves: Sequence[Move], buffers: Buffers, geometry: Geometry, layers: tuple[int, int]
    ) -> None:
        """Fill extents from arena rows, for layers [start, stop). Only the rows that are asked for come over."""
        start, stop = layers
        for buffer, own in _by_buffer(moves):
            with self._on_stream():
                self._follow()
                indices = [_on(move.arena, self._device) for move in own]
                blocks = [
                    parts[part][layer][index]
                    for layer in range(start, stop)
                    for part in range(geometry.parts)
                    for index in indices
                ]
                sizes = [tuple(block.shape) for block in blocks]
                gathered = torch.cat([block.reshape(-1) for block in blocks])
                host = torch.empty(gathered.shape, dtype=torch.uint8, pin_memory=self._stream is not None)
                host.copy_(gathered, non_blocking=True)
            self._wait()
            _scatter(host.numpy(), sizes, own, np.frombuffer(buffers[buffer], np.uint8), geometry, start, stop)

    def _brought(self, buffer: memoryview | Bytes, first: int, end: int) -> Tensor:
        """Bytes [first, end) of an extent, on the device."""
        if self._stream is not None and isinstance(buffer, memoryview):
            self._pin(buffer)
        host = torch.from_numpy(np.frombuffer(buffer, np.uint8, count=end - first, offset=first))
        return host.to(self._device, non_blocking=True)

    # Pinned memory -----------------------------------------------------------------------------

    def _pin(self, buffer: memoryview) -> None:
        """Register the slab behind a view. What cannot be registered is copied all the same, only slower."""
        mapping = buffer.obj
        if not isinstance(mapping, mmap.mmap):
            return
        address = _address(mapping)
        if address not in self._pinned and not int(
            torch.cuda.cudart().cudaHostRegister(address, len(mapping), 0)  # type: ignore[no-untyped-call]
        ):
            self._pinned[address] = mapping

    def unpin(self, slab: memoryview) -> None:
        """Forget a slab before it is unmapped; nothing happens when it is not known."""
        address = _address(slab)
        if self._pinned.pop(address, None) is not None:
            self._wait()
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Forget every slab."""
        for mapping in list(self._pinned.values()):
            self.unpin(memoryview(mapping))

    # The stream --------------------------------------------------------------------------------

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def _follow(self) -> None:
        """Begin after what the runner has asked of its stream so far: rows may have been written there."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self._device))

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _by_buffer(moves: Sequence[Move]) -> Iterator[tuple[int, list[Move]]]:
    for buffer, own in groupby(sorted(moves, key=lambda move: move.buffer), key=lambda move: move.buffer):
        yield buffer, list(own)


def _planes(staged: Tensor, geometry: Geometry, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
    """(layer, part, [heads, rows, row bytes]) of the staged layers."""
    first = geometry.plane_offset(start, 0)
    for layer in range(start, stop):
        for part in range(geometry.parts):
            shape = (geometry.heads, geometry.rows, geometry.row_bytes(part))
            offset = geometry.plane_offset(layer, part) - first
            yield layer, part, staged[offset : offset + prod(shape)].view(shape)


def _scatter(
    host: Bytes,
    sizes: Sequence[tuple[int, ...]],
    moves: Sequence[Move],
    extent: Bytes,
    geometry: Geometry,
    start: int,
    stop: int,
) -> None:
    """Put blocks, in the order layer, part, move, where they belong in the extent."""
    blocks = iter(sizes)
    offset = 0
    for layer in range(start, stop):
        for part in range(geometry.parts):
            shape = (geometry.heads, geometry.rows, geometry.row_bytes(part))
            at = geometry.plane_offset(layer, part)
            plane = extent[at : at + prod(shape)].reshape(shape)
            for move in moves:
                size = next(blocks)
                plane[move.extent] = host[offset : offset + prod(size)].reshape(size)
                offset += prod(size)


def _on(index: tuple[slice, Rows], device: torch.device) -> tuple[slice, slice | Tensor]:
    heads, rows = index
    return heads, rows if isinstance(rows, slice) else torch.from_numpy(rows).to(device)


def _address(slab: mmap.mmap | memoryview) -> int:
    return int(np.frombuffer(slab, np.uint8).ctypes.data)
