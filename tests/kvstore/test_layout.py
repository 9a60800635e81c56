"""Layouts cover each token once, and re-sharding moves every byte once, from the right place.

The model knows nothing of runs, spans or rectangles: it asks for each byte of each token where it lies.
"""

import numpy as np
import pytest
from holdfast.kvstore.errors import LayoutError
from holdfast.kvstore.geometry import Geometry
from holdfast.kvstore.layout import (
    Holding,
    Layout,
    Run,
    Span,
    byte_ranges,
    chunked,
    clipped,
    contiguous,
    copies,
    extent_holding,
    heads_of,
    scheme,
    shard_holding,
    striped,
    zigzag,
)
from hypothesis import given, settings
from hypothesis import strategies as st

CP = st.integers(1, 5)
COUNT = st.integers(0, 60)
LAYERS = 2
UNHELD = 255


@st.composite
def layouts(draw, token_count, tp=1):
    """Any layout of these tokens: a scheme, chunks, stripes, or a front grown by decode."""
    cp = draw(CP)
    kind = draw(st.sampled_from(["contiguous", "zigzag", "striped", "wide", "chunked", "grown", "free"]))
    if kind == "wide":
        return striped(token_count, cp, tp, draw(st.integers(1, 7)), draw(st.integers(0, 4)))
    if kind == "chunked":
        front = draw(st.integers(0, token_count))
        return chunked(zigzag(front, cp, tp), token_count, draw(st.integers(1, 20)))
    if kind == "grown":
        front = draw(st.integers(0, token_count))
        return zigzag(front, cp, tp).then(striped(token_count - front, cp, tp, 1, draw(st.integers(0, 4))))
    if kind == "free":
        ranks = draw(st.lists(st.integers(0, cp - 1), min_size=token_count, max_size=token_count))
        return Layout(tuple(Run(i, i + 1, rank) for i, rank in enumerate(ranks)), cp, tp)
    return scheme(kind, token_count, cp, tp)


def owners(layout):
    """The rank of each token, run by run."""
    return [run.rank for run in layout.runs for _ in range(run.start, run.stop)]


@settings(deadline=None, max_examples=200)
@given(st.data(), COUNT)
def test_every_token_has_one_row_on_one_rank(data, token_count):
    """Spans of all ranks cover each token once; rows are packed and ascend with the tokens."""
    layout = data.draw(layouts(token_count))
    assert layout.token_count == token_count
    seen = []
    for rank in range(layout.cp):
        held = [t for span in layout.spans(rank, 3) for t in range(span.start, span.stop)]
        rows = [span.row + i for span in layout.spans(rank, 3) for i in range(span.stop - span.start)]
        assert held == sorted(held) == [t for t, owner in enumerate(owners(layout)) if owner == rank]
        assert rows == list(range(3, 3 + layout.length(rank)))
        seen += held
    assert sorted(seen) == list(range(token_count))


@settings(deadline=None, max_examples=100)
@given(st.data(), COUNT, COUNT)
def test_a_truncated_layout_is_the_front(data, token_count, kept):
    """The first tokens stay where they were."""
    layout = data.draw(layouts(token_count))
    assert owners(layout.truncated(kept)) == owners(layout)[:kept]


@settings(deadline=None, max_examples=100)
@given(COUNT, CP)
def test_zigzag_balances_causal_work(token_count, cp):
    """Rank r holds chunks r and 2cp-1-r, chunks differ by a token at most, and so does nobody by more than two."""
    layout = zigzag(token_count, cp)
    cuts = [token_count * i // (2 * cp) for i in range(2 * cp + 1)]
    naive = [min(c, 2 * cp - 1 - c) for c in range(2 * cp) for _ in range(cuts[c], cuts[c + 1])]
    assert owners(layout) == naive
    lengths = [layout.length(rank) for rank in range(cp)]
    assert max(lengths) - min(lengths) <= 2


def test_stripes_go_round():
    """Token i of stripe width w goes to rank (first + i // w) mod cp."""
    assert owners(striped(7, 3, 1, 2, 1)) == [1, 1, 2, 2, 0, 0, 1]
    assert owners(striped(4, 3)) == [0, 1, 2, 0]


def test_chunks_are_zigzag_each_behind_the_front():
    """What chunked prefill leaves behind."""
    front = contiguous(4, 2)
    assert owners(chunked(front, 14, 8)) == [0, 0, 1, 1, *owners(zigzag(8, 2)), *owners(zigzag(2, 2))]
    assert chunked(front, 4, 8) == front


def test_decode_appends():
    """New tokens lie behind all old ones; neighbours of one rank become one run."""
    grown = contiguous(4, 2).then(striped(3, 2, 1, 1, 1))
    assert owners(grown) == [0, 0, 1, 1, 1, 0, 1]
    assert grown.runs[1] == Run(2, 5, 1)


BAD = [
    lambda: contiguous(5, 0),
    lambda: zigzag(5, 0),
    lambda: striped(5, 0),
    lambda: striped(5, 2, 1, 0),
    lambda: contiguous(5, 2, 0),
    lambda: chunked(zigzag(4, 2), 3, 8),
    lambda: chunked(zigzag(4, 2), 8, 0),
    lambda: scheme("spiral", 5, 2),
    lambda: contiguous(5, 2).then(contiguous(5, 3)),
    lambda: Layout((Run(1, 2, 0),), 1),
    lambda: Layout((Run(0, 2, 0), Run(1, 3, 0)), 1),
    lambda: Layout((Run(0, 2, 1),), 1),
    lambda: Layout((Run(0, 0, 0),), 1),
    lambda: heads_of(0, 4, 6),
    lambda: list(copies([extent_holding(0, 0, 4, 1)], [extent_holding(1, 0, 5, 1)])),
    lambda: list(copies([Holding(0, 0, 1, (Span(0, 4),))], [extent_holding(1, 0, 4, 2)])),
    lambda: list(copies([], [extent_holding(1, 0, 1, 1)])),
]


@pytest.mark.parametrize("make", BAD)
def test_what_does_not_cover_is_refused(make):
    """Layouts and copies that leave tokens or heads out are errors, not holes."""
    with pytest.raises(LayoutError):
        make()


def test_heads_are_dealt_or_shared():
    """Fewer ranks than heads share them out; more ranks than heads hold copies."""
    assert [heads_of(r, 2, 4) for r in range(2)] == [(0, 2), (2, 4)]
    assert [heads_of(r, 4, 2) for r in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 40), st.integers(0, 40), st.integers(0, 40))
def test_clipping_keeps_rows(data, token_count, one, other):
    """The part of a holding in a token range, each token at the row that it had."""
    layout = data.draw(layouts(token_count))
    holding = shard_holding(layout, 0, 1, 5)
    rows = {span.start + i: span.row + i for span in holding.spans for i in range(span.stop - span.start)}
    low, high = sorted((one, other))
    cut = clipped(holding, [(low, high)])
    found = {span.start + i: span.row + i for span in cut.spans for i in range(span.stop - span.start)}
    assert found == {token: row for token, row in rows.items() if low <= token < high}


# Bytes ---------------------------------------------------------------------------------------------


class Side:
    """One way to hold a document: buffers, their geometries, and naively where each byte of each token lies."""

    def __init__(self, kv_heads, key_bytes, value_bytes):
        self.kv_heads, self.key_bytes, self.value_bytes = kv_heads, key_bytes, value_bytes
        self.holdings = []
        self.geometries = []
        self.places = []  # (token, head, buffer, local head, row)

    def add(self, holding, rows, align, held):
        """`held`: (token, row) pairs of the buffer, worked out by the caller without the code under test."""
        heads = range(holding.head_start, holding.head_stop)
        sizes = {"key_bytes": self.key_bytes, "value_bytes": self.value_bytes}
        self.holdings.append(holding)
        self.geometries.append(Geometry(layers=LAYERS, heads=len(heads), rows=rows, align=align, **sizes))
        number = holding.buffer
        self.places += [(t, h, number, i, row) for t, row in held for i, h in enumerate(heads)]

    def cells(self):
        """(buffer, offset) -> which byte of which token's KV must be there."""
        found = {}
        for token, head, number, local, row in self.places:
            geometry = self.geometries[number]
            heads, rows = geometry.heads, geometry.rows
            pad = -(-heads * rows * self.key_bytes // geometry.align) * geometry.align
            layer_bytes = pad + -(-heads * rows * self.value_bytes // geometry.align) * geometry.align
            for layer in range(LAYERS):
                for part, size in enumerate((self.key_bytes, self.value_bytes)):
                    base = layer * layer_bytes + part * pad + (local * rows + row) * size
                    for byte in range(size):
                        found[number, base + byte] = hash((layer, part, head, token, byte)) % 251
        return found

    def buffers(self):
        """Empty ones."""
        return [np.full(geometry.size_bytes, UNHELD, dtype=np.uint8) for geometry in self.geometries]


@st.composite
def sides(draw, token_count, shape):
    """The document in extents, or in the shards of some layout."""
    side = Side(*shape)
    kv_heads = shape[0]
    if draw(st.booleans()):
        capacity = draw(st.integers(1, 13))
        for number, start in enumerate(range(0, token_count, capacity)):
            valid = min(capacity, token_count - start)
            held = [(start + i, i) for i in range(valid)]
            side.add(extent_holding(number, start, valid, kv_heads), capacity, 16, held)
        return side
    tp = draw(st.sampled_from([t for t in range(1, 5) if not kv_heads % t or not t % kv_heads]))
    layout = draw(layouts(token_count, tp))
    for rank in range(layout.ranks):
        first = draw(st.integers(0, 3))
        tokens = [t for t, owner in enumerate(owners(layout)) if owner == rank // tp]
        held = [(token, first + i) for i, token in enumerate(tokens)]
        side.add(shard_holding(layout, rank, kv_heads, first), first + len(tokens) + 1, 1, held)
    return side


def move(source, target, sources):
    """Carry the copies out; returns the target's buffers and how often each byte was written."""
    buffers = target.buffers()
    written = [np.zeros(len(buffer), dtype=int) for buffer in buffers]
    for copy in copies(source.holdings, target.holdings):
        for piece in byte_ranges(copy, source.geometries[copy.source], target.geometries[copy.target]):
            there = slice(piece.target_offset, piece.target_offset + piece.size_bytes)
            here = slice(piece.source_offset, piece.source_offset + piece.size_bytes)
            buffers[copy.target][there] = sources[copy.source][here]
            written[copy.target][there] += 1
    return buffers, written


SHAPES = st.sampled_from([(1, 3, 2), (2, 2, 3), (4, 1, 1), (1, 5, 0), (3, 1, 2)])


@settings(deadline=None, max_examples=250)
@given(st.data(), st.integers(0, 40), SHAPES)
def test_every_byte_moves_once_from_the_right_place(data, token_count, shape):
    """Between any two ways to hold a document; bytes of rows that hold no token are not touched."""
    source, target = data.draw(sides(token_count, shape)), data.draw(sides(token_count, shape))
    sources = source.buffers()
    for (number, offset), value in source.cells().items():
        sources[number][offset] = value
    buffers, written = move(source, target, sources)
    cells = target.cells()
    for number, buffer in enumerate(buffers):
        for offset, value in enumerate(buffer):
            assert value == cells.get((number, offset), UNHELD)
            assert written[number][offset] == ((number, offset) in cells)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 40), SHAPES)
def test_there_and_back_is_identity(data, token_count, shape):
    """Shards to extents to shards: the same bytes, also by the reversed copies."""
    first, second = data.draw(sides(token_count, shape)), data.draw(sides(token_count, shape))
    there = first.buffers()
    for (number, offset), value in first.cells().items():
        there[number][offset] = value
    middle, _ = move(first, second, there)
    back, _ = move(second, first, middle)
    assert all(np.array_equal(a, b) for a, b in zip(there, back, strict=True))
    undone = first.buffers()
    for copy in copies(first.holdings, second.holdings):
        undo = copy.reversed()
        for piece in byte_ranges(undo, second.geometries[undo.source], first.geometries[undo.target]):
            here = slice(piece.source_offset, piece.source_offset + piece.size_bytes)
            undone[undo.target][piece.target_offset : piece.target_offset + piece.size_bytes] = middle[undo.source][
                here
            ]
    touched = [np.where(buffer == UNHELD, original, buffer) for buffer, original in zip(undone, there, strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(touched, there, strict=True))
