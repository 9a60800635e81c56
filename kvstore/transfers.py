"""Transfers: pieces of byte work that wait for a worker, by class, and the rule that says whose turn it is.

The most urgent class that waits goes first, and in a class whatever has the lowest place (a layer, say), then the
oldest. But a class that was passed over `PASSES_MAX` times in a row has a turn, so that none starves.

A third of the workers is kept for attaches (of one worker, nothing): an attach that comes finds them idle, whatever is
being written, and a disk that hangs in writes does not keep them. While attaches wait, half of the workers are theirs.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from .orders import Urgency

PASSES_MAX: Final = 15  # a class that waits gets at least one piece in 16 (fewer where several classes starve)

T = TypeVar("T")


class Transfers(Generic[T]):
    """Not locked: the caller's lock guards it. Pieces are never compared."""

    def __init__(self, workers: int) -> None:
        self._half = max(1, workers // 2)
        self._most = max(1, workers - max(1, workers // 3))
        self._waiting: dict[Urgency, list[tuple[int, int, T]]] = {urgency: [] for urgency in Urgency}  # heaps
        self._passed: Counter[Urgency] = Counter()
        self._others_busy = 0  # workers on pieces of other classes than ATTACH
        self._sequence = 0

    def __len__(self) -> int:
        """Pieces that wait."""
        return sum(len(heap) for heap in self._waiting.values())

    def push(self, urgency: Urgency, place: int, piece: T) -> None:
        """Let a piece wait; lower places go first within its class."""
        self._sequence += 1
        heapq.heappush(self._waiting[urgency], (place, self._sequence, piece))

    def hasten(self, wanted: Callable[[T], bool]) -> int:
        """Let the wanted pieces wait with those of attaches; returns how many those are that did not."""
        count = 0
        for urgency in [urgency for urgency in Urgency if urgency is not Urgency.ATTACH]:
            found = [item for item in self._waiting[urgency] if wanted(item[2])]
            if found:
                self._waiting[urgency] = [item for item in self._waiting[urgency] if not wanted(item[2])]
                heapq.heapify(self._waiting[urgency])
            for item in found:
                heapq.heappush(self._waiting[Urgency.ATTACH], item)
            count += len(found)
        return count

    def pop(self) -> tuple[Urgency, T] | None:
        """The piece whose turn it is, with its class; `done` must follow. None when there is none."""
        waiting = [urgency for urgency, heap in self._waiting.items() if heap]
        if self._others_busy >= (self._half if self._waiting[Urgency.ATTACH] else self._most):
            waiting = [urgency for urgency in waiting if urgency is Urgency.ATTACH]
        if not waiting:
            return None
        chosen = next((urgency for urgency in waiting[1:] if self._passed[urgency] >= PASSES_MAX), waiting[0])
        for urgency in waiting:
            self._passed[urgency] += 1
        self._passed[chosen] = 0
        self._others_busy += chosen is not Urgency.ATTACH
        return chosen, heapq.heappop(self._waiting[chosen])[2]

    def done(self, urgency: Urgency) -> None:
        """A popped piece of this class ended."""
        self._others_busy -= urgency is not Urgency.ATTACH
        assert self._others_busy >= 0, "a piece ended twice"

    def clear(self) -> None:
        """Forget what waits."""
        for heap in self._waiting.values():
            heap.clear()
