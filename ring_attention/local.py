"""LocalCommunicator: ranks are threads of one process. For tests, virtual ranks on one GPU, and a group of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition
from typing import TypeVar

import torch
from torch import Tensor

from ..kvstore.errors import GroupFailed
from .collectives import Collectives, Message
from .communicator import part_of

Result = TypeVar("Result")
Address = tuple[int, int, int]  # from rank, to rank, number of the message on that way


class _Part:
    """The mail between the ranks of a group or of a part of it."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = tuple(members)  # ranks of the whole group, by rank of this part
        self.mail: dict[Address, Tensor] = {}


class _Group:
    """What all ranks share: mail and why the group failed, under one condition."""

    def __init__(self, size: int, deadline_s: float) -> None:
        assert size >= 1, size
        self.deadline_s = deadline_s
        self.changed = Condition()
        self.whole = _Part(range(size))
        self.parts: dict[tuple[int, tuple[int, ...]], _Part] = {}
        self.failure = ""

    def check(self) -> None:
        """Raise GroupFailed if some rank has failed; holding the condition."""
        if self.failure:
            raise GroupFailed(self.failure)

    def await_(self, ready: Callable[[], bool], what: str) -> None:
        """Wait, holding the condition, until `ready`. Raises GroupFailed."""
        in_time = self.changed.wait_for(lambda: bool(self.failure) or ready(), self.deadline_s)
        if not in_time:
            self.failure = f"{what} took longer than {self.deadline_s} s"
            self.changed.notify_all()
        self.check()


@dataclass(slots=True)
class _LocalWork:
    group: _Group
    mail: dict[Address, Tensor]
    awaited: list[tuple[Address, Tensor]]

    def wait(self) -> None:
        """See Work."""
        while self.awaited:
            self._take(*self.awaited.pop())

    def _take(self, address: Address, receive: Tensor) -> None:
        with self.group.changed:
            self.group.await_(lambda: address in self.mail, f"a message to rank {address[1]}")
            message = self.mail.pop(address)
        assert message.shape == receive.shape, "both sides know the length of a message"
        receive.copy_(message)


@dataclass(slots=True)
class LocalCommunicator(Collectives):
    """See Communicator."""

    rank: int
    group: _Group
    part: _Part
    device: torch.device = field(default=torch.device("cpu"), init=False)
    name: str = field(default="local", init=False)
    _numbers: Counter[tuple[int, int]] = field(default_factory=Counter, init=False)
    _splits: int = field(default=0, init=False)

    @property
    def size(self) -> int:  # type: ignore[override]
        """See Communicator."""
        return len(self.part.members)

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> _LocalWork:
        # Clones, because the sender may reuse its buffer before the receiver has looked.
        posted = [(self._address(self.rank, peer), tensor.clone()) for peer, tensor in sends]
        awaited = [(self._address(peer, self.rank), tensor) for peer, tensor in receives]
        with self.group.changed:
            self.group.check()
            self.part.mail.update(posted)
            self.group.changed.notify_all()
        return _LocalWork(self.group, self.part.mail, awaited)

    def _address(self, source: int, target: int) -> Address:
        self._numbers[source, target] += 1
        return source, target, self._numbers[source, target]

    def split(self, parts: Sequence[Sequence[int]]) -> LocalCommunicator:
        """See Communicator."""
        assert self.part is self.group.whole, "only a whole group splits"
        members = tuple(parts[part_of(self.rank, self.size, parts)])
        self._splits += 1
        with self.group.changed:
            self.group.check()
            part = self.group.parts.setdefault((self._splits, members), _Part(members))
        return LocalCommunicator(members.index(self.rank), self.group, part)

    def abort(self, reason: str) -> None:
        """See Communicator."""
        with self.group.changed:
            self.group.failure = self.group.failure or f"rank {self.part.members[self.rank]}: {reason}"
            self.group.changed.notify_all()


def local_group(size: int, deadline_s: float = 60.0) -> list[LocalCommunicator]:
    """The communicators of a new group of threads."""
    group = _Group(size, deadline_s)
    return [LocalCommunicator(rank, group, group.whole) for rank in range(size)]


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
