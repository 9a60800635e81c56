"""Prefault: the arena's slabs are made before the first request, so that none pays for pages."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .arena import Arena
from .errors import StorageFailed


class Prefault:
    """Makes `slabs` in their order, on `threads` threads, while others look at how far it is."""

    def __init__(self, arena: Arena, slabs: Sequence[int], threads: int) -> None:
        self.total_bytes = len(slabs) * arena.slab_bytes
        self._arena = arena
        self._slabs = iter(slabs)
        self._threads = threads
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._done_bytes = 0

    @property
    def done_bytes(self) -> int:
        """Bytes of the slabs that are made."""
        with self._lock:
            return self._done_bytes

    @property
    def percent(self) -> int:
        """How much is done, rounded down."""
        return 100 * self.done_bytes // self.total_bytes if self.total_bytes else 100

    def run(self) -> None:
        """Make them all, or those begun when somebody stops it. Raises StorageFailed when one cannot be made."""
        with ThreadPoolExecutor(self._threads, thread_name_prefix="holdfast-prefault") as pool:
            ends = [pool.submit(self._work) for _ in range(self._threads)]
        for end in ends:
            end.result()

    def stop(self) -> None:
        """Begin no other slab."""
        self._stopped.set()

    def _work(self) -> None:
        while not self._stopped.is_set():
            with self._lock:
                slab = next(self._slabs, None)
            if slab is None:
                return
            try:
                self._arena.make(slab)
            except StorageFailed:
                self.stop()
                raise
            with self._lock:
                self._done_bytes += self._arena.slab_bytes
