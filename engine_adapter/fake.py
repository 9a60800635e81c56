"""FakeEngine: an engine without a model, for tests and trials. Its ranks live in this process; NumPy only.

A token's KV is a hash of the tokens up to it, so it depends on the whole prefix as a model's does. An answer is a hash
of the question and of every KV byte read back through the daemon: one wrong byte, and the answer differs.
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
from ..kvstore.errors import HoldfastError, InvalidRequest
from ..kvstore.geometry import extent_geometry
from ..kvstore.keys import as_tokens
from ..kvstore.layout import Copy, Layout, Span
from ..kvstore.layouts import ShardMessage
from ..kvstore.spec import KVSpec
from .agent import Agent, Seat
from .engine import Answer, OnToken, PrefillPoint, Progress, Question, ignore_token

Bytes = npt.NDArray[np.uint8]
WAIT_SECONDS: Final = 60.0
PARTS: Final = 2  # keys and values


class FakeArena:
    """A rank's rows as plain bytes: for each layer and part [kv heads, rows, row bytes]. See agent.Arena."""

    def __init__(self, spec: KVSpec, rows: int) -> None:
        self.rows = rows
        self._extent = extent_geometry(spec)
        heads = self._extent.heads
        self.planes: dict[tuple[int, int], Bytes] = {
            (layer, part): np.zeros((heads, rows, self._extent.row_bytes(part)), np.uint8)
            for layer, part in product(range(self._extent.layers), range(PARTS))
        }

    def load(
        self, copies: Sequence[Copy], buffers: Mapping[int, memoryview], layer_start: int, layer_stop: int
    ) -> None:
        """Fill rows (the copies' target) from extents (their source)."""
        for layer, part, copy in product(range(layer_start, layer_stop), range(PARTS), copies):
            extent = self._plane(buffers[copy.source], layer, part)
            heads = slice(copy.target_head, copy.target_head + copy.head_count)
            rows = slice(copy.target_row, copy.target_row + copy.row_count)
            self.planes[layer, part][heads, rows] = extent[
                copy.source_head : copy.source_head + copy.head_count,
                copy.source_row : copy.source_row + copy.row_count,
            ]

    def save(
        self, copies: Sequence[Copy], buffers: Mapping[int, memoryview], layer_start: int, layer_stop: int
    ) -> None:
        """Fill extents (the copies' target) from rows (their source)."""
        for layer, part, copy in product(range(layer_start, layer_stop), range(PARTS), copies):
            extent = self._plane(buffers[copy.target], layer, part)
            heads = slice(copy.source_head, copy.source_head + copy.head_count)
            rows = slice(copy.source_row, copy.source_row + copy.row_count)
            extent[
                copy.target_head : copy.target_head + copy.head_count,
                copy.target_row : copy.target_row + copy.row_count,
            ] = self.planes[layer, part][heads, rows]

    def forget(self, slab: memoryview) -> None:
        """Nothing is made of slabs here."""

    def _plane(self, buffer: memoryview, layer: int, part: int) -> Bytes:
        shape = (self._extent.heads, self._extent.rows, self._extent.row_bytes(part))
        offset = self._extent.plane_offset(layer, part)
        return np.frombuffer(buffer, np.uint8, count=shape[0] * shape[1] * shape[2], offset=offset).reshape(shape)


class FakeEngine:
    """An Engine of `cp` ranks with `rows` token rows each. Only models with one GQA layer group."""

    def __init__(
        self,
        group: str,
        spec: KVSpec,
        *,
        cp: int,
        rows: int,
        daemon_socket: Path,
        tenant: str = "default",
        clock: Clock | None = None,
    ) -> None:
        """Register every rank. Raises DaemonUnavailable, or the daemon's refusal."""
        self._group = group
        self._spec = spec
        self._clock = clock or SystemClock()
        self._arenas = [FakeArena(spec, rows) for _ in range(cp)]
        self._agents: list[Agent] = []
        try:
            for rank, arena in enumerate(self._arenas):
                self._agents.append(Agent(daemon_socket, tenant, Seat(group, rank, cp), spec, arena, self._clock))
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
        layout = shard.layout.layout()
        starts = self._rows(shard)
        self._wait(shard, cached_tokens)
        points = []
        planes = self._made(tokens)
        for first in range(cached_tokens, len(tokens), chunk_tokens):
            began_ns = self._clock.monotonic_ns()
            stop = min(first + chunk_tokens, len(tokens))
            for rank, row in enumerate(starts):
                self._scatter(layout.spans(rank, row), self._arenas[rank], planes, (first, stop))
            points.append(PrefillPoint(first, stop - first, self._clock.monotonic_ns() - began_ns))
            progress(stop)
        return points

    def answer_many(self, questions: Sequence[Question], on_token: OnToken = ignore_token) -> list[Answer]:
        """See Engine."""
        for question in questions:
            self._check(question.tokens, question.new_tokens)
        answers = [self._answer(question) for question in questions]
        for index, answer in enumerate(answers):
            for token in answer.tokens:
                on_token(index, token)
        return answers

    def _answer(self, question: Question) -> Answer:
        layout = question.shard.layout.layout()
        starts = self._rows(question.shard)
        exposed_ns = self._wait(question.shard, layout.token_count)
        planes = {key: self._gathered(layout, starts, *key) for key in self._keys()}
        answer = self._answered(planes, question.tokens, question.new_tokens, exposed_ns)
        ends = [index + 1 for index, token in enumerate(answer.tokens) if token in question.eos]
        kept = min(ends, default=question.new_tokens)
        return replace(answer, tokens=answer.tokens[:kept], logits=answer.logits[:kept])

    def recompute(self, tokens: Sequence[int], question: Sequence[int], new_tokens: int, chunk_tokens: int) -> Answer:
        """See Engine."""
        self._check(question, new_tokens)
        return self._answered(self._made(tokens), question, new_tokens, 0)

    def _check(self, question: Sequence[int], new_tokens: int) -> None:
        as_tokens(question, self._spec)
        if new_tokens < 1:
            raise InvalidRequest("an answer needs room for one new token")

    # Rows --------------------------------------------------------------------------------------

    def _deadline_ns(self) -> int:
        return self._clock.monotonic_ns() + int(WAIT_SECONDS * 1e9)

    def _rows(self, shard: ShardMessage) -> list[int]:
        return [agent.row(shard.id, shard.generation, self._deadline_ns()) for agent in self._agents]

    def _wait(self, shard: ShardMessage, token_count: int) -> int:
        """Wait until those first tokens are here in all layers; returns the nanoseconds that took."""
        began_ns = self._clock.monotonic_ns()
        for agent in self._agents:
            wait_layer = agent.waiter(shard.id, shard.generation, token_count, self._deadline_ns())
            for layer in range(len(self._spec.groups[0].layers)):
                wait_layer(layer)
        return self._clock.monotonic_ns() - began_ns

    def _scatter(
        self,
        spans: Sequence[Span],
        arena: FakeArena,
        planes: Mapping[tuple[int, int], Bytes],
        tokens: tuple[int, int],
    ) -> None:
        """Of these tokens [first, stop), those in a rank's spans go to its rows."""
        for span in spans:
            low, high = max(span.start, tokens[0]), min(span.stop, tokens[1])
            if low < high:
                row = span.row + low - span.start
                for key, plane in planes.items():
                    arena.planes[key][:, row : row + high - low] = plane[:, low:high]

    def _gathered(self, layout: Layout, starts: Sequence[int], layer: int, part: int) -> Bytes:
        """A whole plane [heads, tokens, row bytes], from all ranks."""
        shape = self._arenas[0].planes[layer, part].shape
        plane = np.empty((shape[0], layout.token_count, shape[2]), np.uint8)
        for rank, arena in enumerate(self._arenas):
            for span in layout.spans(rank, starts[rank]):
                rows = slice(span.row, span.row + span.stop - span.start)
                plane[:, span.start : span.stop] = arena.planes[layer, part][:, rows]
        return plane

    # The model ---------------------------------------------------------------------------------

    def _keys(self) -> list[tuple[int, int]]:
        return list(product(range(len(self._spec.groups[0].layers)), range(PARTS)))

    def _made(self, tokens: Sequence[int]) -> dict[tuple[int, int], Bytes]:
        """The KV of a document: (layer, part) to [heads, tokens, row bytes]."""
        chain = hashlib.blake2b(self._spec.fingerprint())
        prefixes = np.empty(len(tokens), np.uint64)
        for index, token in enumerate(tokens):
            chain.update(int(token).to_bytes(4, "little"))
            prefixes[index] = int.from_bytes(chain.digest()[:8], "little")
        geometry = extent_geometry(self._spec)
        planes = {}
        for layer, part in self._keys():
            size = geometry.row_bytes(part)
            place = np.arange(geometry.heads * size, dtype=np.uint64).reshape(geometry.heads, 1, size)
            salt = np.uint64(2 * (layer * PARTS + part) + 1)
            mixed = (prefixes[None, :, None] ^ (place * np.uint64(0x9E3779B97F4A7C15))) * salt
            planes[layer, part] = ((mixed * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(56)).astype(np.uint8)
        return planes

    def _answered(
        self, planes: Mapping[tuple[int, int], Bytes], question: Sequence[int], new_tokens: int, exposed_ns: int
    ) -> Answer:
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
