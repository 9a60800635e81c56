"""FakeEngine: an engine without a model, for tests and trials. Its ranks live in this process; NumPy only.

A token's KV is a hash of its id and of the KV of the token before, so it depends on the whole prefix as a model's does.
An answer is a hash of the question and of every KV byte read back through the daemon: one wrong byte, and the answer
differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ..kvstore.clock import Clock, SystemClock
from ..kvstore.errors import ClaimNotFound, HoldfastError, InvalidRequest
from ..kvstore.geometry import Geometry, arena_geometry, extent_geometry
from ..kvstore.keys import as_tokens
from ..kvstore.layout import Copy, Holding, shard_holding, striped
from ..kvstore.layouts import LayoutMessage, ShardMessage
from ..kvstore.spec import KVSpec
from .agent import Agent, Seat
from .engine import Answer, OnToken, PrefillPoint, Progress, Question, Tail, ignore_token

Bytes = npt.NDArray[np.uint8]
Planes = Mapping[tuple[int, int], Bytes]  # by layer and part: [kv heads, tokens, row bytes]
WAIT_SECONDS: Final = 60.0
PARTS: Final = 2  # keys and values


class FakeArena:
    """A rank's rows as plain bytes: for each layer and part [its kv heads, rows, row bytes]. See agent.Arena."""

    def __init__(self, spec: KVSpec, rows: int, tp: int = 1) -> None:
        self.rows = rows
        arena = arena_geometry(spec, rows, tp)
        self.planes: dict[tuple[int, int], Bytes] = {
            (layer, part): np.zeros((arena.heads, rows, arena.row_bytes(part)), np.uint8)
            for layer, part in product(range(arena.layers), range(PARTS))
        }

    def load(
        self,
        copies: Sequence[Copy],
        buffers: Mapping[int, memoryview],
        geometry: Geometry,
        layer_start: int,
        layer_stop: int,
    ) -> None:
        """Fill rows (the copies' target) from extents (their source)."""
        for layer, part, copy in product(range(layer_start, layer_stop), range(PARTS), copies):
            extent = _plane(buffers[copy.source], geometry, layer, part)
            heads = slice(copy.target_head, copy.target_head + copy.head_count)
            rows = slice(copy.target_row, copy.target_row + copy.row_count)
            self.planes[layer, part][heads, rows] = extent[
                copy.source_head : copy.source_head + copy.head_count,
                copy.source_row : copy.source_row + copy.row_count,
            ]

    def save(
        self,
        copies: Sequence[Copy],
        buffers: Mapping[int, memoryview],
        geometry: Geometry,
        layer_start: int,
        layer_stop: int,
    ) -> None:
        """Fill extents (the copies' target) from rows (their source)."""
        for layer, part, copy in product(range(layer_start, layer_stop), range(PARTS), copies):
            extent = _plane(buffers[copy.target], geometry, layer, part)
            heads = slice(copy.source_head, copy.source_head + copy.head_count)
            rows = slice(copy.source_row, copy.source_row + copy.row_count)
            extent[
                copy.target_head : copy.target_head + copy.head_count,
                copy.target_row : copy.target_row + copy.row_count,
            ] = self.planes[layer, part][heads, rows]

    def forget(self, slab: memoryview) -> None:
        """Nothing is made of slabs here."""


def _plane(buffer: memoryview, geometry: Geometry, layer: int, part: int) -> Bytes:
    """One plane of an extent: [kv heads, rows, row bytes]."""
    shape = (geometry.heads, geometry.rows, geometry.row_bytes(part))
    offset = geometry.plane_offset(layer, part)
    return np.frombuffer(buffer, np.uint8, count=shape[0] * shape[1] * shape[2], offset=offset).reshape(shape)


class FakeEngine:
    """An Engine of cp x tp ranks with `rows` token rows each. Only models with one GQA layer group."""

    def __init__(
        self,
        group: str,
        spec: KVSpec,
        *,
        cp: int,
        tp: int = 1,
        rows: int,
        daemon_socket: Path,
        tenant: str = "default",
        clock: Clock | None = None,
    ) -> None:
        """Register every rank. Raises DaemonUnavailable, or the daemon's refusal."""
        self._group = group
        self._spec = spec
        self._cp = cp
        self._tp = tp
        self._clock = clock or SystemClock()
        self._arenas = [FakeArena(spec, rows, tp) for _ in range(cp * tp)]
        self._agents: list[Agent] = []
        self._calls = 0
        self._tails: dict[int, Planes] = {}  # of the last call, by question
        try:
            for rank, arena in enumerate(self._arenas):
                self._agents.append(Agent(daemon_socket, tenant, Seat(group, rank, cp, tp), spec, arena, self._clock))
        except HoldfastError:
            self.close()
            raise

    @property
    def group(self) -> str:
        """See Engine."""
        return self._group

    @property
    def spec(self) -> KVSpec:
        """See Engine."""
        return self._spec

    @property
    def failure(self) -> str:
        """See Engine."""
        return "" if self._agents else "the group is closed"

    def close(self) -> None:
        """See Engine."""
        for agent in self._agents:
            agent.close()
        self._agents.clear()

    def prefill(
        self, shard: ShardMessage, tokens: Sequence[int], cached_tokens: int, chunk_tokens: int, progress: Progress
    ) -> list[PrefillPoint]:
        """See Engine."""
        self._begin_call()
        holdings = self._holdings(shard)
        self._wait(shard, cached_tokens)
        points = []
        planes = self._made(tokens)
        for first in range(cached_tokens, len(tokens), chunk_tokens):
            began_ns = self._clock.monotonic_ns()
            stop = min(first + chunk_tokens, len(tokens))
            self._scatter(holdings, planes, 0, (first, stop))
            points.append(PrefillPoint(first, stop - first, self._clock.monotonic_ns() - began_ns))
            progress(stop)
        return points

    def answer_many(self, questions: Sequence[Question], on_token: OnToken = ignore_token) -> list[Answer]:
        """See Engine."""
        for question in questions:
            self._check(question.tokens, question.new_tokens)
        self._begin_call()
        answers = [self._answer(index, question) for index, question in enumerate(questions)]
        for index, answer in enumerate(answers):
            for token in answer.tokens:
                on_token(index, token)
        return answers

    def _answer(self, index: int, question: Question) -> Answer:
        layout = question.shard.layout.layout()
        exposed_ns = self._wait(question.shard, layout.token_count)
        planes = self._gathered(question.shard)
        answer = self._answered(planes, question.tokens, question.new_tokens, exposed_ns)
        ends = [place + 1 for place, token in enumerate(answer.tokens) if token in question.eos]
        kept = min(ends, default=question.new_tokens)
        answer = replace(answer, tokens=answer.tokens[:kept], logits=answer.logits[:kept])
        if not question.keeps_tail:
            return answer
        turn = [*question.tokens, *answer.tokens]
        last = b"".join(planes[key][:, -1].tobytes() for key in self._keys())
        self._tails[index] = self._made(turn, last)
        tail = striped(len(turn), self._cp, self._tp)
        return replace(answer, tail=Tail(self._calls, index, LayoutMessage.of(tail)))

    def grow(self, into: ShardMessage, document: ShardMessage, tail: Tail, from_token: int) -> None:
        """See Engine."""
        if tail.call != self._calls or tail.index not in self._tails:
            raise ClaimNotFound("the KV of that question and answer is gone: the ranks have done something else since")
        count = document.layout.layout().token_count
        assert into.layout.layout() == document.layout.layout().then(tail.layout.layout()), "the joined layout"
        holdings = self._holdings(into)
        self._scatter(holdings, self._gathered(document), 0, (from_token, count))
        behind = self._tails[tail.index]
        self._scatter(holdings, behind, count, (max(count, from_token), count + tail.layout.layout().token_count))
        self._wait(into, from_token)

    def recompute(self, tokens: Sequence[int], question: Sequence[int], new_tokens: int, chunk_tokens: int) -> Answer:
        """See Engine."""
        self._check(question, new_tokens)
        self._begin_call()
        return self._answered(self._made(tokens), question, new_tokens, 0)

    def _begin_call(self) -> None:
        self._calls += 1
        self._tails.clear()

    def _check(self, question: Sequence[int], new_tokens: int) -> None:
        as_tokens(question, self._spec)
        if new_tokens < 1:
            raise InvalidRequest("an answer needs room for one new token")

    # Rows --------------------------------------------------------------------------------------

    def _deadline_ns(self) -> int:
        return self._clock.monotonic_ns() + int(WAIT_SECONDS * 1e9)

    def _holdings(self, shard: ShardMessage) -> list[Holding]:
        """What every rank holds of a shard, at the rows that the daemon gave it."""
        layout, heads = shard.layout.layout(), self._spec.groups[0].kv_heads
        rows = [agent.row(shard.id, shard.generation, self._deadline_ns()) for agent in self._agents]
        return [shard_holding(layout, rank, heads, row) for rank, row in enumerate(rows)]

    def _wait(self, shard: ShardMessage, token_count: int) -> int:
        """Wait until those first tokens are here in all layers; returns the nanoseconds that took."""
        began_ns = self._clock.monotonic_ns()
        for agent in self._agents:
            wait_layer = agent.waiter(shard.id, shard.generation, token_count, self._deadline_ns())
            for layer in range(len(self._spec.groups[0].layers)):
                wait_layer(layer)
        return self._clock.monotonic_ns() - began_ns

    def _scatter(self, holdings: Sequence[Holding], planes: Planes, first: int, tokens: tuple[int, int]) -> None:
        """Of these tokens [start, stop), each rank takes what it holds. `planes` begin at token `first`."""
        for holding, arena in zip(holdings, self._arenas, strict=True):
            heads = slice(holding.head_start, holding.head_stop)
            for span in holding.spans:
                low, high = max(span.start, tokens[0]), min(span.stop, tokens[1])
                if low < high:
                    row = span.row + low - span.start
                    for key, plane in planes.items():
                        arena.planes[key][:, row : row + high - low] = plane[heads, low - first : high - first]

    def _gathered(self, shard: ShardMessage) -> Planes:
        """All planes of a shard, from all ranks."""
        holdings = self._holdings(shard)
        count, heads = shard.layout.layout().token_count, self._spec.groups[0].kv_heads
        planes = {}
        for key in self._keys():
            plane = np.empty((heads, count, self._arenas[0].planes[key].shape[2]), np.uint8)
            for holding, arena in zip(holdings, self._arenas, strict=True):
                for span in holding.spans:
                    rows = slice(span.row, span.row + span.stop - span.start)
                    heads_of = slice(holding.head_start, holding.head_stop)
                    plane[heads_of, span.start : span.stop] = arena.planes[key][:, rows]
            planes[key] = plane
        return planes

    # The model ---------------------------------------------------------------------------------

    def _keys(self) -> list[tuple[int, int]]:
        return list(product(range(len(self._spec.groups[0].layers)), range(PARTS)))

    def _made(self, tokens: Sequence[int], previous: bytes | None = None) -> Planes:
        """The KV of tokens behind the one whose KV, plane by plane, is `previous`."""
        geometry = extent_geometry(self._spec)
        sizes = {key: geometry.heads * geometry.row_bytes(key[1]) for key in self._keys()}
        last = previous if previous is not None else self._spec.fingerprint()
        rows = []
        for token in tokens:
            last = hashlib.shake_128(last + int(token).to_bytes(4, "little")).digest(sum(sizes.values()))
            rows.append(last)
        table = np.frombuffer(b"".join(rows), np.uint8).reshape(len(tokens), -1)
        planes, at = {}, 0
        for key, size in sizes.items():
            plane = table[:, at : at + size].reshape(len(tokens), geometry.heads, -1)
            planes[key] = np.ascontiguousarray(plane.transpose(1, 0, 2))
            at += size
        return planes

    def _answered(self, planes: Planes, question: Sequence[int], new_tokens: int, exposed_ns: int) -> Answer:
        began_ns = self._clock.monotonic_ns()
        digest = hashlib.blake2b(np.asarray(question, "<u4").tobytes())
        for key in self._keys():
            digest.update(planes[key].tobytes())
        random = np.random.default_rng(list(digest.digest()))
        prefilled_ns = self._clock.monotonic_ns()
        logits = random.standard_normal((new_tokens, self._spec.vocabulary_size), dtype=np.float32)
        return Answer(
            tokens=[int(token) for token in logits.argmax(axis=1)],
            logits=logits,
            prefill_ns=exposed_ns + prefilled_ns - began_ns,
            decode_ns=self._clock.monotonic_ns() - prefilled_ns,
            exposed_ns=exposed_ns,
        )
