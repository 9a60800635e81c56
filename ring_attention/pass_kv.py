"""Exact ring pass-KV attention: queries stay, KV goes round (arXiv 2411.01783, algorithm 2, without its padding).

Shapes: H query heads, T query tokens of this rank, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .communicator import Communicator, Work
from .kernels.kernel import Kernel
from .kv_message import KVMessages
from .packed import PackedQueries
from .segment import KVSegment
from .share import SequenceShare, value_dim_of, within_reach


def pass_kv(
    communicator: Communicator,
    kernel: Kernel,
    query: Tensor,
    batch: Sequence[SequenceShare],
    window: int | None = None,
) -> Tensor:
    """Causal attention of query [H, T, D], packed in batch order, over the KV of all ranks; float32 [H, T, Dv].

    A query sees keys of its sequence at positions up to its own, the last `window` of them if there
    is one. Raises ConfigError, GroupFailed.
    """
    rank = communicator.rank
    batch = within_reach(batch, window, communicator.size)
    queries = PackedQueries(kernel, query, [share.positions(rank) for share in batch], value_dim_of(batch), window)
    ring = _Ring(communicator, batch)
    for hop in range(communicator.size):
        # The next transfer starts before this hop's compute, which hides it where hardware allows.
        work = ring.advance(hop)
        queries.attend(ring.current(hop))
        if work is not None:
            work.wait()
    return queries.result().out


class _Ring:
    """The KV messages of one ring pass: at hop j a rank holds what began on rank (rank - j) mod size."""

    def __init__(self, communicator: Communicator, batch: Sequence[SequenceShare]) -> None:
        self._communicator = communicator
        self._batch = batch
        self._messages = KVMessages(batch)
        self._buffers: list[Tensor] = []
        if communicator.size > 1:
            own = self._messages.pack()
            room = max(self._messages.elements(rank) for rank in range(communicator.size))
            # Two receive buffers: one is computed on and sent while the other fills.
            self._buffers = [own, *(self._messages.empty(room) for _ in range(min(2, communicator.size - 1)))]

    def _source(self, hop: int) -> int:
        return (self._communicator.rank - hop) % self._communicator.size

    def _message(self, hop: int) -> Tensor:
        index = 0 if hop == 0 else 1 + (hop - 1) % 2
        return self._buffers[index][: self._messages.elements(self._source(hop))]

    def advance(self, hop: int) -> Work | None:
        """Start moving hop's message on; None at the last hop."""
        if hop + 1 == self._communicator.size:
            return None
        return self._communicator.shift(self._message(hop), self._message(hop + 1))

    def current(self, hop: int) -> list[Sequence[KVSegment]]:
        """The segments that this rank holds of each sequence at `hop`."""
        if hop == 0:
            return [share.segments for share in self._batch]
        return self._messages.unpack(self._message(hop), self._source(hop))
