"""Layouts: who holds which tokens (and kv heads), and the copies between any two of them.

A layout is an explicit list of runs, made by a scheme (contiguous, zigzag, striped) or grown by decode. A holding is
what one buffer keeps: a head range, and token spans at rows. Extents, the shards of any layout, and engine pages all
are holdings, so `copies` re-shards between any two. Pure; nothing here touches bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from .errors import LayoutError
from .geometry import Geometry

# A million tokens in stripes of four; the daemon plans on one thread, and what is finer would hold up everybody.
RUNS_LIMIT: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [start, stop) are held by context-parallel rank `rank`."""

    start: int
    stop: int
    rank: int


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) lie at rows row, row + 1, ... of a buffer."""

    start: int
    stop: int
    row: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Runs that cover tokens 0..n exactly once, over `cp` token ranks x `tp` head ranks.

    Rank r of the group is (cp rank r // tp, tp rank r % tp). On a rank, tokens lie in ascending order.
    """

    runs: tuple[Run, ...]
    cp: int
    tp: int = 1

    def __post_init__(self) -> None:
        if self.cp < 1 or self.tp < 1:
            raise LayoutError(f"cp and tp degrees must be positive, not cp={self.cp} tp={self.tp}")
        position = 0
        for run in self.runs:
            if run.start != position or run.stop <= run.start or not 0 <= run.rank < self.cp:
                raise LayoutError(f"{run} does not continue at token {position} within cp={self.cp}")
            position = run.stop

    @property
    def token_count(self) -> int:
        """Tokens covered."""
        return self.runs[-1].stop if self.runs else 0

    @property
    def ranks(self) -> int:
        """Ranks in the group."""
        return self.cp * self.tp

    def spans(self, cp_rank: int, first_row: int = 0) -> tuple[Span, ...]:
        """The tokens a context-parallel rank holds, packed in ascending order from `first_row`."""
        spans = []
        row = first_row
        for run in self.runs:
            if run.rank == cp_rank:
                spans.append(Span(run.start, run.stop, row))
                row += run.stop - run.start
        return tuple(spans)

    def length(self, cp_rank: int) -> int:
        """Tokens a context-parallel rank holds."""
        return sum(run.stop - run.start for run in self.runs if run.rank == cp_rank)

    def truncated(self, token_count: int) -> Layout:
        """The same layout of the first `token_count` tokens."""
        kept = [Run(run.start, min(run.stop, token_count), run.rank) for run in self.runs if run.start < token_count]
        return Layout(tuple(kept), self.cp, self.tp)

    def then(self, following: Layout) -> Layout:
        """This layout with `following` (of new tokens, counted from 0) behind it."""
        if (following.cp, following.tp) != (self.cp, self.tp):
            raise LayoutError("layouts of different degrees do not join; re-shard first")
        base = self.token_count
        moved = [Run(base + run.start, base + run.stop, run.rank) for run in following.runs]
        return Layout(_merged([*self.runs, *moved]), self.cp, self.tp)


def _merged(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Join neighbours of one rank and drop empty runs, so equal layouts compare equal."""
    merged: list[Run] = []
    for run in runs:
        if run.start == run.stop:
            continue
        if merged and merged[-1].rank == run.rank and merged[-1].stop == run.start:
            merged[-1] = Run(merged[-1].start, run.stop, run.rank)
        else:
            merged.append(run)
    return tuple(merged)


def contiguous(token_count: int, cp: int, tp: int = 1) -> Layout:
    """Rank r holds the r-th of `cp` nearly equal pieces."""
    cuts = [token_count * i // cp for i in range(cp + 1)] if cp > 0 else []
    runs = [Run(a, b, rank) for rank, (a, b) in enumerate(pairwise(cuts))]
    return Layout(_merged(runs), cp, tp)


def zigzag(token_count: int, cp: int, tp: int = 1) -> Layout:
    """Rank r holds chunks r and 2cp-1-r of 2cp: equal causal work (arXiv 2411.01783, 3.5.1)."""
    chunks = 2 * cp
    cuts = [token_count * i // chunks for i in range(chunks + 1)] if cp > 0 else []
    runs = [Run(a, b, min(chunk, chunks - 1 - chunk)) for chunk, (a, b) in enumerate(pairwise(cuts))]
    return Layout(_merged(runs), cp, tp)


def striped(token_count: int, cp: int, tp: int = 1, stripe: int = 1, first_rank: int = 0) -> Layout:
    """Stripes of `stripe` tokens dealt round-robin, the first to `first_rank`; stripe 1 is decode's append."""
    if stripe < 1:
        raise LayoutError(f"a stripe has at least one token, not {stripe}")
    if cp < 1:
        raise LayoutError(f"the cp degree must be positive, not {cp}")
    runs = [
        Run(start, min(start + stripe, token_count), (first_rank + index) % cp)
        for index, start in enumerate(range(0, token_count, stripe))
    ]
    return Layout(_merged(runs), cp, tp)


def chunked(front: Layout, token_count: int, chunk_tokens: int) -> Layout:
    """The layout that chunked prefill ends with: `front` is there already, each chunk behind it is zigzag by itself."""
    if chunk_tokens < 1:
        raise LayoutError(f"a chunk has at least one token, not {chunk_tokens}")
    if 2 * front.cp * (token_count // chunk_tokens) > RUNS_LIMIT:
        raise LayoutError(f"{token_count} tokens in chunks of {chunk_tokens} make too many runs; use larger chunks")
    if front.token_count > token_count:
        raise LayoutError(f"{front.token_count} cached tokens are no start of a document of {token_count}")
    runs = list(front.runs)
    for start in range(front.token_count, token_count, chunk_tokens):
        piece = zigzag(min(chunk_tokens, token_count - start), front.cp, front.tp)
        runs += [Run(start + run.start, start + run.stop, run.rank) for run in piece.runs]
    return Layout(_merged(runs), front.cp, front.tp)


SCHEMES = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


def scheme(name: str, token_count: int, cp: int, tp: int = 1) -> Layout:
    """The layout that the named scheme makes."""
    if name not in SCHEMES:
        raise LayoutError(f"unknown scheme {name!r}; use one of {', '.join(sorted(SCHEMES))}")
    make = SCHEMES[name]
    return make(token_count, cp, tp)


@dataclass(frozen=True, slots=True)
class Holding:
    """What one buffer holds: kv heads [head_start, head_stop) of the tokens in `spans` (ascending)."""

    buffer: int
    head_start: int
    head_stop: int
    spans: tuple[Span, ...]


def heads_of(tp_rank: int, tp: int, kv_heads: int) -> tuple[int, int]:
    """The kv heads of a tensor-parallel rank; with more ranks than heads, ranks share one (replicated)."""
    if kv_heads % tp and tp % kv_heads:
        raise LayoutError(f"{kv_heads} kv heads cannot be dealt over tp={tp}")
    if tp <= kv_heads:
        share = kv_heads // tp
        return tp_rank * share, (tp_rank + 1) * share
    head = tp_rank * kv_heads // tp
    return head, head + 1


def shard_holding(layout: Layout, rank: int, kv_heads: int, first_row: int = 0) -> Holding:
    """What rank `rank` of the group holds under `layout`, packed from `first_row`; `buffer` is the rank."""
    head_start, head_stop = heads_of(rank % layout.tp, layout.tp, kv_heads)
    return Holding(rank, head_start, head_stop, layout.spans(rank // layout.tp, first_row))


def extent_holding(buffer: int, start: int, valid_tokens: int, kv_heads: int) -> Holding:
    """What an extent holds: all heads of `valid_tokens` tokens from document position `start`, from row 0."""
    return Holding(buffer, 0, kv_heads, (Span(start, start + valid_tokens),))


def clipped(holding: Holding, ranges: Sequence[tuple[int, int]]) -> Holding:
    """The part of a holding that lies in these token ranges."""
    spans = []
    for span in holding.spans:
        for start, stop in ranges:
            low, high = max(span.start, start), min(span.stop, stop)
            if low < high:
                spans.append(Span(low, high, span.row + low - span.start))
    return Holding(holding.buffer, holding.head_start, holding.head_stop, tuple(spans))


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows of some heads, from one buffer to another, the same for every layer and part.

    Heads and rows are the buffers' own (local) indices.
    """

    source: int
    target: int
    source_head: int
    target_head: int
    head_count: int
    source_row: int
    target_row: int
    row_count: int

    def reversed(self) -> Copy:
        """The copy back."""
        return Copy(
            self.target,
            self.source,
            self.target_head,
            self.source_head,
            self.head_count,
            self.target_row,
            self.source_row,
            self.row_count,
        )


def copies(source: Sequence[Holding], target: Sequence[Holding]) -> Iterator[Copy]:
    """The copies that fill every row of every target holding exactly once from the source holdings.

    Where several sources hold the same token and head, the first by token order serves. Raises LayoutError when a
    target token is held by no source.
    """
    held = sorted(
        ((span, holding) for holding in source for span in holding.spans),
        key=lambda item: (item[0].start, item[0].stop, item[1].buffer, item[1].head_start),
    )
    starts = [span.start for span, _ in held]
    longest = max((span.stop - span.start for span, _ in held), default=0)
    for wanted in target:
        for span in wanted.spans:
            # Only spans that start after span.start - longest can reach into it.
            low = bisect_right(starts, span.start - longest)
            high = bisect_right(starts, span.stop - 1)
            yield from _fill(wanted, span, held[low:high])


def _fill(wanted: Holding, span: Span, held: Sequence[tuple[Span, Holding]]) -> Iterator[Copy]:
    """Cover one target span: rectangles (tokens x heads) still missing are cut by each source in turn."""
    missing = [(span.start, span.stop, wanted.head_start, wanted.head_stop)]
    for have, holding in held:
        remaining = []
        for a, b, h0, h1 in missing:
            x, y = max(a, have.start), min(b, have.stop)
            g, k = max(h0, holding.head_start), min(h1, holding.head_stop)
            if x >= y or g >= k:
                remaining.append((a, b, h0, h1))
                continue
            yield Copy(
                source=holding.buffer,
                target=wanted.buffer,
                source_head=g - holding.head_start,
                target_head=g - wanted.head_start,
                head_count=k - g,
                source_row=have.row + x - have.start,
                target_row=span.row + x - span.start,
                row_count=y - x,
            )
            pieces = [(a, x, h0, h1), (y, b, h0, h1), (x, y, h0, g), (x, y, k, h1)]
            remaining += [piece for piece in pieces if piece[0] < piece[1] and piece[2] < piece[3]]
        missing = remaining
        if not missing:
            return
    a, b, h0, h1 = missing[0]
    raise LayoutError(f"no source holds tokens [{a}, {b}) of kv heads [{h0}, {h1})")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`size_bytes` bytes from an offset of the source buffer to one of the target buffer."""

    source_offset: int
    target_offset: int
    size_bytes: int


def byte_ranges(copy: Copy, source: Geometry, target: Geometry) -> Iterator[ByteRange]:
    """The byte ranges of a copy between buffers of these geometries, layer-major: one per (layer, part, head)."""
    assert source.layers == target.layers, "a copy keeps the layers"
    assert source.parts == target.parts, "a copy keeps the parts"
    for layer in range(source.layers):
        for part in range(source.parts):
            size = source.row_bytes(part)
            assert size == target.row_bytes(part), "a copy keeps the row size"
            for head in range(copy.head_count):
                yield ByteRange(
                    source.offset(layer, part, copy.source_head + head, copy.source_row),
                    target.offset(layer, part, copy.target_head + head, copy.target_row),
                    copy.row_count * size,
                )
