"""Verdicts: which keys are in the cache, known without asking anybody on the scheduler's thread.

Keys that are asked for in one step are looked up together on a thread. What is known is remembered, bounded and for a
short time only: others store and evict.
"""

from __future__ import annotations

import queue
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

KNOWN_MAX: Final = 262_144  # keys; those that were asked for longest ago are forgotten
FOUND_SECONDS: Final = 10.0
MISSED_SECONDS: Final = 1.0


class Verdicts:
    """Verdicts by key. All methods belong to one thread, the scheduler's.

    `find` says of each key whether it is there, and raises nothing; it is called with one step's keys, on the thread
    that `run` has its errands done by. `run` returns False when it has too many.
    """

    def __init__(
        self,
        find: Callable[[Sequence[bytes]], list[bool]],
        run: Callable[[Callable[[], object]], bool],
        deadline_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find = find
        self._run = run
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()  # verdict, and until when it holds
        self._asked: dict[bytes, float] = {}  # since when; unanswered, the oldest first
        self._step: list[bytes] = []  # asked in this step, not handed over yet
        self._answers: queue.SimpleQueue[tuple[list[bytes], list[bool]]] = queue.SimpleQueue()

    def verdict(self, key: bytes) -> bool | None:
        """Whether it is there; None: not known yet, ask again in a later step."""
        self._take_answers()
        now = self._clock()
        known = self._known.get(key)
        if known is not None and now < known[1]:
            return known[0]
        since = self._asked.get(key)
        if since is not None:
            return None if now - since < self._deadline_seconds else False
        if len(self._asked) >= KNOWN_MAX or self._stalled(now):
            return False
        self._asked[key] = now
        self._step.append(key)
        return None

    def hand_over(self) -> None:
        """The step is over: have its keys looked up."""
        self._take_answers()
        step, self._step = self._step, []
        if step and not self._run(lambda: self._answers.put((step, self._find(step)))):
            self.missed(step)

    def found(self, keys: Iterable[bytes]) -> None:
        """Learn from elsewhere: they were stored."""
        self._learn(keys, (True, self._clock() + FOUND_SECONDS))

    def missed(self, keys: Iterable[bytes]) -> None:
        """Learn from elsewhere: they could not be loaded."""
        self._learn(keys, (False, self._clock() + MISSED_SECONDS))

    def _stalled(self, now: float) -> bool:
        """Whether the oldest question waits too long: then nobody else should begin to wait."""
        oldest = next(iter(self._asked.values()), now)
        return now - oldest >= self._deadline_seconds

    def _take_answers(self) -> None:
        while not self._answers.empty():
            keys, found = self._answers.get_nowait()
            self.found(key for key, there in zip(keys, found, strict=True) if there)
            self.missed(key for key, there in zip(keys, found, strict=True) if not there)

    def _learn(self, keys: Iterable[bytes], verdict: tuple[bool, float]) -> None:
        for key in keys:
            self._asked.pop(key, None)
            self._known[key] = verdict
            self._known.move_to_end(key)
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
