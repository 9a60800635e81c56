"""Exact ring pass-KV attention: queries stay, KV goes round (arXiv 2411.01783, algorithm 2, without its padding).

Shapes: H query heads, Hkv kv heads, T query tokens of this rank, S rows, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kvstore.layout import Span
from .communicator import Communicator, Work
from .kernels import Mask, attend
from .merge import Partial, identity, merge_into
from .segment import KVSegment, span_tokens

Held = Sequence[tuple[Span, ...]]  # the spans of each segment of one rank


def pass_kv(
    communicator: Communicator,
    query: Tensor,
    query_spans: Sequence[Span],
    segments: Sequence[KVSegment],
    held: Sequence[Held],
    kernel: str | None = None,
) -> Tensor:
    """Causal attention of query [H, T, D] over the KV of all ranks; float32 [H, T, Dv].

    `query_spans` are the ascending global positions of the queries, `segments` this rank's KV, and
    `held[r]` the spans of rank r's segments (at least one, which may be empty); every token of the
    group is in exactly one segment. A query sees keys at positions up to its own. Raises
    GroupFailed.
    """
    heads, tokens, _ = query.shape
    assert tokens == span_tokens(query_spans), "spans name every query"
    assert [segment.spans for segment in segments] == list(held[communicator.rank]), "held names our segments"
    total = identity(heads, tokens, segments[0].value.shape[2], query.device)
    ring = _Ring(communicator, segments, held)
    for hop in range(communicator.size):
        # The next transfer starts before this hop's compute, which hides it where hardware allows.
        work = ring.advance(hop)
        for segment in ring.current(hop):
            attend_causal(total, query, query_spans, segment, kernel)
        if work is not None:
            work.wait()
    return total.out


class _Ring:
    """The KV messages of one ring pass: at hop j a rank holds what began on rank (rank - j) mod size."""

    def __init__(self, communicator: Communicator, segments: Sequence[KVSegment], held: Sequence[Held]) -> None:
        self._communicator = communicator
        self._own = segments
        self._held = held
        self._shape = (
            segments[0].key.shape[0],
            segments[0].key.shape[2],
            segments[0].value.shape[2],
        )
        self._buffers: list[Tensor] = []
        if communicator.size > 1:
            self._buffers = [_pack(segments)]
            room = max(self._elements(rank) for rank in range(communicator.size))
            # Two receive buffers: one is computed on and sent while the other fills.
            self._buffers += [self._buffers[0].new_empty(room) for _ in range(min(2, communicator.size - 1))]

    def _source(self, hop: int) -> int:
        return (self._communicator.rank - hop) % self._communicator.size

    def _elements(self, rank: int) -> int:
        kv_heads, dim, value_dim = self._shape
        return sum(span_tokens(spans) for spans in self._held[rank]) * kv_heads * (dim + value_dim)

    def _message(self, hop: int) -> Tensor:
        index = 0 if hop == 0 else 1 + (hop - 1) % 2
        return self._buffers[index][: self._elements(self._source(hop))]

    def advance(self, hop: int) -> Work | None:
        """Start moving hop's message on; None at the last hop."""
        if hop + 1 == self._communicator.size:
            return None
        return self._communicator.shift(self._message(hop), self._message(hop + 1))

    def current(self, hop: int) -> Sequence[KVSegment]:
        """The segments that this rank holds at `hop`."""
        if hop == 0:
            return self._own
        return _unpack(self._message(hop), self._shape, self._held[self._source(hop)])


def _pack(segments: Sequence[KVSegment]) -> Tensor:
    """One flat message: key then value of each segment."""
    return torch.cat([part.reshape(-1) for segment in segments for part in (segment.key, segment.value)])


def _unpack(message: Tensor, shape: tuple[int, int, int], held: Held) -> list[KVSegment]:
    """Views of a message's segments; `shape` is (Hkv, D, Dv)."""
    kv_heads, dim, value_dim = shape
    segments = []
    offset = 0
    for spans in held:
        parts = []
        for width in (dim, value_dim):
            size = kv_heads * span_tokens(spans) * width
            parts.append(message[offset : offset + size].view(kv_heads, -1, width) if size else None)
            offset += size
        if parts[0] is not None and parts[1] is not None:
            segments.append(KVSegment(parts[0], parts[1], spans))
    return segments


def attend_causal(
    total: Partial,
    query: Tensor,
    query_spans: Sequence[Span],
    segment: KVSegment,
    kernel: str | None,
) -> None:
    """Merge into `total` what the queries see of one segment, without any mask but the square diagonal.

    Keys before a run of queries are a prefix of the segment (it is sorted), so one FULL call serves
    them. A key span that overlaps the run is a DIAGONAL square, and FULL for the queries behind it.
    """
    if not query_spans or not segment.token_count:
        return
    shared = segment.rows_before(query_spans[0].start)
    _add(total, query, (0, query.shape[1]), segment, (0, shared), Mask.FULL, kernel)
    first = 0
    for run in query_spans:
        last = first + run.stop - run.start
        prefix = segment.rows_before(run.start)
        _add(total, query, (first, last), segment, (shared, prefix), Mask.FULL, kernel)
        row = 0
        for span in segment.spans:
            start, stop = max(span.start, run.start), min(span.stop, run.stop)
            if start < stop:
                rows = (row + start - span.start, row + stop - span.start)
                square = (first + start - run.start, first + stop - run.start)
                _add(total, query, square, segment, rows, Mask.DIAGONAL, kernel)
                _add(total, query, (square[1], last), segment, rows, Mask.FULL, kernel)
            row += span.stop - span.start
        first = last


def _add(
    total: Partial,
    query: Tensor,
    queries: tuple[int, int],
    segment: KVSegment,
    rows: tuple[int, int],
    mask: Mask,
    kernel: str | None,
) -> None:
    """Merge one kernel call: queries [a, b) over the segment's rows [c, d)."""
    if queries[0] >= queries[1] or rows[0] >= rows[1]:
        return
    part = attend(
        query[:, slice(*queries)],
        segment.key[:, slice(*rows)],
        segment.value[:, slice(*rows)],
        mask,
        kernel,
    )
    merge_into(total, part, queries[0])
