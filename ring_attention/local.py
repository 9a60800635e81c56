"""LocalCommunicator: ranks are threads of one process. For tests, and for a group of one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition
from typing import TypeVar

from torch import Tensor

from ..kvstore.errors import GroupFailed

Result = TypeVar("Result")


class _Group:
    """What the ranks share: ring mailboxes, collective rounds, and why the group failed, all under one condition."""

    def __init__(self, size: int, deadline_s: float) -> None:
        assert size >= 1, size
        self.size = size
        self.deadline_s = deadline_s
        self.changed = Condition()
        self.inboxes: list[deque[Tensor]] = [deque() for _ in range(size)]
        self.rounds: dict[int, dict[int, Tensor]] = {}
        self.readers: dict[int, int] = {}
        self.failure = ""

    def await_(self, ready: Callable[[], bool], what: str) -> None:
        """Wait, holding the condition, until `ready`. Raises GroupFailed."""
        in_time = self.changed.wait_for(lambda: bool(self.failure) or ready(), self.deadline_s)
        if not in_time:
            self.failure = f"{what} took longer than {self.deadline_s} s"
            self.changed.notify_all()
        if self.failure:
            raise GroupFailed(self.failure)


@dataclass(frozen=True, slots=True)
class _LocalWork:
    group: _Group
    rank: int
    receive: Tensor

    def wait(self) -> None:
        """See Work."""
        if not self.receive.numel():
            return
        inbox = self.group.inboxes[self.rank]
        with self.group.changed:
            self.group.await_(lambda: bool(inbox), f"a message to rank {self.rank}")
            message = inbox.popleft()
        assert message.shape == self.receive.shape, "both sides know the length of a message"
        self.receive.copy_(message)


@dataclass(slots=True)
class LocalCommunicator:
    """See Communicator."""

    rank: int
    group: _Group
    _round: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        """See Communicator."""
        return self.group.size

    def shift(self, send: Tensor, receive: Tensor) -> _LocalWork:
        """See Communicator."""
        if send.numel():
            message = send.clone()  # the sender may reuse its buffer before the receiver has looked
            with self.group.changed:
                self.group.inboxes[(self.rank + 1) % self.size].append(message)
                self.group.changed.notify_all()
        return _LocalWork(self.group, self.rank, receive)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See Communicator."""
        group, number = self.group, self._round
        self._round += 1
        with group.changed:
            gathered = group.rounds.setdefault(number, {})
            gathered[self.rank] = tensor.clone()
            group.changed.notify_all()
            group.await_(lambda: len(gathered) == group.size, f"collective {number} at rank {self.rank}")
            group.readers[number] = group.readers.get(number, 0) + 1
            if group.readers[number] == group.size:
                del group.rounds[number], group.readers[number]
        return [gathered[rank] for rank in range(group.size)]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """See Communicator."""
        tensor.copy_(self.all_gather(tensor)[source])

    def barrier(self) -> None:
        """See Communicator."""
        self.all_gather(Tensor())

    def abort(self, reason: str) -> None:
        """See Communicator."""
        with self.group.changed:
            self.group.failure = self.group.failure or f"rank {self.rank}: {reason}"
            self.group.changed.notify_all()


def local_group(size: int, deadline_s: float = 60.0) -> list[LocalCommunicator]:
    """The communicators of a new group of threads."""
    group = _Group(size, deadline_s)
    return [LocalCommunicator(rank, group) for rank in range(size)]


def run_ranks(size: int, function: Callable[[LocalCommunicator], Result], deadline_s: float = 60.0) -> list[Result]:
    """Run `function` on a thread per rank and return the results in rank order.

    A rank that raises ends the group; the first error that is not an echo of another rank's is
    raised here.
    """
    ranks = local_group(size, deadline_s)

    def guarded(communicator: LocalCommunicator) -> Result:
        finished = False
        try:
            result = function(communicator)
            finished = True
            return result
        finally:
            if not finished:
                communicator.abort("raised")

    with ThreadPoolExecutor(size, "rank") as pool:
        futures = [pool.submit(guarded, communicator) for communicator in ranks]
    errors = [error for future in futures if (error := future.exception()) is not None]
    errors.sort(key=lambda error: isinstance(error, GroupFailed))
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
