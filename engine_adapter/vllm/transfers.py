"""Transfers: loads and stores on threads, behind bounded queues. The scheduler's thread submits and collects.

Loads have threads of their own, so that a request never waits behind stores. What is full refuses: the engine computes
again, or does not store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

log = logging.getLogger(__name__)

STOP_SECONDS: Final = 60.0  # a transfer ends by the deadline of its own call to the daemon, well before


class Kind(StrEnum):
    """Which way."""

    LOAD = "load"
    STORE = "store"


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """A job: objects by key, and the row of the engine's memory that each is copied to or from.

    `behind` names by group of the engine's what the first of a store's keys follows, where that is known.
    """

    number: int
    kind: Kind
    keys: tuple[bytes, ...]
    rows: tuple[int, ...]
    behind: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a transfer ended. `done` says for each key whether it was copied or is there; seconds include the waiting."""

    transfer: Transfer
    done: tuple[bool, ...]
    seconds: float


class _Lane:
    """A bounded queue and its threads."""

    def __init__(self, kind: Kind, threads: int, objects_max: int, carry: Callable[[], None]) -> None:
        self.waiting: deque[tuple[Transfer, float]] = deque()
        self.objects_max = objects_max
        self.objects = 0  # waiting or under way
        self.threads = [
            threading.Thread(target=carry, name=f"holdfast-{kind}-{number}", daemon=True) for number in range(threads)
        ]


class Transfers:
    """Two lanes. `carry_out` copies what a transfer says, returns success by key, and raises nothing.

    Methods may be called from any thread. Limits are in objects, so that they bound what the engine cannot reuse.
    """

    def __init__(
        self,
        carry_out: Callable[[Transfer], list[bool]],
        *,
        threads: dict[Kind, int],
        objects_max: dict[Kind, int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._carry_out = carry_out
        self._clock = clock
        self._changed = threading.Condition()
        self._ended: list[Outcome] = []
        self._closing = False
        self._lanes = {
            kind: _Lane(kind, threads[kind], objects_max[kind], lambda kind=kind: self._serve(kind))  # type: ignore[misc]
            for kind in Kind
        }
        for lane in self._lanes.values():
            for thread in lane.threads:
                thread.start()

    def submit(self, transfer: Transfer) -> bool:
        """Queue it; False when its lane is full. A transfer larger than the lane passes when it is alone."""
        lane = self._lanes[transfer.kind]
        with self._changed:
            if self._closing or (lane.objects and lane.objects + len(transfer.keys) > lane.objects_max):
                return False
            lane.objects += len(transfer.keys)
            lane.waiting.append((transfer, self._clock()))
            self._changed.notify_all()
        return True

    def ended(self) -> list[Outcome]:
        """What has ended since the last call."""
        with self._changed:
            found, self._ended = self._ended, []
            return found

    @property
    def objects_waiting(self) -> dict[Kind, int]:
        """Objects queued or under way, by lane."""
        with self._changed:
            return {kind: lane.objects for kind, lane in self._lanes.items()}

    def drain(self, deadline_seconds: float = STOP_SECONDS) -> bool:
        """Give up what has not begun, and wait for what has: nothing touches the engine's memory when this is True."""
        with self._changed:
            for lane in self._lanes.values():
                for transfer, since in lane.waiting:
                    self._end(transfer, [False] * len(transfer.keys), since)
                lane.waiting.clear()
            return self._changed.wait_for(
                lambda: not any(lane.objects for lane in self._lanes.values()), deadline_seconds
            )

    def close(self, deadline_seconds: float = STOP_SECONDS) -> bool:
        """Drain, and end the threads; False when one is still at work at the deadline."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        return self.drain(deadline_seconds)

    def _serve(self, kind: Kind) -> None:
        lane = self._lanes[kind]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: lane.waiting or self._closing)
                if not lane.waiting:
                    return
                transfer, since = lane.waiting.popleft()
            done = [False] * len(transfer.keys)
            try:
                done = self._carry_out(transfer)
            except Exception:
                log.exception("a %s of %d objects failed", transfer.kind, len(transfer.keys))
            finally:
                with self._changed:
                    self._end(transfer, done, since)

    def _end(self, transfer: Transfer, done: list[bool], since: float) -> None:
        """Call with the condition held."""
        self._lanes[transfer.kind].objects -= len(transfer.keys)
        self._ended.append(Outcome(transfer, tuple(done), self._clock() - since))
        self._changed.notify_all()
