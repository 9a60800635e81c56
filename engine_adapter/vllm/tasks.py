"""Tasks: work on behalf of requests, on threads of their own. Each ends once: by itself, or by being stopped.

The engine's thread never waits for the daemon here. It may wait for one piece of copying, when it takes blocks away.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, Generic, TypeVar

LOG: Final = logging.getLogger("vllm.holdfast")
R = TypeVar("R")


def use_all_cores() -> None:
    """Let this thread run where the process may that started this one.

    An engine on a CPU binds its own thread, and so those that it starts, to one core: they would share that one.
    """
    with suppress(OSError):  # then it stays where it is
        os.sched_setaffinity(0, os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))


class Stopped(Exception):
    """The request's blocks are not its own any more: touch nothing, report nothing."""


class Task(Generic[R]):
    """One load or save. Blocks of the engine are touched inside `touching` only."""

    def __init__(
        self,
        request: str,
        work: Callable[[Task[R]], R],
        failed: Callable[[Task[R], str], R],
        fence: Callable[[], None] | None = None,
    ) -> None:
        """`fence` waits until the request's blocks may be touched."""
        self.request = request
        self.started = time.monotonic()
        self.needs_blocks = True
        self._work = work
        self._failed = failed
        self._fence = fence
        self._changed = threading.Condition()
        self._touching = 0  # threads that do
        self._stopped = False

    @property
    def seconds(self) -> float:
        """Since it was asked for."""
        return time.monotonic() - self.started

    @contextmanager
    def touching(self) -> Iterator[None]:
        """Copy to or from the engine's blocks, a small piece; several threads may. Raises Stopped."""
        with self._changed:
            if self._stopped:
                raise Stopped
            self._touching += 1
        try:
            yield
        finally:
            with self._changed:
                self._touching -= 1
                self._changed.notify_all()

    def let_go(self) -> None:
        """The engine's blocks are not needed any more."""
        self.needs_blocks = False

    def stop(self) -> bool:
        """From now on nothing is touched; returns whether that is news."""
        with self._changed:
            news, self._stopped = not self._stopped, True
            self._changed.wait_for(lambda: not self._touching)
        return news

    def run(self) -> R | None:
        """Do the work; None when it was stopped."""
        try:
            with self.touching():
                pass  # it may have been stopped while it waited
            if self._fence is not None:
                self._fence()
            return self._work(self)
        except Stopped:
            return None
        except Exception as error:
            LOG.exception("holdfast: a bug ended the work for request %s", self.request)
            return self.failed(f"{type(error).__name__}: {error}")

    def failed(self, why: str) -> R:
        """What to report for it."""
        return self._failed(self, why)


class Tasks(Generic[R]):
    """At most `limit` tasks at once, on `threads` daemon threads, each for at most `seconds`."""

    def __init__(
        self, name: str, *, threads: int, limit: int, seconds: float, news: threading.Event | None = None
    ) -> None:
        """`news` is set whenever one has ended."""
        self._news = news if news is not None else threading.Event()
        self._name = name
        self._limit = limit
        self._seconds = seconds
        self._threads = threads
        self._started = False
        self._changed = threading.Condition()
        self._queue: deque[Task[R]] = deque()
        self._active: dict[str, list[Task[R]]] = {}
        self._ended: deque[R] = deque()  # what `take` has not taken; as many as were started at most
        self._closed = False

    def start(self, task: Task[R]) -> None:
        """Put it in the queue; when that is full, it has failed."""
        with self._changed:
            if sum(len(tasks) for tasks in self._active.values()) >= self._limit or self._closed:
                self._ended.append(task.failed(f"{self._limit} others wait already"))
                return
            self._active.setdefault(task.request, []).append(task)
            self._queue.append(task)
            if not self._started:
                self._started = True
                for number in range(self._threads):
                    name = f"holdfast-{self._name}-{number}"
                    threading.Thread(target=self._serve, name=name, daemon=True).start()
            self._changed.notify()

    def stop(self, request: str, why: str) -> None:
        """Take a request's blocks away: when this returns, they are touched no more. What needs none goes on."""
        with self._changed:
            tasks = [task for task in self._active.get(request, ()) if task.needs_blocks]
        self._stop(tasks, why)

    def _stop(self, tasks: list[Task[R]], why: str) -> None:
        for task in tasks:
            if task.stop():
                self._remove(task)
                self._end(task.failed(why))

    def needs_blocks(self, request: str) -> bool:
        """Whether the request's blocks are being read or written, or will be."""
        with self._changed:
            return any(task.needs_blocks for task in self._active.get(request, ()))

    def take(self) -> list[R]:
        """How tasks ended since the last call. Those beyond their time are stopped first."""
        with self._changed:
            late = [task for tasks in self._active.values() for task in tasks if task.seconds > self._seconds]
        self._stop(late, f"not within {self._seconds:g} s")
        with self._changed:
            found = list(self._ended)
            self._ended.clear()
        return found

    def close(self) -> None:
        """Stop everything; threads end when what they wait for does."""
        with self._changed:
            self._closed = True
            left = [task for tasks in self._active.values() for task in tasks]
            self._changed.notify_all()
        self._stop(left, "the engine shuts down")

    def _end(self, result: R) -> None:
        with self._changed:
            self._ended.append(result)
        self._news.set()

    def _serve(self) -> None:
        use_all_cores()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                task = self._queue.popleft()
            result = task.run()
            if result is not None and task.stop():
                self._remove(task)
                self._end(result)

    def _remove(self, task: Task[R]) -> None:
        with self._changed:
            left = [other for other in self._active.pop(task.request, []) if other is not task]
            if left:
                self._active[task.request] = left
            with suppress(ValueError):
                self._queue.remove(task)
