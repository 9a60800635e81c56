"""Exchange: gives complete extents of an open ingest to the daemon, and takes the slots of the next ones for them.

It runs on the sealer's thread: the writer goes on filling what it has meanwhile. What has become complete while the
daemon was asked is handed over together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future

from ..kvstore.client import Client
from ..kvstore.runs import RunMessage


class Exchange:
    """One ingest's. `given` is, by layer group, the token up to which extents have been handed over."""

    def __init__(self, client: Client, ingest: int, thread: Executor) -> None:
        self._client = client
        self._ingest = ingest
        self._thread = thread
        self._complete: deque[tuple[RunMessage, Callable[[], list[bytes]]]] = deque()
        self._asked: deque[Future[list[RunMessage]]] = deque()
        self._owed = 0  # slots for what was given that have not come back
        self.given: dict[int, int] = {}

    def give(self, run: RunMessage, seals: Callable[[], list[bytes]]) -> None:
        """Hand over one complete extent; `seals` makes its seals, on the thread."""
        self.given[run.group] = max(run.stop, self.given.get(run.group, 0))
        self._complete.append((run, seals))
        self._asked.append(self._thread.submit(self._swap))

    def take(self) -> list[RunMessage] | None:
        """Slots for what was handed over, as soon as there are any; None when nothing is owed."""
        return self._asked.popleft().result() if self._asked else None

    def _swap(self) -> list[RunMessage]:
        batch = [self._complete.popleft() for _ in range(len(self._complete))]
        if not batch and not self._owed:
            return []
        filled = [(run.start, run.group) for run, _ in batch]
        runs = self._client.next_slots(self._ingest, filled, [seal for _, seals in batch for seal in seals()]).runs
        self._owed += len(batch) - sum(run.count for run in runs)
        if not runs:
            self._owed = 0  # no slot of that size is wanted any more
        return runs
