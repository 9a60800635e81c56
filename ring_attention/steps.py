"""Steps: which chunks of which documents one forward pass takes. Pure.

A document's chunks are its own, whatever else is computed beside them, because its layout follows from them; a step
takes chunks of several documents while they fit its budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens [start, stop) of document number `document`, counted from its first new one."""

    document: int
    start: int
    stop: int

    @property
    def token_count(self) -> int:
        """New tokens."""
        return self.stop - self.start


def steps(new_tokens: Sequence[int], chunk_tokens: int, batch_tokens: int) -> Iterator[list[Chunk]]:
    """Every chunk once, each document's in order, one of a document per step, as many as `batch_tokens` allow.

    Documents come first come first served, so early ones are done early. A chunk larger than the budget goes alone.
    """
    assert chunk_tokens >= 1, chunk_tokens
    done = [0] * len(new_tokens)
    while any(start < count for start, count in zip(done, new_tokens, strict=True)):
        step: list[Chunk] = []
        left = batch_tokens
        for document, (start, count) in enumerate(zip(done, new_tokens, strict=True)):
            chunk = Chunk(document, start, min(start + chunk_tokens, count))
            if chunk.token_count and (not step or chunk.token_count <= left):
                step.append(chunk)
                left -= chunk.token_count
        for chunk in step:
            done[chunk.document] = chunk.stop
        yield step
