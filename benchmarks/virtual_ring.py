"""A ring of virtual ranks in one process, on one GPU: messages are copies on a stream beside the one that computes.

Ranks are threads that take turns: one runs until it waits for a message, so that kernels of all ranks queue up on the
same stream. On CPU tensors the same code runs without streams: that is how it is tested where there is no GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from threading import Condition
from typing import Any, Final, TypeVar

import torch
from holdfast.kvstore.errors import GroupFailed
from holdfast.ring_attention.collectives import Collectives, Message
from torch import Tensor

Result = TypeVar("Result")
Address = tuple[int, int, int]  # from rank, to rank, number of the message on that way
DEADLINE_SECONDS: Final = 60.0


class Transfers(Enum):
    """Whether messages are copied. Without, results are wrong, and times those of computing alone."""

    COPIED = "copied"
    LEFT_OUT = "left out"


@dataclass
class Transfer:
    """A message: both ends, after which events the copy may begin, and the events around it."""

    source: Tensor | None = None
    target: Tensor | None = None
    after: list[Any] = field(default_factory=list)
    begun: Any = None
    ended: Any = None
    started: bool = False


class Stage:
    """What virtual ranks share. `copy_ms` and `exposed_ms` are known after `torch.cuda.synchronize`."""

    def __init__(self, device: torch.device, transfers: Transfers) -> None:
        self.device = device
        self.turn = Condition()
        self.transfers: dict[Address, Transfer] = {}
        self.failed = False
        self.copies: list[Transfer] = []
        self.waits: list[tuple[Any, Any]] = []
        self._mode = transfers
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> Any:
        """An event behind all that was asked of the computing stream so far."""
        if self._side is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def offer(self, address: Address, *, source: Tensor | None = None, target: Tensor | None = None) -> Transfer:
        """One end of a message; the copy starts when both are known. Holding the turn."""
        transfer = self.transfers.setdefault(address, Transfer())
        if source is not None:
            transfer.source = source
        if target is not None:
            transfer.target = target
        transfer.after.append(self.mark())
        if transfer.source is not None and transfer.target is not None:
            del self.transfers[address]
            self._start(transfer, transfer.source, transfer.target)
            self.turn.notify_all()
        return transfer

    def _start(self, transfer: Transfer, source: Tensor, target: Tensor) -> None:
        transfer.started = True
        if self._mode is Transfers.LEFT_OUT:
            return
        with self._beside():
            for event in transfer.after:
                if self._side is not None:
                    self._side.wait_event(event)
            transfer.begun = self.mark()
            target.copy_(source, non_blocking=True)
            transfer.ended = self.mark()
        self.copies.append(transfer)

    def _beside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side) if self._side is not None else nullcontext()

    def finish(self, transfers: Sequence[Transfer]) -> None:
        """Let the computing stream wait for copies, and keep events around that."""
        if not self.turn.wait_for(lambda: self.failed or all(one.started for one in transfers), DEADLINE_SECONDS):
            raise GroupFailed(f"a message took longer than {DEADLINE_SECONDS} s")
        if self.failed:
            raise GroupFailed("another virtual rank raised")
        before = self.mark()
        for one in transfers:
            if one.ended is not None:
                torch.cuda.current_stream(self.device).wait_event(one.ended)
        self.waits.append((before, self.mark()))

    def copy_ms(self) -> float:
        """Of all copies, each by itself."""
        return float(sum(one.begun.elapsed_time(one.ended) for one in self.copies))

    def exposed_ms(self) -> float:
        """What the computing stream waited, and the little that two events cost."""
        return float(sum(before.elapsed_time(after) for before, after in self.waits))


@dataclass
class _Work:
    stage: Stage
    transfers: list[Transfer]

    def wait(self) -> None:
        self.stage.finish(self.transfers)


class VirtualRank(Collectives):
    """See Communicator."""

    def __init__(self, rank: int, size: int, stage: Stage) -> None:
        self.name = "virtual"
        self.rank, self.size, self.device = rank, size, stage.device
        self._stage = stage
        self._numbers: Counter[tuple[int, int]] = Counter()

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Work:
        sent = [self._stage.offer(self._address(self.rank, peer), source=tensor) for peer, tensor in sends]
        return _Work(
            self._stage,
            sent + [self._stage.offer(self._address(peer, self.rank), target=tensor) for peer, tensor in receives],
        )

    def _address(self, source: int, target: int) -> Address:
        self._numbers[source, target] += 1
        return source, target, self._numbers[source, target]

    def split(self, parts: Sequence[Sequence[int]]) -> VirtualRank:
        assert [list(part) for part in parts] == [list(range(self.size))], "virtual ranks form one group"
        return self

    def abort(self, reason: str) -> None:
        self._stage.failed = True


def run_virtual(size: int, stage: Stage, function: Callable[[VirtualRank], Result]) -> list[Result]:
    """The results of `function` by rank. What a rank raises ends all, and is raised here."""

    @torch.inference_mode()
    def ranked(rank: int) -> Result:
        with stage.turn:
            finished = False
            try:
                result = function(VirtualRank(rank, size, stage))
                finished = True
                return result
            finally:
                stage.failed |= not finished
                stage.turn.notify_all()

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(ranked, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    errors.sort(key=lambda error: isinstance(error, GroupFailed))
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
