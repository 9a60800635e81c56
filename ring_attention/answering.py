"""Answering: greedy decode of several answers together; those that end early leave the batch.

Shapes: B answers still growing, E hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kvstore.clock import Clock
from .choice import Decision
from .forward import Forward
from .sequence import LiveSequence
from .shard import KVShard


def ignore_token(_: int) -> None:
    """For callers that wait for the whole answer."""


def never() -> bool:
    """For callers that do not cancel."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question over the document of `shard`: greedy, at most `max_new_tokens` tokens, ends behind one of `eos`.

    `on_token` hears every token as it is decoded, on the ranks where it is set; its time counts as decode.
    `cancelled` is asked after every token, on rank 0 only: the answer ends there on all ranks. `logits_limit`, at
    least 1, bounds how many tokens' logits are kept: those of a long answer with a large vocabulary take gigabytes.
    """

    shard: KVShard
    question: Sequence[int]
    max_new_tokens: int
    eos: Collection[int] = ()
    on_token: Callable[[int], None] = ignore_token
    cancelled: Callable[[], bool] = never
    logits_limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Greedy tokens, and `logits` float32 [n, V] whose row i predicted tokens[i], for all of them or the first n.

    `prefill_ns` is the questions' of the batch, up to the first token; `exposed_ns` the part of it spent waiting for
    layers of this document; `decode_ns` the time of all later tokens. A rank's own clock. `decisions` are how the
    question's chunks were computed, and why. `tail` holds the KV of question and answer, without the last token, whose
    KV nobody needed; it stands behind the document.
    """

    tokens: list[int]
    logits: Tensor
    prefill_ns: int
    decode_ns: int
    exposed_ns: int
    decisions: tuple[Decision, ...]
    tail: KVShard


class Growing:
    """An answer in the making: its tokens so far, what predicted them, and, at the end, when that was."""

    def __init__(self, ask: Ask, sequence: LiveSequence) -> None:
        self.sequence = sequence
        self.tokens: list[int] = []
        self.logits: list[Tensor] = []
        self.ended_ns = 0
        self._ask = ask

    def take(self, token: int, logits: Tensor) -> None:
        """One more token, predicted by `logits` [V]."""
        self.tokens.append(token)
        if self._ask.logits_limit is None or len(self.logits) < self._ask.logits_limit:
            self.logits.append(logits)
        self._ask.on_token(token)

    def ends_with(self, token: int) -> bool:
        """Whether this token would be the last."""
        full = len(self.tokens) + 1 == self._ask.max_new_tokens
        return full or token in self._ask.eos or self._ask.cancelled()


class Answering:
    """Decodes a batch whose questions are prefilled. Every rank computes every token; one keeps its KV."""

    def __init__(self, forward: Forward, clock: Clock) -> None:
        self._forward = forward
        self._clock = clock

    def run(self, batch: Sequence[Growing], hidden: Tensor) -> int:
        """Grow the answers to their ends; `hidden` [B, E] are the states behind the questions, equal on all ranks.

        Returns when the first tokens were there. Raises GroupFailed.
        """
        first_ns, live = self._take(batch, hidden)
        while live:
            placed = [growing.sequence.place_token() for growing in live]
            _, live = self._take(live, self._forward.token(placed, [growing.tokens[-1] for growing in live]))
        return first_ns

    def _take(self, live: Sequence[Growing], hidden: Tensor) -> tuple[int, list[Growing]]:
        """Every answer's next token; gives when they were there, and the answers that go on."""
        logits = self._forward.model.logits(hidden)
        tokens, ends = self._agreed(live, logits)
        for growing, token, row in zip(live, tokens, logits, strict=True):
            growing.take(token, row)
        now_ns = self._clock.monotonic_ns()
        for growing in live:
            growing.ended_ns = now_ns
        return now_ns, [growing for growing, end in zip(live, ends, strict=True) if not end]

    def _agreed(self, live: Sequence[Growing], logits: Tensor) -> list[list[int]]:
        """Greedy tokens and whether they are the last, as rank 0 has it: unlike hardware may round a tie apart."""
        group = self._forward.grid.group
        tokens = logits.argmax(-1).tolist()
        if group.size == 1:
            return [tokens, _ends(live, tokens)]
        ends = _ends(live, tokens) if group.rank == 0 else tokens
        agreed = torch.tensor([tokens, ends], dtype=torch.int64, device=logits.device)
        group.broadcast(agreed, 0)
        return [list(row) for row in agreed.tolist()]


def _ends(live: Sequence[Growing], tokens: Sequence[int]) -> list[int]:
    return [int(growing.ends_with(token)) for growing, token in zip(live, tokens, strict=True)]
