"""LiveSequence: one sequence of a batch as a rank computes it. Shards are read, and the last of them grows.

Shapes: Hkv kv heads of this rank, T tokens, D key dim, Dv value dim.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kvstore.clock import Clock
from ..kvstore.layout import Layout, Run, Span, zigzag
from .segment import KVSegment, shifted
from .shard import KVShard
from .share import Held, SequenceShare
from .waits import LayerWaits


class LiveSequence:
    """Tokens in `before`, which stay as they are, and behind them those of `into`, whose arena takes new ones.

    `window` is that of the model's layers which have one.
    """

    def __init__(
        self, before: Sequence[KVShard], into: KVShard, cp_rank: int, clock: Clock, window: int | None = None
    ) -> None:
        self._window = window
        self._shards = [*(shard for shard in before if shard.layout.runs), into]
        self._rank = cp_rank
        self._cp = into.layout.cp
        self._read = [[shard.spans(rank) for shard in self._shards[:-1]] for rank in range(self._cp)]
        self._joined = [_front(shard.first_token, shard.layout.length(cp_rank)) for shard in self._shards[:-1]]
        self._grown = [list(into.spans(rank)) for rank in range(self._cp)]
        self._kept = [into.layout.length(rank) for rank in range(self._cp)]
        self._total = [sum(shard.layout.length(rank) for shard in self._shards) for rank in range(self._cp)]
        self._waits = [LayerWaits(shard.wait_layer, clock) for shard in self._shards]
        self._fresh: list[Run] = []
        self.end_token = into.end_token

    @property
    def exposed_ns(self) -> int:
        """Time spent waiting for layers so far."""
        return sum(waits.exposed_ns for waits in self._waits)

    @property
    def rank_tokens(self) -> list[int]:
        """How many of the tokens each rank holds."""
        return list(self._total)

    @property
    def grown(self) -> KVShard:
        """The shard that grows, with all its tokens."""
        into = self._shards[-1]
        return into.grown(Layout(tuple(self._fresh), self._cp, into.layout.tp))

    def place_chunk(self, token_count: int) -> Placed:
        """A chunk behind the tokens so far: each rank computes and keeps its zigzag share."""
        fresh = zigzag(token_count, self._cp)
        queries = [shifted(fresh.spans(rank), self.end_token) for rank in range(self._cp)]
        first, row = self.end_token, self._row
        self._add(fresh.runs)
        held = [self._spans(rank) for rank in range(self._cp)]
        return Placed(self, first, queries, held, held[self._rank], held[self._rank], row, self._row - row)

    def place_token(self) -> Placed:
        """A decoded token: each rank computes it, one keeps it.

        That is the rank with the fewest tokens of `into`; of those, the one with the fewest in all. So decode deals
        them round-robin, and begins at a rank that earlier turns left short (arXiv 2411.01783, 3.5.1).
        """
        keeper = min(range(self._cp), key=lambda rank: (self._kept[rank], self._total[rank], rank))
        queries = [(Span(self.end_token, self.end_token + 1),)] * self._cp
        first, row = self.end_token, self._row
        self._add([Run(0, 1, keeper)])
        # Round-robin makes a run of every token. Without a window it only counts that a token stands before the query,
        # so decode gets them as one run; with one, that it stands before the window.
        joined = [*self._joined, self._within(None)]
        own = [*self._read[self._rank], self._within(self._window)]
        return Placed(self, first, queries, [], own, joined, row, self._row - row)

    def _within(self, window: int | None) -> tuple[Span, ...]:
        """This rank's tokens of `into`, those that the last token does not see through `window` joined in front."""
        spans = self._grown[self._rank]
        out_of_sight = self.end_token if window is None else self.end_token - window
        seen = spans[bisect_right(spans, out_of_sight, key=lambda span: span.stop) :]
        unseen = self._kept[self._rank] - sum(span.stop - span.start for span in seen)
        return (*_front(self._shards[-1].first_token, unseen), *seen)

    @property
    def _row(self) -> int:
        """Where this rank's next token goes."""
        return self._shards[-1].row_start + self._kept[self._rank]

    def _spans(self, rank: int) -> Held:
        return [*self._read[rank], tuple(self._grown[rank])]

    def _add(self, runs: Sequence[Run]) -> None:
        """New tokens behind all others."""
        first, start = self.end_token, self._fresh[-1].stop if self._fresh else 0
        for run in runs:
            self._fresh.append(Run(start + run.start, start + run.stop, run.rank))
            _append(self._grown[run.rank], Span(first + run.start, first + run.stop))
            self._kept[run.rank] += run.stop - run.start
            self._total[run.rank] += run.stop - run.start
        self.end_token += runs[-1].stop

    def store(self, layer: int, row: int, key: Tensor, value: Tensor) -> None:
        """Write the KV of new tokens, key [Hkv, T, D] and value [Hkv, T, Dv]."""
        self._shards[-1].arena.write(layer, row, key, value)

    def segments(self, layer: int, held: Held) -> list[KVSegment]:
        """This rank's KV of a layer, once it is there."""
        for waits in self._waits:
            waits(layer)
        return [shard.segment(layer, spans) for shard, spans in zip(self._shards, held, strict=True)]


@dataclass(frozen=True, slots=True)
class Placed:
    """New tokens of a sequence in one forward pass, as its ranks compute and hold them.

    They begin at position `first_token`. `queries[r]` are the positions that rank r computes, `held[r]` the spans of
    its segments, the new ones among them (none for decode, which does not ask). `own` are this rank's spans, and
    `unwindowed` those that do where there is no window. This rank stores `kept` tokens, which are all that it computes
    or none, at rows from `row`.
    """

    sequence: LiveSequence
    first_token: int
    queries: Sequence[tuple[Span, ...]]
    held: Sequence[Held]
    own: Held
    unwindowed: Held
    row: int
    kept: int

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the KV of the tokens that this rank computed, if it is this rank's to keep."""
        if self.kept:
            self.sequence.store(layer, self.row, key, value)

    def share(self, layer: int, window: int | None) -> SequenceShare:
        """One layer for the attention of these queries."""
        spans = self.unwindowed if window is None else self.own
        return SequenceShare(self.queries, self.sequence.segments(layer, spans), self.held)


def _front(first: int, count: int) -> tuple[Span, ...]:
    return (Span(first, first + count),) if count else ()


def _append(spans: list[Span], new: Span) -> None:
    """Add tokens behind all others."""
    if spans and spans[-1].stop == new.start:
        spans[-1] = Span(spans[-1].start, new.stop, spans[-1].row)
    else:
        spans.append(new)
