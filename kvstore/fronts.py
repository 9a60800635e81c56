"""Fronts: which extents begin with a given block, for prompts that leave a document in the middle of an extent."""

from __future__ import annotations

from collections.abc import Iterable

from .extent import Extent, ExtentId
from .keys import KEY_BYTES


class Fronts:
    """Extents of several blocks by the key of their first one. Those of one block are found by their id."""

    def __init__(self) -> None:
        self._ids: dict[bytes, ExtentId | dict[ExtentId, None]] = {}  # most keys begin one extent

    def add(self, extent: Extent) -> None:
        """Find it from now on; again is as once."""
        if len(extent.block_keys) <= KEY_BYTES:
            return
        front = extent.block_keys[:KEY_BYTES]
        known = self._ids.setdefault(front, extent.id)
        if isinstance(known, dict):
            known[extent.id] = None
        elif known != extent.id:
            self._ids[front] = {known: None, extent.id: None}

    def discard(self, extent: Extent) -> None:
        """Find it no more."""
        front = extent.block_keys[:KEY_BYTES]
        known = self._ids.get(front)
        if isinstance(known, dict):
            known.pop(extent.id, None)
            if not known:
                del self._ids[front]
        elif known == extent.id:
            del self._ids[front]

    def of(self, front: bytes) -> Iterable[ExtentId]:
        """The extents that begin with this block, the newest first."""
        known = self._ids.get(front)
        if known is None:
            return ()
        return reversed(known) if isinstance(known, dict) else (known,)

    def __len__(self) -> int:
        return sum(len(known) if isinstance(known, dict) else 1 for known in self._ids.values())
