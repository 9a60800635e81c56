"""Engine: what the session needs of whatever computes. The built-in runner and the fake implement it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..kvstore.layouts import LayoutMessage, ShardMessage
from ..kvstore.spec import KVSpec

Progress = Callable[[int], None]  # tokens prefilled so far
OnToken = Callable[[int, int], None]  # which question of the call, and the next token of its answer


def ignore_progress(_: int) -> None:
    """For callers that show none."""


def ignore_token(_: int, __: int) -> None:
    """For callers that wait for the whole answer."""


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """One measured chunk."""

    cached_tokens: int
    new_tokens: int
    elapsed_ns: int


@dataclass(frozen=True, slots=True)
class Question:
    """Token ids to be answered over the document of `shard` by at most `new_tokens` tokens, ending behind an `eos`.

    With `keeps_tail` the ranks keep the KV of question and answer until their next call, for `Engine.grow`.
    """

    shard: ShardMessage
    tokens: Sequence[int]
    new_tokens: int
    eos: Sequence[int] = ()
    keeps_tail: bool = False


@dataclass(frozen=True, slots=True)
class Tail:
    """KV behind a document that the ranks still have: of a question and its answer, until their next call.

    `layout` says who has which tokens, counted from the document's end. `call` and `index` name it.
    """

    call: int
    index: int
    layout: LayoutMessage


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens; row i of `logits` (float32 [n, vocabulary]) predicted token i. Times in nanoseconds.

    Logits are of the first n tokens: of all, unless those of a long answer would take hundreds of MiB.
    `exposed_ns` is the part of `prefill_ns` spent waiting for layers of the document. Times are those of the batch.
    `strategy` is how the ranks exchanged KV for the question, and `strategy_reason` why; empty if they did not say.
    `tail` is there if the question asked for it.
    """

    tokens: list[int]
    logits: npt.NDArray[np.float32]
    prefill_ns: int
    decode_ns: int
    exposed_ns: int
    strategy: str = ""
    strategy_reason: str = ""
    tail: Tail | None = None


class Engine(Protocol):
    """A group of ranks, registered with the daemon under `group`, that runs the model of `spec`.

    Calls raise GroupFailed when a rank dies, and leave the group usable when an answer merely fails. One at a time.
    """

    @property
    def group(self) -> str:
        """The group's name with the daemon."""
        ...

    @property
    def spec(self) -> KVSpec:
        """The model's KV."""
        ...

    @property
    def failure(self) -> str:
        """Why it will take no more calls, found out by looking; empty while it will."""
        ...

    def prefill(
        self, shard: ShardMessage, tokens: Sequence[int], cached_tokens: int, chunk_tokens: int, progress: Progress
    ) -> list[PrefillPoint]:
        """Compute a document into the shard's rows, behind what the daemon loads."""
        ...

    def answer_many(self, questions: Sequence[Question], on_token: OnToken = ignore_token) -> list[Answer]:
        """Answer questions together, each over its own document; several may share one. In their order.

        `on_token` hears every token as it is decoded. Raises InvalidRequest or TokenOutOfRange for bad questions.
        """
        ...

    def grow(self, into: ShardMessage, document: ShardMessage, tail: Tail, from_token: int) -> None:
        """Fill the shard `into` of a document grown by a tail: what the daemon does not load is copied, not computed.

        The daemon loads what lies before `from_token`. `into` has the layout of `document` and the tail's behind it.
        Raises ClaimNotFound when the tail is gone.
        """
        ...

    def recompute(self, tokens: Sequence[int], question: Sequence[int], new_tokens: int, chunk_tokens: int) -> Answer:
        """The same answer without any cache; `prefill_ns` counts the document too."""
        ...

    def close(self) -> None:
        """End the group."""
        ...
