"""Communicator: how the ranks of a group exchange tensors.

Both sides know the length of every message from the layouts, so nothing is padded, and an empty
message is not sent. Tensors that are sent or filled are contiguous. Every wait has a deadline: a
peer that died, raised or is stuck makes the others raise GroupFailed. A group that failed stays so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Return when all its buffers may be used again. Raises GroupFailed."""
        ...


class Communicator(Protocol):
    """One rank's end of the group. Ranks call the same operations in the same order, parts' and the whole's alike."""

    @property
    def name(self) -> str:
        """What carries the bytes: "local", "gloo", "nccl" or "shm"."""
        ...

    @property
    def rank(self) -> int:
        """This rank, 0 <= rank < size."""
        ...

    @property
    def size(self) -> int:
        """Ranks in the group."""
        ...

    def shift(self, send: Tensor, receive: Tensor) -> Work:
        """Start sending `send` to rank + 1 and filling `receive` from rank - 1. Raises GroupFailed."""
        ...

    def all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Work:
        """Start sending send[r] to rank r and filling receive[r] from rank r; the own entry is copied.

        Lengths may differ. Raises GroupFailed.
        """
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Everyone's tensor, in rank order; all have the same shape. Raises GroupFailed."""
        ...

    def all_reduce(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with the sum of everyone's, the same bits on all ranks.

        Adds in rank order in float32 (float64 tensors in float64) and rounds once. Raises GroupFailed.
        """
        ...

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite `tensor` with that of rank `source`. Raises GroupFailed."""
        ...

    def barrier(self) -> None:
        """Return when all ranks have called. Raises GroupFailed."""
        ...

    def split(self, parts: Sequence[Sequence[int]]) -> Communicator:
        """This rank's part of a partition of the ranks into ascending parts, as a communicator of its own.

        Only a whole group splits. A part shares the fate of the whole: aborting either aborts both.
        Raises GroupFailed.
        """
        ...

    def abort(self, reason: str) -> None:
        """Leave for good, so that the others fail now and not at their deadline."""
        ...


def part_of(rank: int, size: int, parts: Sequence[Sequence[int]]) -> int:
    """The index of the part that holds `rank`; asserts that `parts` partition range(size), each ascending."""
    assert sorted(member for part in parts for member in part) == list(range(size)), f"{parts} is no partition"
    assert all(list(part) == sorted(part) for part in parts), f"a part of {parts} is not ascending"
    return next(index for index, part in enumerate(parts) if rank in part)
