"""JobQueue: requests that wait for their turn with the one group, bounded, each with a deadline.

Whoever asks iterates over the events of its job, on a thread of its own; one worker takes the jobs. An iterator that is
closed takes its job out of the queue; the worker of one that runs already may find it abandoned, and stop.

Questions on the document that is answered next are taken together before others, so that one reattach serves many.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ..kvstore.clock import Clock
from ..kvstore.errors import DeadlineExceeded, HoldfastError, RunnerBusy
from .runner_wire import FINAL, AnyEvent, AskRequest, IngestRequest, Waiting

HEARTBEAT_SECONDS: Final = 1.0
WAITING_LIMIT: Final = 32
TOGETHER: Final = 8  # jobs that run as one


class AbandonedError(Exception):
    """Whoever asked has gone: raised from callbacks, to stop a call that nobody waits for."""


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way. The worker calls `tell`, ending with a final event, or `fail`, exactly once."""

    request: IngestRequest | AskRequest
    deadline_ns: int
    abandoned: bool = False
    _said: queue.SimpleQueue[AnyEvent | HoldfastError] = field(default_factory=queue.SimpleQueue)

    def tell(self, event: AnyEvent) -> None:
        """Say something to whoever asked."""
        self._said.put(event)

    def fail(self, error: HoldfastError) -> None:
        """It ended badly."""
        self._said.put(error)

    def heard(self, seconds: float) -> AnyEvent | None:
        """The next event, None when there is none for that long. Raises what the job failed with."""
        try:
            said = self._said.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(said, HoldfastError):
            raise said
        return said


class Expected(NamedTuple):
    """Questions on one document that wait, and how long the first of those who ask will."""

    queries: int
    wait_seconds: float


class Foreseen(NamedTuple):
    """By document: questions that wait; and the documents of those that are being answered."""

    waiting: dict[str, Expected]
    running: frozenset[str]


def _nothing() -> None:
    """Nobody wants to know."""


class JobQueue:
    """First come, first served. `changed` hears, on whatever thread, when a job came, or left without its turn."""

    def __init__(self, clock: Clock, limit: int = WAITING_LIMIT, changed: Callable[[], None] = _nothing) -> None:
        self._clock = clock
        self._changed_hook = changed
        self._limit = limit
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._refusal: HoldfastError | None = None

    # For whoever asks --------------------------------------------------------------------------

    def events(self, request: IngestRequest | AskRequest) -> Generator[AnyEvent]:
        """Everything that is said of a request, to its last event.

        Raises what it failed with: RunnerBusy, DeadlineExceeded when its turn did not come in time, and so on.
        """
        job = self._add(request)
        try:
            self._tell_changed()
            while True:
                said = job.heard(HEARTBEAT_SECONDS)
                if said is not None:
                    yield said
                    if isinstance(said, FINAL):
                        return
                elif (ahead := self._ahead(job)) is not None:
                    yield Waiting(ahead=ahead)
        finally:
            self._drop(job)

    def _add(self, request: IngestRequest | AskRequest) -> Job:
        job = Job(request, self._clock.monotonic_ns() + int(request.wait_seconds * 1e9))
        with self._changed:
            if self._refusal is not None:
                raise self._refusal
            if len(self._waiting) >= self._limit:
                raise RunnerBusy(f"{len(self._waiting)} requests wait for the runner already; try again later")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def foreseen(self) -> Foreseen:
        """Which documents questions are about."""
        with self._changed:
            waiting: dict[str, Expected] = {}
            now_ns = self._clock.monotonic_ns()
            for job in self._waiting:
                if isinstance(job.request, AskRequest):
                    known = waiting.get(job.request.document)
                    left = (job.deadline_ns - now_ns) / 1e9
                    count, least = (known.queries, known.wait_seconds) if known is not None else (0, left)
                    waiting[job.request.document] = Expected(count + 1, min(least, left))
            running = (job.request.document for job in self._running if isinstance(job.request, AskRequest))
            return Foreseen(waiting, frozenset(running))

    def _ahead(self, job: Job) -> int | None:
        """How many come before it; None when it runs. Raises DeadlineExceeded when it has waited long enough."""
        with self._changed:
            if job not in self._waiting:
                return None
            ahead = self._waiting.index(job) + len(self._running)
        if self._clock.monotonic_ns() >= job.deadline_ns:
            raise DeadlineExceeded(
                f"its turn did not come within {job.request.wait_seconds:g} s: {ahead} requests are before it"
            )
        return ahead

    def _drop(self, job: Job) -> None:
        with self._changed:
            job.abandoned = True
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        self._tell_changed()

    def _tell_changed(self) -> None:
        """What waits behind something has changed; what is taken at once needs no foretelling."""
        if self.busy:
            self._changed_hook()

    # For the worker ----------------------------------------------------------------------------

    def take(self, seconds: float, joins: Callable[[Job, Job], bool]) -> list[Job]:
        """The first job, with those that wait behind it and may join it, those on its document before others.

        None when none came for that long. They run until the next call.
        """
        with self._changed:
            self._running.clear()
            self._changed.wait_for(lambda: self._waiting or self._refusal is not None, seconds)
            if self._waiting:
                first = self._waiting.popleft()
                others = [job for job in self._waiting if joins(first, job)]
                others.sort(key=lambda job: not _same_document(first, job))
                self._running = [first, *others][:TOGETHER]
                for job in self._running[1:]:
                    self._waiting.remove(job)
            return list(self._running)

    def give_back(self, jobs: Sequence[Job]) -> None:
        """They could not be carried out together with the others: they are the next, unless nobody waits any more."""
        with self._changed:
            for job in jobs:
                self._running.remove(job)
            left = [job for job in jobs if not job.abandoned]
            if self._refusal is not None:
                for job in left:
                    job.fail(self._refusal)
                return
            self._waiting.extendleft(reversed(left))

    def close(self, refusal: HoldfastError) -> None:
        """Refuse everything that waits, and everything that comes."""
        with self._changed:
            self._refusal = refusal
            for job in self._waiting:
                job.fail(refusal)
            self._waiting.clear()
            self._changed.notify_all()

    def end(self, refusal: HoldfastError) -> None:
        """The worker has ended, in whatever way: nobody waits any more for what it would have said."""
        self.close(refusal)
        with self._changed:
            for job in self._running:
                job.fail(refusal)
            self._running.clear()

    @property
    def waiting(self) -> int:
        """How many wait."""
        with self._changed:
            return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether anything runs."""
        with self._changed:
            return bool(self._running)


def _same_document(first: Job, other: Job) -> bool:
    one, two = first.request, other.request
    return isinstance(one, AskRequest) and isinstance(two, AskRequest) and one.document == two.document
