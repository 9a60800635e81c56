"""SequenceShare: one sequence of a batch as one rank sees it.

Shapes: Hkv kv heads, S rows, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..kvstore.layout import Span
from .positions import Positions, positions_of
from .segment import KVSegment

Held = Sequence[tuple[Span, ...]]  # the spans of each segment of one rank


@dataclass(frozen=True, slots=True)
class SequenceShare:
    """One sequence: who asks, and who holds what.

    `queries[r]` are the ascending positions of rank r's queries in the sequence, `segments` this
    rank's KV (at least one, which may be empty), and `held[r]` the spans of rank r's segments, which
    decode does not read. Every token of the sequence is in exactly one segment.
    """

    queries: Sequence[tuple[Span, ...]]
    segments: Sequence[KVSegment]
    held: Sequence[Held]

    def __post_init__(self) -> None:
        assert self.segments, "a sequence has a segment, which may be empty"

    def positions(self, rank: int) -> Positions:
        """Where a rank's queries stand."""
        return positions_of(self.queries[rank])

    def within_reach(self, window: int | None) -> SequenceShare:
        """The sequence without the KV that no query of any rank sees: it is neither sent nor read."""
        positions = [position for spans in self.queries for span in spans for position in (span.start, span.stop)]
        stop = max(positions, default=0)
        start = 0 if window is None else max(0, min(positions, default=0) - window + 1)
        if all(_inside(spans, start, stop) for held in self.held for spans in held):
            return self
        segments = [_cut_segment(segment, start, stop) for segment in self.segments]
        held = [[_cut(spans, start, stop) for spans in spans_by_segment] for spans_by_segment in self.held]
        return SequenceShare(self.queries, segments, held)


def within_reach(batch: Sequence[SequenceShare], window: int | None, ranks: int) -> list[SequenceShare]:
    """A batch that a strategy got, without the KV that nobody sees."""
    assert batch, "a batch has a sequence"
    assert all(len(share.held) == len(share.queries) == ranks for share in batch), "shares name every rank"
    return [share.within_reach(window) for share in batch]


def value_dim_of(batch: Sequence[SequenceShare]) -> int:
    """Dv, which all segments have in common."""
    return batch[0].segments[0].value.shape[2]


def _inside(spans: Sequence[Span], start: int, stop: int) -> bool:
    return not spans or (start <= spans[0].start and spans[-1].stop <= stop)


def _rows(spans: Sequence[Span], start: int, stop: int) -> tuple[int, int]:
    """The rows of the tokens at positions [start, stop)."""
    positions = positions_of(spans)
    return positions.before(start), max(positions.before(start), positions.before(stop))


def _cut(spans: Sequence[Span], start: int, stop: int) -> tuple[Span, ...]:
    return positions_of(spans).cut(*_rows(spans, start, stop))


def _cut_segment(segment: KVSegment, start: int, stop: int) -> KVSegment:
    rows = slice(*_rows(segment.spans, start, stop))
    spans = _cut(segment.spans, start, stop)
    return replace(segment, key=segment.key[:, rows], value=segment.value[:, rows], spans=spans)
