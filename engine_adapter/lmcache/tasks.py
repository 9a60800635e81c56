"""Tasks: work that LMCache hands over, on few threads; it is told through a descriptor that something is done."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Generic, Protocol, TypeVar

from ...kvstore.errors import HoldfastError

R = TypeVar("R")
WAITING_MAX: Final = 512  # of one kind; more are failed at once
KEPT_MAX: Final = 4096  # outcomes that nobody fetched


class Notifier(Protocol):
    """Tells whoever polls a descriptor."""

    def notify(self) -> None: ...

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class Tasks(Generic[R]):
    """Tasks of one kind. Numbers are unique among tasks of this kind. Methods may be called from any thread.

    `failed` hears what went wrong with a task, on its thread.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, notifier: Notifier, failed: Callable[[HoldfastError | Exception], None]
    ) -> None:
        self._pool = pool
        self._notifier = notifier
        self._failed = failed
        self._lock = threading.Lock()
        self._last = -1
        self._waiting = 0
        self._stopped = False
        self._done: OrderedDict[int, R] = OrderedDict()

    @property
    def descriptor(self) -> int:
        """Readable when a task is done."""
        return self._notifier.fileno()

    @property
    def waiting(self) -> int:
        """How many are not done."""
        with self._lock:
            return self._waiting

    def submit(self, work: Callable[[], R], instead: R) -> int:
        """Have it done, and return its number. `instead` is its outcome if that fails, or if too many wait."""
        with self._lock:
            self._last += 1
            number = self._last
            accepted = self._waiting < WAITING_MAX
            self._waiting += accepted
        if accepted:
            self._pool.submit(self._work, number, work, instead)
        else:
            self._finish(number, instead)
        return number

    def _work(self, number: int, work: Callable[[], R], instead: R) -> None:
        outcome = instead
        try:
            if not self._stopped:
                outcome = work()
        except Exception as error:  # noqa: BLE001 - LMCache would wait for ever for a task that is never done
            self._failed(error)
        with self._lock:
            self._waiting -= 1
        self._finish(number, outcome)

    def _finish(self, number: int, outcome: R) -> None:
        with self._lock:
            self._done[number] = outcome
            if len(self._done) > KEPT_MAX:
                self._done.popitem(last=False)
        self._notifier.notify()

    def pop(self, number: int) -> R | None:
        """The outcome of one, once; None while it is not done."""
        with self._lock:
            return self._done.pop(number, None)

    def pop_all(self) -> dict[int, R]:
        """The outcomes of all that are done, once."""
        with self._lock:
            done, self._done = self._done, OrderedDict()
        return dict(done)

    def stop(self) -> None:
        """What has not begun fails."""
        self._stopped = True

    def close(self) -> None:
        """The pool has ended: nothing is told any more."""
        self._notifier.close()
