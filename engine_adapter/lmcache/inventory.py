"""Inventory: which of Holdfast's namespaces are LMCache's, what lies in them, and which LMCache names that has."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from lmcache.v1.distributed.api import EncodedObjectKey, KeyEntry, KeyListPage, ObjectKey

from ..api import Store
from .naming import Shard, key_of, salt_and_hash, shard_in, shard_of

STALE_SECONDS: Final = 10.0


class Inventory:
    """What is known without asking, and what the daemon is asked. Methods may be called from any thread.

    `total_bytes` is what all of LMCache's objects of the tenant had when it was last counted, if it was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._namespaces: defaultdict[Shard, set[str]] = defaultdict(set)
        self._due = 0.0  # on the monotonic clock
        self.total_bytes: int | None = None

    def saw(self, namespaces: Iterable[str]) -> None:
        """These are in use."""
        with self._lock:
            for namespace in namespaces:
                if (shard := shard_in(namespace)) is not None:
                    self._namespaces[shard].add(namespace)

    def take_turn(self) -> bool:
        """Whether the caller should count again; nobody else is told so for some seconds."""
        with self._lock:
            now = time.monotonic()
            is_due = now >= self._due
            if is_due:
                self._due = now + STALE_SECONDS
            return is_due

    def count(self, store: Store) -> None:
        """Ask the daemon. Raises HoldfastError."""
        views = [view for view in store.namespaces() if shard_in(view.namespace) is not None]
        self.saw(view.namespace for view in views)
        self.total_bytes = sum(view.size_bytes for view in views)

    def delete(self, store: Store, keys: Sequence[ObjectKey]) -> list[ObjectKey]:
        """Forget these, in every form that the cache has of their models; which are gone. Raises HoldfastError."""
        if self.total_bytes is None:  # of what was stored before this server started we know nothing yet
            self.count(store)
        by_shard: defaultdict[Shard, list[ObjectKey]] = defaultdict(list)
        for key in keys:
            by_shard[shard_of(key)].append(key)
        gone: set[ObjectKey] = set()
        for shard, members in by_shard.items():
            with self._lock:
                namespaces = sorted(self._namespaces.get(shard, ()))
            for namespace in namespaces:
                outcomes = store.objects(namespace).delete([key_of(key) for key in members])
                gone.update(key for key, outcome in zip(members, outcomes, strict=True) if outcome)
        return [key for key in keys if key in gone]

    @staticmethod
    def page(store: Store, model: str | None, page_size: int, cursor: str | None) -> KeyListPage:
        """Some of what is there, of one model or of all. Keys whose salt cannot be read back are left out.

        Raises ValueError for a cursor that is none, and HoldfastError.
        """
        if page_size < 1:
            raise ValueError(f"a page has at least one key, not {page_size}")
        first, _, position = (cursor or "#0").rpartition("#")
        skip = int(position)
        entries: list[KeyEntry] = []
        for namespace in sorted(view.namespace for view in store.namespaces()):
            shard = shard_in(namespace)
            if shard is None or namespace < first or model not in (None, shard.model):
                continue
            start = skip if namespace == first else 0
            for number, (key, size_bytes) in enumerate(store.objects(namespace).keys(start), start + 1):
                if (read := salt_and_hash(key)) is not None:
                    entries.append(KeyEntry(_encoded(shard, *read), size_bytes))
                if len(entries) == page_size:
                    return KeyListPage(tuple(entries), f"{namespace}#{number}")
        return KeyListPage(tuple(entries), None)


def _encoded(shard: Shard, salt: str, chunk_hash: bytes) -> EncodedObjectKey:
    return EncodedObjectKey(chunk_hash.hex(), shard.model, shard.kv_rank, shard.group, salt)
