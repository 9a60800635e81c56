"""DistributedCommunicator: ranks are processes joined by torch.distributed (gloo or NCCL)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..kvstore.errors import GroupFailed, MissingExtra

_LOCAL_METHODS = ("file://", "tcp://127.", "tcp://localhost")


@contextmanager
def _peer_errors(rank: int, what: str) -> Iterator[None]:
    """Name a peer's death or a passed deadline, which torch reports as RuntimeError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # ValueError: the process group is already closed
        raise GroupFailed(f"rank {rank}: {what}: {error}") from error


@dataclass(frozen=True, slots=True)
class _DistributedWork:
    rank: int
    works: list[dist.Work]

    def wait(self) -> None:
        """See Work."""
        with _peer_errors(self.rank, "ring transfer"):
            for work in self.works:
                work.wait()


class DistributedCommunicator:
    """See Communicator. One per process: it owns torch's default process group until closed."""

    def __init__(self, rank: int, size: int, init_method: str, device: torch.device, deadline_s: float = 60.0) -> None:
        """Join the group; blocks until all ranks have.

        `init_method` is torch's: file:///path (a new path for every group; all ranks on this machine) or tcp://h:p.
        Raises GroupFailed when the others do not come before the deadline.
        """
        if not dist.is_available():
            raise MissingExtra("this torch has no torch.distributed: pip install 'holdfast[runner]'")
        if init_method.startswith(_LOCAL_METHODS):
            # Without it gloo resolves the host name, which in containers may lead to an interface
            # nobody hears.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.rank = rank
        self.size = size
        self.device = device
        backend = "nccl" if device.type == "cuda" else "gloo"
        with _peer_errors(rank, "joining"):
            dist.init_process_group(
                backend,
                init_method=init_method,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=deadline_s),
            )

    def shift(self, send: Tensor, receive: Tensor) -> _DistributedWork:
        """See Communicator."""
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        if self.size == 1:
            receive.copy_(send)
            return _DistributedWork(self.rank, [])
        operations = []
        if send.numel():
            operations.append(dist.P2POp(dist.isend, send, following))
        if receive.numel():
            operations.append(dist.P2POp(dist.irecv, receive, previous))
        if not operations:
            return _DistributedWork(self.rank, [])
        with _peer_errors(self.rank, "ring transfer"):
            return _DistributedWork(self.rank, list(dist.batch_isend_irecv(operations)))

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See Communicator."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with _peer_errors(self.rank, "all-gather"):
            dist.all_gather(gathered, tensor)
        return gathered

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """See Communicator."""
        with _peer_errors(self.rank, "broadcast"):
            dist.broadcast(tensor, source)

    def barrier(self) -> None:
        """See Communicator."""
        self.all_gather(torch.zeros(1, device=self.device))

    def abort(self, reason: str) -> None:
        """See Communicator. The others see closed connections; `reason` stays in this process."""
        self.close()

    def close(self) -> None:
        """Leave the group. Afterwards every operation raises GroupFailed."""
        if dist.is_initialized():
            dist.destroy_process_group()
