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
from ..kvstore.errors import HoldfastError, Unavailable
from .runner_queue import Expected, Foreseen

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

        `look` is asked in here, so that what was seen first is told first. What runs has been used, or will be. A
        daemon that does not answer soon is left alone until something changes.
        """
        with self._lock:
            seen = look()
            before, self._told = self._told, {name: expected.queries for name, expected in seen.waiting.items()}
            with suppress(Unavailable):
                for document, expected in seen.waiting.items():
                    if before.get(document) != expected.queries:
                        self._hint(document, expected)
                for document in before.keys() - seen.waiting.keys() - seen.running:
                    self._client.cancel_prefetch(document, group=self._group, owner=self._owner)

    def _hint(self, document: str, expected: Expected) -> None:
        """Raises Unavailable."""
        seconds = min(LONGEST_SECONDS, max(SHORTEST_SECONDS, expected.wait_seconds))
        try:
            self._client.prefetch(
                document, group=self._group, queries=expected.queries, deadline_seconds=seconds, owner=self._owner
            )
        except Unavailable:
            raise
        except HoldfastError:  # it is not stored, or too many are announced: whoever asks will hear of it
            return
