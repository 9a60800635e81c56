"""Foretelling: tell the daemon which documents the questions that wait are about, while others are being answered.

So the next document comes near during the present one's decode. A hint is worth having, never needed: what the daemon
refuses is not said again until something changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ..kvstore.client import Client
from ..kvstore.errors import HoldfastError
from .runner_queue import Foreseen

LONGEST_SECONDS: Final = 3600.0  # that a hint may last
SHORTEST_SECONDS: Final = 0.001


class Foreteller:
    """One connection's hints for one group. Any thread may tell."""

    def __init__(self, client: Client, group: str) -> None:
        self._client = client
        self._group = group
        self._owner = f"runner {group}"
        self._told: dict[str, int] = {}  # by document: queries
        self._lock = threading.Lock()

    def tell(self, look: Callable[[], Foreseen]) -> None:
        """Say what has changed since the last time: more or fewer questions on a document, or none any more.

        `look` is asked in here, so that what was seen first is told first. What runs has been used, or will be.
        """
        with self._lock:
            seen = look()
            for document, expected in seen.waiting.items():
                if self._told.get(document) != expected.queries:
                    seconds = min(LONGEST_SECONDS, max(SHORTEST_SECONDS, expected.wait_seconds))
                    with suppress(HoldfastError):
                        self._client.prefetch(
                            document,
                            group=self._group,
                            queries=expected.queries,
                            deadline_seconds=seconds,
                            owner=self._owner,
                        )
            for document in self._told.keys() - seen.waiting.keys() - seen.running:
                with suppress(HoldfastError):
                    self._client.cancel_prefetch(document, group=self._group, owner=self._owner)
            self._told = {document: expected.queries for document, expected in seen.waiting.items()}
