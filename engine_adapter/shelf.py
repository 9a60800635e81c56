"""Shelf: an engine's opaque objects behind a link. Whatever goes wrong is a miss or a dropped store, counted by reason.

For adapters of engines that show only hashes. Batches are in prefix order: what lies behind a miss is not loaded, and
what would lie behind a refusal is not stored, because nobody could use it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ..kvstore.document import WritePolicy
from ..kvstore.errors import Conflict, DeadlineExceeded, HoldfastError, NoCapacity
from .api import Store
from .link import Link
from .namespaces import Origin, announce
from .objects import Buffer, Gathered, Objects, PutStatus

log = logging.getLogger(__name__)

BATCH_BYTES: Final = 64 << 20  # leased at once; a daemon's DDR may be small
BATCH_KEYS: Final = 256  # of one message
COPIES_AT_ONCE: Final = 8  # where nobody knows how large they are


class Event(StrEnum):
    """What is counted, in objects."""

    HIT = "hit"
    MISS = "miss"
    LOADED = "loaded"
    LOST = "lost"  # found, and gone or of another size when it was to be loaded
    STORED = "stored"
    PRESENT = "present"
    REFUSED = "refused"
    PINNED = "pinned"
    UNANSWERED = "unanswered"  # the daemon is away, too slow, or cannot


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the daemon may take, in seconds."""

    find_seconds: float = 1.0
    load_seconds: float = 10.0
    store_seconds: float = 30.0


class Shelf:
    """The objects of one origin. Methods may be called from any thread, and raise nothing of Holdfast's.

    `tokens_each` is what an object's loss costs to compute again; 0: unknown.
    """

    def __init__(
        self,
        link: Link,
        origin: Origin,
        *,
        tokens_each: int = 0,
        write_policy: WritePolicy = WritePolicy.AUTO,
        patience: Patience | None = None,
    ) -> None:
        self.origin = origin
        self._link = link
        self._tokens_each = tokens_each
        self._write_policy = write_policy
        self._patience = patience or Patience()
        self._lock = threading.Lock()
        self._counts: Counter[Event] = Counter()
        self._announced = False

    @property
    def counts(self) -> Counter[Event]:
        """How many objects what has happened to, since the start."""
        with self._lock:
            return Counter(self._counts)

    def find(self, keys: Sequence[bytes]) -> list[bool]:
        """Which are in the cache, in any tier."""
        found: list[bool] = []
        with self._counting(len(keys), found), self._objects() as objects:
            for first in range(0, len(keys), BATCH_KEYS):
                batch = keys[first : first + BATCH_KEYS]
                tiers = objects.find(batch, deadline_seconds=self._patience.find_seconds)
                found += [tier is not None for tier in tiers]
        return self._counted(found, len(keys), Event.HIT, Event.MISS)

    def load_into(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[bool]:
        """Copy objects into writable buffers of their sizes: which were. Nothing behind a batch with a miss is."""
        loaded: list[bool] = []
        until = time.monotonic() + self._patience.load_seconds
        with self._counting(len(keys), loaded), self._objects() as objects:
            for start, stop in batches([_size_bytes(buffer) for buffer in buffers]):
                left = max(0.0, until - time.monotonic())
                loaded += objects.load_into(keys[start:stop], buffers[start:stop], deadline_seconds=left)
                if not all(loaded):
                    break
        return self._counted(loaded, len(keys), Event.LOADED, Event.LOST)

    def visit(self, keys: Sequence[bytes], size_bytes: int, take: Callable[[int, memoryview], None]) -> list[bool]:
        """Call `take(index, content)` for each object of exactly this size, in order: which were.

        Content may be read during the call only. Nothing behind a batch with a miss is visited.
        """
        taken: list[bool] = []
        until = time.monotonic() + self._patience.load_seconds
        with self._counting(len(keys), taken), self._objects() as objects:
            for start, stop in batches([size_bytes] * len(keys)):
                left = max(0.0, until - time.monotonic())
                with objects.get(keys[start:stop], deadline_seconds=left) as views:
                    for index, view in enumerate(views, start):
                        fits = view is not None and view.nbytes == size_bytes
                        if view is not None and fits:
                            take(index, view)
                        taken.append(fits)
                if not all(taken):
                    break
        return self._counted(taken, len(keys), Event.LOADED, Event.LOST)

    def copies(self, keys: Sequence[bytes]) -> list[bytearray | None]:
        """Copies of objects of any size; None: a miss. Nothing behind a few keys with a miss is looked for."""
        taken: list[bool] = []
        found: list[bytearray | None] = [None] * len(keys)
        with self._counting(len(keys), taken), self._objects() as objects:
            for start in range(0, len(keys), COPIES_AT_ONCE):
                batch = keys[start : start + COPIES_AT_ONCE]
                with objects.get(batch, deadline_seconds=self._patience.load_seconds) as views:
                    found[start : start + len(batch)] = [None if view is None else bytearray(view) for view in views]
                    taken += [view is not None for view in views]
                if not all(taken):
                    break
        self._counted(taken, len(keys), Event.LOADED, Event.LOST)
        return found

    def put(self, items: Sequence[tuple[bytes, Buffer | Gathered]], behind: bytes | None = None) -> list[bool]:
        """Store what is not there yet: which are there now. Nothing behind a batch with a refusal is tried.

        The first is of use only behind the object of the key `behind`, where one is named.
        """
        kept: list[bool] = []
        until = time.monotonic() + self._patience.store_seconds
        with self._counting(len(items), kept), self._objects() as objects:
            for start, stop in batches([_size_bytes(content) for _, content in items]):
                results = objects.put(
                    items[start:stop],
                    write_policy=self._write_policy,
                    deadline_seconds=max(0.0, until - time.monotonic()),
                    tokens_each=self._tokens_each,
                    behind=behind,
                )
                behind = items[stop - 1][0]
                kept += [result.is_there for result in results]
                present = sum(result.status is PutStatus.PRESENT for result in results)
                self._count(Event.PRESENT, present)
                self._count(Event.STORED, -present)
                for result in results:
                    if isinstance(result.error, DeadlineExceeded):
                        raise result.error
                if not all(kept):
                    break
        return self._counted(kept, len(items), Event.STORED, Event.REFUSED)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Say that they were used, where the engine had its own copy."""
        with self._counting(0, []), self._objects() as objects:
            objects.touch(keys)

    def pin(self, keys: Sequence[bytes], ttl_seconds: float | None, owner: str, reason: str) -> int:
        """Keep them for so long; returns how many are kept."""
        kept = 0
        with self._counting(len(keys), []), self._objects() as objects:
            kept = objects.pin(keys, ttl_seconds=ttl_seconds, owner=owner, reason=reason)
        self._count(Event.PINNED, kept)
        return kept

    def clear(self) -> bool:
        """Forget all of them; False when the daemon could not be asked."""
        done: list[bool] = []
        with self._counting(0, done), self._objects() as objects:
            objects.clear()
            done.append(True)
        return bool(done)

    @contextmanager
    def _counting(self, wanted: int, answered: Sequence[bool]) -> Iterator[None]:
        """An error of the daemon's ends the block; what of `wanted` has no answer by then is counted."""
        try:
            yield
        except HoldfastError as error:
            log.debug("Holdfast could not be used: %s", error.message)
            refused = isinstance(error, Conflict | NoCapacity)
            self._count(Event.REFUSED if refused else Event.UNANSWERED, wanted - len(answered))

    @contextmanager
    def _objects(self) -> Iterator[Objects]:
        with self._link.use() as store:
            if not self._announced:
                self._announced = True
                self._announce(store)
            yield store.objects(self.origin.namespace)

    def _announce(self, store: Store) -> None:
        if changes := announce(store, self.origin):
            log.warning(
                "KV that was stored for %s before is not used, because it has another form: %s",
                self.origin.model,
                ", ".join(changes),
            )

    def _counted(self, outcomes: list[bool], wanted: int, good: Event, bad: Event) -> list[bool]:
        """Count them, and make up what has no answer."""
        self._count(good, outcomes.count(True))
        self._count(bad, outcomes.count(False))
        return outcomes + [False] * (wanted - len(outcomes))

    def _count(self, event: Event, objects: int) -> None:
        with self._lock:
            self._counts[event] += objects


def batches(sizes_bytes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of at most BATCH_BYTES and BATCH_KEYS, at least one object each, in order."""
    start = total_bytes = 0
    for index, size_bytes in enumerate(sizes_bytes):
        if index > start and (total_bytes + size_bytes > BATCH_BYTES or index - start == BATCH_KEYS):
            yield start, index
            start, total_bytes = index, 0
        total_bytes += size_bytes
    if start < len(sizes_bytes):
        yield start, len(sizes_bytes)


def _size_bytes(buffer: Buffer | Gathered) -> int:
    return len(buffer) if isinstance(buffer, bytes | bytearray) else buffer.nbytes
