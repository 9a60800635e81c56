"""Prefilling: the new tokens of several documents, chunk by chunk, a strategy decided for every step.

Shapes: E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import Tensor

from .choice import ChoiceModel, Decision
from .forward import Forward, Ids
from .sequence import LiveSequence
from .steps import Chunk, steps

CHUNK_TOKENS: Final = 2048  # bounds a chunk's activations; larger chunks gain nothing on CPU
AUTO: Final = "auto"


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass is done: its chunks, why it went as it did, and this rank's `hidden` states [T, E].

    `stops[i]` is where the share of chunk i ends in `hidden`.
    """

    chunks: Sequence[Chunk]
    decision: Decision
    hidden: Tensor
    stops: Sequence[int]


class Prefilling:
    """Prefills with one strategy, or with the one that `choice` takes from step to step."""

    def __init__(self, forward: Forward, strategy: str, choice: ChoiceModel) -> None:
        self._forward = forward
        self._strategy = strategy
        self._choice = choice

    def run(
        self, sequences: Sequence[LiveSequence], tokens: Sequence[Sequence[int]], chunk_tokens: int, batch_tokens: int
    ) -> Iterator[Step]:
        """Compute `tokens[i]` behind sequence i. Raises GroupFailed, and what the loading of a layer raises."""
        ids = [np.asarray(new, dtype=np.int64) for new in tokens]
        for chunks in steps([len(new) for new in ids], chunk_tokens, batch_tokens):
            yield self._step(chunks, sequences, ids)

    def _step(self, chunks: Sequence[Chunk], sequences: Sequence[LiveSequence], ids: Sequence[Ids]) -> Step:
        live = [sequences[chunk.document] for chunk in chunks]
        decision = self._decide(chunks, live)
        batch = [sequence.place_chunk(chunk.token_count) for sequence, chunk in zip(live, chunks, strict=True)]
        new = [ids[chunk.document][chunk.start : chunk.stop] for chunk in chunks]
        hidden = self._forward.chunk(decision.strategy, batch, new)
        return Step(chunks, decision, hidden, self._forward.cuts(batch)[1:])

    def _decide(self, chunks: Sequence[Chunk], live: Sequence[LiveSequence]) -> Decision:
        if self._strategy != AUTO:
            reason = f"{self._strategy}: asked for"
            return Decision(strategy=self._strategy, reason=reason, pass_kv_seconds=None, pass_q_seconds=None)
        counts = [(chunk.token_count, sequence.end_token) for chunk, sequence in zip(chunks, live, strict=True)]
        return self._choice.decide(counts, [sequence.rank_tokens for sequence in live])
