"""Communicator: how the ranks of a group exchange tensors.

Both sides know the length of every message from the layouts, so nothing is padded, and an empty
message is not sent. Every wait has a deadline: a peer that died, raised or is stuck makes the
others raise GroupFailed.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Return when both buffers may be used again. Raises GroupFailed."""
        ...


class Communicator(Protocol):
    """One rank's end of the group. Ranks call the same operations in the same order."""

    @property
    def rank(self) -> int:
        """This rank, 0 <= rank < size."""
        ...

    @property
    def size(self) -> int:
        """Ranks in the group."""
        ...

    def shift(self, send: Tensor, receive: Tensor) -> Work:
        """Start sending `send` to rank + 1 and filling `receive` from rank - 1 (contiguous)."""
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Everyone's tensor, in rank order; all have the same shape. Raises GroupFailed."""
        ...

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite `tensor` with that of rank `source`. Raises GroupFailed."""
        ...

    def barrier(self) -> None:
        """Return when all ranks have called. Raises GroupFailed."""
        ...

    def abort(self, reason: str) -> None:
        """Leave for good, so that the others fail now and not at their deadline."""
        ...
