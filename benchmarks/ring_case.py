"""What one row attends: shapes, inputs that every process makes alike, and one rank's share of them.

8 query heads, 2 kv heads, dim 64, float32, causal: 2,048 flop per pair of query and key, 1 KiB of KV per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from holdfast.kvstore.layout import Layout, Span, zigzag
from holdfast.kvstore.spec import KVSpec
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.checkpoint import spec_of
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.segment import KVSegment, shifted
from holdfast.ring_attention.share import SequenceShare
from torch import Tensor

HEADS: Final = 8
KV_HEADS: Final = 2
DIM: Final = 64
OTHER_ROWS: Final = 64
CHOSEN, GLOO = "chosen", "gloo"  # communicators: what the product chooses here, and what torch brings


@dataclass(frozen=True)
class Case:
    """`new` tokens behind `cached` ones of each sequence; no new ones: decode, one query over what is cached."""

    name: str
    new: int
    cached: int = 0
    sequences: int = 1

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Case:
        return cls(**fields)

    @property
    def decodes(self) -> bool:
        return not self.new

    @property
    def pairs(self) -> int:
        """Query-key pairs seen, of one head."""
        each = self.cached if self.decodes else self.new * self.cached + self.new * (self.new + 1) // 2
        return each * self.sequences


def inputs(case: Case, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [H, T, D], key and value [Hkv, P + T, D] of one sequence: equal in every process."""
    maker = torch.Generator().manual_seed(case.cached * 1009 + case.new * 31 + sequence)
    query = torch.randn(HEADS, case.new or 1, DIM, generator=maker)
    key, value = torch.randn(2, KV_HEADS, case.cached + case.new, DIM, generator=maker)
    return query, key, value


def positions(spans: Sequence[Span]) -> Tensor:
    return torch.tensor([at for span in spans for at in range(span.start, span.stop)], dtype=torch.int64)


def spec(layers: int) -> KVSpec:
    width = HEADS * DIM
    shape = ModelConfig(
        vocabulary_size=256,
        hidden_size=width,
        intermediate_size=width,
        layers=layers,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
    )
    return spec_of(shape, "bench")


@dataclass(frozen=True)
class Share:
    """What one rank brings to a case: its queries, packed in the order of the batch, and its KV, in arenas."""

    query: Tensor
    batch: list[SequenceShare]
    rows: Tensor  # which rows of the dense output these queries are


def share(case: Case, rank: int, size: int) -> Share:
    """Cached tokens and new ones lie in zigzag, each by themselves, as a prefill and a question leave them."""
    document, fresh = zigzag(case.cached, size), zigzag(case.new, size)
    queries, batch, rows = [], [], []
    for number in range(case.sequences):
        query, key, value = inputs(case, number)
        last = (Span(case.cached - 1, case.cached),)
        asked = [last if case.decodes else shifted(fresh.spans(peer), case.cached) for peer in range(size)]
        held = [
            [shifted(kept.spans(peer), base) for kept, base in parts(case, document, fresh)] for peer in range(size)
        ]
        segments = [in_arena(key, value, spans) for spans in held[rank]]
        mine = torch.zeros(1, dtype=torch.int64) if case.decodes else positions(asked[rank]) - case.cached
        queries.append(query[:, mine])
        rows.append(mine + number * query.shape[1])
        batch.append(SequenceShare(asked, segments, held))
    return Share(torch.cat(queries, 1).contiguous(), batch, torch.cat(rows))


def parts(case: Case, document: Layout, fresh: Layout) -> list[tuple[Layout, int]]:
    """The segments of a sequence: layouts, and the position of their first token."""
    both = [(document, 0), (fresh, case.cached)]
    return [(layout, base) for layout, base in both if layout.token_count]


def in_arena(key: Tensor, value: Tensor, spans: tuple[Span, ...]) -> KVSegment:
    """The rows of `spans` as a rank's arena keeps them: beside rows of other documents."""
    at = positions(spans)
    arena = HBMArena(spec(1), len(at) + OTHER_ROWS)
    if len(at):
        arena.write(0, 0, key[:, at], value[:, at])
    return arena.segment(0, 0, spans)
