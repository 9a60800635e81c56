"""KVSegment: one layer's local KV of some tokens.

Shapes: Hkv kv heads, S rows, D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kvstore.layout import Span
from .positions import positions_of


def span_tokens(spans: Sequence[Span]) -> int:
    """Tokens in all spans."""
    return len(positions_of(spans))


def shifted(spans: Sequence[Span], base: int) -> tuple[Span, ...]:
    """The same rows, with token positions counted from `base`."""
    return tuple(Span(base + span.start, base + span.stop, span.row) for span in spans)


@dataclass(frozen=True, slots=True)
class KVSegment:
    """`key` [Hkv, S, D] and `value` [Hkv, S, Dv] of the tokens in `spans`, packed ascending.

    Row i of the segment is the i-th token of `spans`; `Span.row` belongs to the buffer behind and
    is not read. `latent`: values are the first columns of their keys, the same memory.
    """

    key: Tensor
    value: Tensor
    spans: tuple[Span, ...]
    latent: bool = False

    @classmethod
    def of_latents(cls, latents: Tensor, value_dim: int, spans: tuple[Span, ...]) -> KVSegment:
        """Of latent attention (MLA, absorbed): latents [Hkv, S, D] whose first `value_dim` columns are the values."""
        return cls(latents, latents[..., :value_dim], spans, latent=True)

    def __post_init__(self) -> None:
        assert self.key.shape[:2] == self.value.shape[:2], "key and value have the same heads and rows"
        assert self.key.shape[1] == span_tokens(self.spans), "spans name every row"

    @property
    def token_count(self) -> int:
        """Rows, which are tokens."""
        return self.key.shape[1]
