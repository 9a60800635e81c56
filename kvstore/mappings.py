"""Mappings: the daemon's shared memory in a client's process, slab by slab, as buffers."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence

from .connection import Connection
from .errors import ClaimNotFound
from .runs import PartMessage, RunMessage
from .wire import SLABS_AT_ONCE, MapSlabs, SlabsMapped


class Mappings:
    """Slabs that were mapped so far. `on_unmap` hears of a whole slab that we are about to let go of."""

    def __init__(self, connection: Connection, on_unmap: Callable[[memoryview], None] | None) -> None:
        self._connection = connection
        self._on_unmap = on_unmap
        self._slabs: dict[int, tuple[int, memoryview]] = {}  # the memory's serial, and the mapping
        self._lock = threading.Lock()

    def views(self, parts: Sequence[PartMessage | RunMessage]) -> list[memoryview]:
        """The slots of extents, or all the slots of runs, writable, without a copy.

        Slabs that are not known yet are mapped together. Raises ClaimNotFound when a slab has changed hands.
        """
        with self._lock:
            wanted = {p.slab for p in parts if self._slabs.get(p.slab, (0,))[0] != p.serial}
            numbers = sorted(wanted)
            for first in range(0, len(numbers), SLABS_AT_ONCE):
                self._map(numbers[first : first + SLABS_AT_ONCE])
            found = []
            for part in parts:
                serial, content = self._slabs[part.slab]
                if serial != part.serial:
                    raise ClaimNotFound(f"slab {part.slab} has changed hands: the lease on it has ended")
                found.append(content[part.offset : part.offset + part.size_bytes])
            return found

    def close(self) -> None:
        """Let go of all."""
        with self._lock:
            for slab in list(self._slabs):
                self._unmap(slab)

    def _map(self, slabs: list[int]) -> None:
        reply, descriptors = self._connection.call(MapSlabs(slabs))
        assert isinstance(reply, SlabsMapped), reply
        try:
            for (slab, serial), descriptor in zip(reply.slabs, descriptors, strict=True):
                self._unmap(slab)
                self._slabs[slab] = (serial, memoryview(mmap.mmap(descriptor, reply.size_bytes)))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _unmap(self, slab: int) -> None:
        """Forget a mapping; its memory goes with the last view of it."""
        known = self._slabs.pop(slab, None)
        if known is not None and self._on_unmap is not None:
            self._on_unmap(known[1])
