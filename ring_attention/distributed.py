"""DistributedCommunicator: ranks are processes joined by torch.distributed (gloo or NCCL)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..kvstore.errors import GroupFailed, MissingExtra
from .collectives import Collectives, Message
from .communicator import part_of

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
        with _peer_errors(self.rank, "transfer"):
            for work in self.works:
                work.wait()


class _Part(Collectives):
    """The ranks of one torch process group: the whole or a part of it."""

    def __init__(
        self, rank: int, size: int, device: torch.device, deadline: timedelta, groups: list[dist.ProcessGroup]
    ) -> None:
        self.name = _backend(device)
        self.rank = rank
        self.size = size
        self.device = device
        self._deadline = deadline
        # The whole's and its parts', until one of them is closed: connections last as long as some reference.
        self._groups = groups
        self._index = len(groups) - 1
        if self.name == "nccl":
            # NCCL connects in the first collective, which all must enter; an exchange may leave ranks out.
            with _peer_errors(rank, "joining"):
                dist.all_reduce(torch.zeros(1, device=device), group=groups[-1])

    @property
    def _group(self) -> dist.ProcessGroup:
        if not self._groups:
            raise GroupFailed(f"rank {self.rank}: the group was left; form a new one")
        return self._groups[self._index]

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> _DistributedWork:
        group = self._group
        with _peer_errors(self.rank, "transfer"):
            operations = [
                dist.P2POp(operation, tensor, group=group, group_peer=peer)
                for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
                for peer, tensor in messages
            ]
            return _DistributedWork(self.rank, list(dist.batch_isend_irecv(operations)) if operations else [])

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See Communicator. The backend's own: gloo's exchanges take several times the processor time."""
        gathered = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for _ in range(self.size)]
        group = self._group
        with _peer_errors(self.rank, "all-gather"):
            dist.all_gather(gathered, tensor.contiguous(), group=group)
        return gathered

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """See Communicator. The backend's own."""
        whole = tensor.contiguous()
        group = self._group
        with _peer_errors(self.rank, "broadcast"):
            dist.broadcast(whole, group=group, group_src=source)
        if not tensor.is_contiguous():
            tensor.copy_(whole)

    def split(self, parts: Sequence[Sequence[int]]) -> _Part:
        """See Communicator."""
        assert self._index == 0, "only a whole group splits"
        index = part_of(self.rank, self.size, parts)
        with _peer_errors(self.rank, "splitting"):
            # Every rank makes every group, in the same order: torch asks for it.
            groups = [dist.new_group(list(part), timeout=self._deadline) for part in parts]
        members = parts[index]
        self._groups.append(groups[index])
        return _Part(members.index(self.rank), len(members), self.device, self._deadline, self._groups)

    def abort(self, reason: str) -> None:
        """See Communicator. The others see closed connections; `reason` stays in this process."""
        self.close()

    def close(self) -> None:
        """Leave the group. Afterwards every operation raises GroupFailed."""
        if self._groups:
            self._groups.clear()
            dist.destroy_process_group()


class DistributedCommunicator(_Part):
    """See Communicator. One per process: it owns torch's default process group until closed.

    A rank notices the end of one that it exchanges nothing with when the others, who do, abort.
    """

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
        # Otherwise NCCL's waits only order streams, and at a deadline its watchdog ends the process.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        deadline = timedelta(seconds=deadline_s)
        with _peer_errors(rank, "joining"):
            dist.init_process_group(
                _backend(device), init_method=init_method, rank=rank, world_size=size, timeout=deadline
            )
        whole = dist.group.WORLD
        assert whole is not None, "just made"
        super().__init__(rank, size, device, deadline, [whole])


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
