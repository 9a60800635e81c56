"""Engine: what the session needs of whatever computes. The built-in runner and the fake implement it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..kvstore.layouts import ShardMessage
from ..kvstore.spec import KVSpec

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """One measured chunk."""

    cached_tokens: int
    new_tokens: int
    elapsed_ns: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens; row i of `logits` (float32 [tokens, vocabulary]) predicted token i. Times in nanoseconds.

    `exposed_ns` is the part of `prefill_ns` spent waiting for layers of the document.
    """

    tokens: list[int]
    logits: npt.NDArray[np.float32]
    prefill_ns: int
    decode_ns: int
    exposed_ns: int


class Engine(Protocol):
    """A group of ranks, registered with the daemon under `group`, that runs the model of `spec`.

    Calls raise GroupFailed when a rank dies, and leave the group usable when an answer merely fails.
    """

    @property
    def group(self) -> str:
        """The group's name with the daemon."""
        ...

    @property
    def spec(self) -> KVSpec:
        """The model's KV."""
        ...

    def prefill(
        self, shard: ShardMessage, tokens: Sequence[int], cached_tokens: int, chunk_tokens: int, progress: Progress
    ) -> list[PrefillPoint]:
        """Compute a document into the shard's rows, behind what the daemon loads."""
        ...

    def answer(self, shard: ShardMessage, question: Sequence[int], new_tokens: int) -> Answer:
        """Answer a question over the shard's document."""
        ...

    def recompute(self, tokens: Sequence[int], question: Sequence[int], new_tokens: int, chunk_tokens: int) -> Answer:
        """The same answer without any cache; `prefill_ns` counts the document too."""
        ...

    def close(self) -> None:
        """End the group."""
        ...
