"""Collectives: a communicator's operations, all made of one: exchange messages with peers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from .communicator import Work

Message = tuple[int, Tensor]  # a peer, and what is sent to it or comes from it

_WHOLE_BYTES: Final = 64 << 10  # up to here a sum is one exchange of everything: latency counts, not bytes


class Collectives(ABC):
    """See Communicator, of which `exchange`, `split` and `abort` are left to do."""

    name: str
    rank: int
    size: int
    device: torch.device

    @abstractmethod
    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        """Start all these transfers with other ranks: contiguous tensors, none empty; perhaps no transfer."""

    def shift(self, send: Tensor, receive: Tensor) -> Work:
        """See Communicator."""
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return self._start([(following, send)], [(previous, receive)])

    def all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Work:
        """See Communicator."""
        assert len(send) == len(receive) == self.size, "a tensor for each rank, and from each"
        return self._start(list(enumerate(send)), list(enumerate(receive)))

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See Communicator."""
        gathered = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for _ in range(self.size)]
        self.all_to_all([tensor.contiguous()] * self.size, gathered).wait()
        return gathered

    def all_reduce(self, tensor: Tensor) -> None:
        """See Communicator.

        A large sum goes in two exchanges: each rank adds one piece and gives it to everyone, so that
        a rank moves 2(N-1)/N of the tensor, not N-1 of it.
        """
        assert tensor.is_floating_point(), tensor.dtype
        if self.size == 1 or not tensor.numel():
            return
        if tensor.numel() * tensor.element_size() <= _WHOLE_BYTES:
            tensor.copy_(_added(self.all_gather(tensor)))
            return
        whole = tensor.contiguous().view(-1)
        pieces = list(whole.tensor_split(self.size))
        mine = pieces[self.rank]
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self.all_to_all(pieces, parts).wait()
        mine.copy_(_added(parts))
        self.all_to_all([mine.clone()] * self.size, pieces).wait()
        if not tensor.is_contiguous():
            tensor.copy_(whole.view(tensor.shape))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """See Communicator."""
        others = [rank for rank in range(self.size) if rank != source]
        if self.rank == source:
            self._start([(rank, tensor.contiguous()) for rank in others], []).wait()
            return
        whole = tensor.contiguous()
        self._start([], [(source, whole)]).wait()
        if not tensor.is_contiguous():
            tensor.copy_(whole)

    def barrier(self) -> None:
        """See Communicator."""
        self.all_gather(torch.zeros(1, dtype=torch.uint8, device=self.device))

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        """Copy what stays here, and exchange the rest."""
        assert all(tensor.is_contiguous() for _, tensor in (*sends, *receives)), "messages are contiguous"
        kept = {rank: tensor for rank, tensor in sends if rank == self.rank}
        for rank, tensor in receives:
            if rank == self.rank and tensor.numel():
                tensor.copy_(kept[rank])
        return self._exchange(self._leaving(sends), self._leaving(receives))

    def _leaving(self, messages: Sequence[Message]) -> list[Message]:
        return [(rank, tensor) for rank, tensor in messages if rank != self.rank and tensor.numel()]


def _added(parts: Sequence[Tensor]) -> Tensor:
    """The sum in rank order, in float32 or wider."""
    total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total
