"""Exact ring pass-KV attention: queries stay, KV goes round (arXiv 2411.01783, algorithm 2, without its padding).

Shapes: H query heads, Hkv kv heads, T query tokens of this rank, S rows, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attend import attend_segment
from .band import causal
from .communicator import Communicator, Work
from .kernels.kernel import Kernel
from .merge import Accumulator
from .positions import Positions
from .segment import KVSegment, span_tokens
from .share import SequenceShare, starts_of


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
    assert all(len(share.held) == communicator.size for share in batch), "shares name what every rank holds"
    batch = [share.within_reach(window) for share in batch]
    starts = starts_of(batch, rank)
    assert query.shape[1] == starts[-1], "the batch names every query"
    positions = [Positions(share.queries[rank]) for share in batch]
    value_dim = batch[0].segments[0].value.shape[2]
    total = Accumulator(query.shape[0], query.shape[1], value_dim, query.device)
    ring = _Ring(communicator, batch)
    for hop in range(communicator.size):
        # The next transfer starts before this hop's compute, which hides it where hardware allows.
        work = ring.advance(hop)
        for index, segments in enumerate(ring.current(hop)):
            mine = query[:, starts[index] : starts[index + 1]]
            for segment in segments:
                attend_segment(total, starts[index], kernel, mine, positions[index], segment, causal(window))
        if work is not None:
            work.wait()
    return total.result().out


class _Ring:
    """The KV messages of one ring pass: at hop j a rank holds what began on rank (rank - j) mod size."""

    def __init__(self, communicator: Communicator, batch: Sequence[SequenceShare]) -> None:
        self._communicator = communicator
        self._batch = batch
        first = batch[0].segments[0]
        self._shape = (first.key.shape[0], first.key.shape[2], first.value.shape[2])
        self._buffers: list[Tensor] = []
        if communicator.size > 1:
            own = _pack([segment for share in batch for segment in share.segments])
            room = max(self._elements(rank) for rank in range(communicator.size))
            # Two receive buffers: one is computed on and sent while the other fills.
            self._buffers = [own, *(own.new_empty(room) for _ in range(min(2, communicator.size - 1)))]

    def _source(self, hop: int) -> int:
        return (self._communicator.rank - hop) % self._communicator.size

    def _elements(self, rank: int) -> int:
        kv_heads, dim, value_dim = self._shape
        tokens = sum(span_tokens(spans) for share in self._batch for spans in share.held[rank])
        return tokens * kv_heads * (dim + value_dim)

    def _message(self, hop: int) -> Tensor:
        index = 0 if hop == 0 else 1 + (hop - 1) % 2
        return self._buffers[index][: self._elements(self._source(hop))]

    def advance(self, hop: int) -> Work | None:
        """Start moving hop's message on; None at the last hop."""
        if hop + 1 == self._communicator.size:
            return None
        return self._communicator.shift(self._message(hop), self._message(hop + 1))

    def current(self, hop: int) -> list[Sequence[KVSegment]]:
        """The segments that this rank holds of each sequence at `hop`."""
        if hop == 0:
            return [share.segments for share in self._batch]
        return self._unpack(self._message(hop), self._source(hop))

    def _unpack(self, message: Tensor, source: int) -> list[Sequence[KVSegment]]:
        """Views of the segments in a message that began on rank `source`."""
        kv_heads, dim, value_dim = self._shape
        sequences: list[Sequence[KVSegment]] = []
        offset = 0
        for share in self._batch:
            segments = []
            for spans in share.held[source]:
                tokens = span_tokens(spans)
                parts = []
                for width in (dim, value_dim):
                    size = kv_heads * tokens * width
                    parts.append(message[offset : offset + size].view(kv_heads, tokens, width))
                    offset += size
                segments.append(KVSegment(parts[0], parts[1], spans))
            sequences.append(segments)
        return sequences


def _pack(segments: Sequence[KVSegment]) -> Tensor:
    """One flat message: key then value of each segment."""
    return torch.cat([part.reshape(-1) for segment in segments for part in (segment.key, segment.value)])
