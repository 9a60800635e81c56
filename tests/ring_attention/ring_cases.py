"""Batches for the property tests of attention: any shapes, any layouts, any shards, and what is right."""

import os
from dataclasses import dataclass

import torch
from holdfast.kvstore.layout import Layout, Run, contiguous, striped, zigzag
from holdfast.ring_attention.segment import KVSegment
from holdfast.ring_attention.share import SequenceShare
from hypothesis import settings
from hypothesis import strategies as st
from ring_helpers import segments_of, spans_in, take

RANKS = (1, 2, 3, 4, 5, 8)
WORK_MAX = 40_000_000  # multiplications of one case: keeps an example below a tenth of a second
TIMES = int(os.environ.get("HOLDFAST_EXAMPLES", "1"))  # a larger profile: so many times the examples


def examples(count):
    """Settings of a property test."""
    return settings(deadline=None, max_examples=count * TIMES)


@st.composite
def layouts(draw, token_count, cp):
    """Any layout: made by a scheme, or cuts anywhere and owners anyhow, so shards are uneven and may be empty."""
    scheme = draw(st.sampled_from([contiguous, zigzag, striped, None]))
    if scheme is not None:
        return scheme(token_count, cp)
    cuts = draw(st.lists(st.integers(1, max(1, token_count - 1)), max_size=8, unique=True))
    edges = sorted({0, token_count, *(cut for cut in cuts if cut < token_count)})
    owners = [draw(st.integers(0, cp - 1)) for _ in edges[1:]]
    runs = [Run(a, b, owner) for a, b, owner in zip(edges, edges[1:], owners, strict=False)]
    return Layout(tuple(runs), cp)


@dataclass
class Sequence:
    """One sequence: its tokens [0, total) lie under `keys`, in two segments cut at `cached`; the new ones ask."""

    cached: int
    total: int
    keys: Layout
    queries: Layout

    def asked(self, cp, start=None):
        """Every rank's query spans from `start` on."""
        return [spans_in(self.queries, rank, self.cached if start is None else start, self.total) for rank in range(cp)]

    def held(self, cp):
        """Every rank's spans in the cached and in the new segment."""
        return [
            [spans_in(self.keys, rank, 0, self.cached), spans_in(self.keys, rank, self.cached, self.total)]
            for rank in range(cp)
        ]


@dataclass
class Case:
    """A batch of sequences with equal heads and dims."""

    cp: int
    kv_heads: int
    heads: int
    dim: int
    dtype: torch.dtype
    scale: float
    window: int | None
    sequences: list[Sequence]

    def tensors(self, index):
        """Query [H, total, D], key and value [Hkv, total, D] of a sequence."""
        total = self.sequences[index].total
        generator = torch.Generator().manual_seed(31 * index + total)
        query = torch.randn(self.heads, total, self.dim, generator=generator) * self.scale
        key, value = torch.randn(2, self.kv_heads, total, self.dim, generator=generator)
        return query.to(self.dtype), key.to(self.dtype), value.to(self.dtype)

    def share(self, index, rank):
        """A sequence as a rank sees it."""
        sequence = self.sequences[index]
        _, key, value = self.tensors(index)
        held = sequence.held(self.cp)
        return SequenceShare(sequence.asked(self.cp), segments_of(key, value, held[rank]), held)

    def packed(self, rank):
        """A rank's queries of all sequences."""
        parts = [
            self.tensors(index)[0][:, take(sequence.asked(self.cp)[rank])]
            for index, sequence in enumerate(self.sequences)
        ]
        return torch.cat(parts, dim=1)

    def expected(self, rank):
        """Float64 attention of a rank's queries, sequence after sequence."""
        outs = []
        for index, sequence in enumerate(self.sequences):
            query, key, value = self.tensors(index)
            positions = take(sequence.asked(self.cp)[rank])
            outs.append(windowed(query[:, positions], positions, key, value, self.window))
        return torch.cat(outs, dim=1)


def windowed(query, positions, key, value, window=None):
    """Attention in float64 of queries at `positions` over keys at 0, 1, ..., of which each sees the last `window`."""
    group = query.shape[0] // key.shape[0]
    folded = query.double().reshape(key.shape[0], -1, query.shape[2])
    scores = (folded @ key.double().transpose(1, 2)) / query.shape[2] ** 0.5
    distance = torch.arange(key.shape[1])[None, :] - positions[:, None]
    hidden = distance > 0
    if window is not None:
        hidden |= distance <= -window
    scores = scores.masked_fill_(hidden.repeat(group, 1), -torch.inf)
    out = scores.softmax(-1) @ value.double()
    return out.view(*query.shape[:2], value.shape[2])


def latent(segments, value_dim):
    """The segments' keys as latents, whose first columns are the values."""
    return [KVSegment.of_latents(segment.key, value_dim, segment.spans) for segment in segments]


@st.composite
def cases(draw, dtypes=(torch.float32,), max_sequences=5):
    """A batch: 1 to 5 ragged sequences of 0 to 257 new and 0 to 1500 cached tokens."""
    cp = draw(st.sampled_from(RANKS))
    kv_heads, group = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 3, 4, 8]))
    dim = draw(st.sampled_from([32, 64, 80, 128, 256]))
    lengths = draw(st.lists(st.tuples(st.integers(0, 257), st.integers(0, 1500)), min_size=1, max_size=max_sequences))
    share = WORK_MAX / len(lengths) / (kv_heads * group * dim)
    sequences = []
    for length in lengths:
        new, cached = length
        while new * (new + cached) > share:
            new, cached = (new // 2, cached) if new > cached else (new, cached // 2)
        keys, queries = draw(layouts(cached + new, cp)), draw(layouts(cached + new, cp))
        sequences.append(Sequence(cached, cached + new, keys, queries))
    return Case(
        cp,
        kv_heads,
        kv_heads * group,
        dim,
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from([1.0, 8.0])),
        draw(st.one_of(st.none(), st.integers(1, 40), st.integers(1, 1800))),
        sequences,
    )
