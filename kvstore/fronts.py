"""Fronts: which extents begin with a given block, for prompts that leave a document in the middle of an extent."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from .extent import Extent, ExtentId
from .keys import KEY_BYTES

V = TypeVar("V", bound=Hashable)


class Index(Generic[V]):
    """What belongs to a block key, by it. Small where most keys have one; what belongs to them is no dict."""

    def __init__(self) -> None:
        self._found: dict[bytes, V | dict[V, None]] = {}

    def add(self, key: bytes, value: V) -> None:
        """Find it from now on; again is as once."""
        known = self._found.setdefault(key, value)
        if isinstance(known, dict):
            known[value] = None
        elif known != value:
            self._found[key] = {known: None, value: None}

    def discard(self, key: bytes, value: V) -> None:
        """Find it no more."""
        known = self._found.get(key)
        if isinstance(known, dict):
            known.pop(value, None)
            if not known:
                del self._found[key]
        elif known == value:
            del self._found[key]

    def of(self, key: bytes) -> Iterable[V]:
        """What belongs to a key, the newest first."""
        known = self._found.get(key)
        if known is None:
            return ()
        return reversed(known) if isinstance(known, dict) else (known,)

    def __contains__(self, key: bytes) -> bool:
        return key in self._found

    def __len__(self) -> int:
        return sum(len(known) if isinstance(known, dict) else 1 for known in self._found.values())


class Fronts:
    """Extents of several blocks by the key of their first one. Those of one block are found by their id."""

    def __init__(self) -> None:
        self._ids: Index[ExtentId] = Index()

    def add(self, extent: Extent) -> None:
        """Find it from now on; again is as once."""
        if len(extent.block_keys) > KEY_BYTES:
            self._ids.add(extent.block_keys[:KEY_BYTES], extent.id)

    def discard(self, extent: Extent) -> None:
        """Find it no more."""
        self._ids.discard(extent.block_keys[:KEY_BYTES], extent.id)

    def of(self, front: bytes) -> Iterable[ExtentId]:
        """The extents that begin with this block, the newest first."""
        return self._ids.of(front)

    def __len__(self) -> int:
        return len(self._ids)
