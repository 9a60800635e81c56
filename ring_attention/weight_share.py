"""WeightShare: which heads and intermediate columns one tensor-parallel rank computes.

Query, key, value, gate and up projections are split by output rows, output and down projections by input columns
(arXiv 1909.08053, section 3). Embedding and head are not split: a token needs one row of the one, a batch a few rows
of logits, and splitting them would add two collectives; they cost each rank 2 V E elements at most.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kvstore.errors import InvalidSpec
from ..kvstore.layout import heads_of
from .config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightShare:
    """Half-open ranges of one rank: query heads, kv heads (shared by several ranks if tp exceeds them), columns."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    intermediate: tuple[int, int]

    @property
    def heads(self) -> int:
        """Query heads of this rank."""
        return self.queries[1] - self.queries[0]

    @property
    def kv_heads(self) -> int:
        """Kv heads of this rank."""
        return self.keys[1] - self.keys[0]


def share_of(config: ModelConfig, tp: int, tp_rank: int) -> WeightShare:
    """The share of rank `tp_rank` of `tp`; kv heads as the layouts deal them. Raises InvalidSpec for another degree."""
    fitting = [degree for degree in range(1, config.heads + 1) if _divides(config, degree)]
    if tp not in fitting or not 0 <= tp_rank < tp:
        raise InvalidSpec(
            f"rank {tp_rank} of tp={tp} gets no equal share of {config.heads} heads, {config.kv_heads} kv heads and "
            f"{config.intermediate_size} intermediate columns; use a tp of {', '.join(map(str, fitting))}"
        )
    return WeightShare(
        queries=_range(config.heads, tp, tp_rank),
        keys=heads_of(tp_rank, tp, config.kv_heads),
        intermediate=_range(config.intermediate_size, tp, tp_rank),
    )


def _divides(config: ModelConfig, tp: int) -> bool:
    kv_dealt = config.kv_heads % tp == 0 or tp % config.kv_heads == 0
    return kv_dealt and config.heads % tp == 0 and config.intermediate_size % tp == 0


def _range(count: int, tp: int, tp_rank: int) -> tuple[int, int]:
    return tp_rank * count // tp, (tp_rank + 1) * count // tp
