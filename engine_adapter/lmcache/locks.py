"""Locks: what LMCache has looked up stays readable until it is unlocked, or until a lock's time is up.

A lock is a lease on copies in DDR, with views of them. LMCache counts by key, so several lookups of one key hold it
until each has been unlocked.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final

LOCK_SECONDS: Final = 60.0


@dataclass(eq=False, slots=True)
class _Held:
    """The leases of one lookup. Keys in `views` can still be read; those in `keys` have not been unlocked."""

    leases: ExitStack | None
    views: dict[Hashable, memoryview]
    until: float
    keys: set[Hashable] = field(default_factory=set)
    readers: int = 0


class Locks:
    """Methods may be called from any thread. `later` runs what may wait for the daemon."""

    def __init__(self, later: Callable[[Callable[[], None]], object], lock_seconds: float = LOCK_SECONDS) -> None:
        self._later = later
        self._lock_seconds = lock_seconds
        self._changed = threading.Condition()
        self._by_key: dict[Hashable, deque[_Held]] = {}
        self._in_order: deque[_Held] = deque()  # by when their time is up
        self._closed = False
        self._thread = threading.Thread(target=self._expire, name="holdfast-locks", daemon=True)
        self._thread.start()

    @property
    def count(self) -> int:
        """Keys that are locked."""
        with self._changed:
            return len(self._by_key)

    def hold(self, leases: ExitStack, views: Mapping[Hashable, memoryview]) -> None:
        """Keep these views, which end with their leases."""
        held = _Held(leases, dict(views), time.monotonic() + self._lock_seconds, set(views))
        with self._changed:
            for key in held.keys:
                self._by_key.setdefault(key, deque()).append(held)
            self._in_order.append(held)
            self._end_if_over(held)
            self._changed.notify_all()

    @contextmanager
    def reading(self, key: Hashable) -> Iterator[memoryview | None]:
        """What is locked under a key, for one reading: it is not kept for another. None where nothing is."""
        with self._changed:
            held = next((held for held in self._by_key.get(key, ()) if key in held.views), None)
            view = held.views.pop(key) if held is not None else None
            if held is not None:
                held.readers += 1
        try:
            yield view
        finally:
            if held is not None:
                with self._changed:
                    held.readers -= 1
                    self._end_if_over(held)

    def unlock(self, keys: Iterable[Hashable]) -> None:
        """LMCache needs these no more; one lookup of each ends."""
        with self._changed:
            for key in keys:
                waiting = self._by_key.get(key)
                if waiting is None:
                    continue  # its time was up, or it was never in DDR
                held = next((held for held in waiting if key not in held.views), waiting[0])
                self._drop(held, key)

    def give_up(self) -> None:
        """End all leases, for want of room; what is read just now may be read to its end."""
        with self._changed:
            for held in self._in_order:
                held.views.clear()
                self._end_if_over(held)

    def _drop(self, held: _Held, key: Hashable) -> None:
        held.keys.discard(key)
        held.views.pop(key, None)
        waiting = self._by_key[key]
        waiting.remove(held)
        if not waiting:
            del self._by_key[key]
        self._end_if_over(held)

    def _end_if_over(self, held: _Held) -> None:
        if held.leases is not None and not held.views and not held.readers:
            self._later(held.leases.close)
            held.leases = None

    def _expire(self) -> None:
        with self._changed:
            while not self._closed:
                while self._in_order and not self._in_order[0].keys:
                    self._in_order.popleft()
                left = self._in_order[0].until - time.monotonic() if self._in_order else None
                if left is not None and left <= 0:
                    held = self._in_order.popleft()
                    for key in list(held.keys):
                        self._drop(held, key)
                    continue
                self._changed.wait(left)

    def close(self) -> None:
        """Give up all locks."""
        with self._changed:
            self._closed = True
            for held in self._in_order:
                for key in list(held.keys):
                    self._drop(held, key)
            self._changed.notify_all()
        self._thread.join()
