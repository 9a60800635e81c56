"""ContextParallelRunner: prefill and answer over sharded KV, one instance per rank, all in step.

It knows nothing of the daemon: shards are handed to it, and it waits for a layer only when it first
reads it. Shapes: T tokens, H query heads, Hkv kv heads, D head dim, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from ..kvstore.clock import Clock, SystemClock
from ..kvstore.errors import InvalidRequest, InvalidSpec, LayoutError, SpecMismatch
from ..kvstore.layout import Layout, Span, chunked, zigzag
from .arena import HBMArena
from .communicator import Communicator
from .decode import decode
from .kernels.kernel import Kernel
from .kernels.registry import choose_kernel
from .model import Decoder, alone
from .pass_kv import pass_kv
from .segment import shifted
from .shard import KVShard
from .share import SequenceShare

CHUNK_TOKENS: Final = 2048  # bounds a chunk's activations; larger chunks gain nothing on CPU


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens, and `logits` float32 [n, V] whose row i predicted tokens[i].

    `prefill_ns` is the question's, up to the first token; `exposed_ns` the part of it spent waiting
    for layers still being loaded; `decode_ns` the time of all later tokens. A rank's own clock.
    """

    tokens: list[int]
    logits: Tensor
    prefill_ns: int
    decode_ns: int
    exposed_ns: int


class ContextParallelRunner:
    """One rank of a group that runs a model over shards. Every rank calls the same methods with equal arguments."""

    def __init__(
        self,
        model: Decoder,
        communicator: Communicator,
        kernel: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`kernel` names an attention kernel; by default the device chooses. Raises InvalidSpec for sliding windows."""
        if any(window is not None for window in model.config.windows):
            raise InvalidSpec("the model has sliding windows, and this runner attends to everything")
        self.model = model
        self.communicator = communicator
        self._kernel = choose_kernel(model.device, getattr(torch, model.spec.dtype), kernel)
        self._clock = clock or SystemClock()

    def no_document(self) -> KVShard:
        """A shard of no tokens, for a prompt without a document."""
        return KVShard(arena=self._arena(0), layout=Layout((), self.communicator.size))

    def private_shard(self, token_count: int, chunk_tokens: int = CHUNK_TOKENS) -> KVShard:
        """An empty shard in memory of its own, with rows for a document of that length."""
        layout = chunked(Layout((), self.communicator.size), token_count, chunk_tokens)
        rows = layout.length(self.communicator.rank)
        return KVShard(arena=self._arena(rows), layout=Layout((), self.communicator.size))

    @torch.inference_mode()
    def prefill(
        self,
        shard: KVShard,
        tokens: Sequence[int],
        chunk_tokens: int = CHUNK_TOKENS,
        progress: Callable[[int], None] | None = None,
    ) -> Layout:
        """Compute the KV of the document `tokens` into the shard's arena, behind what the shard already holds.

        The first `shard.layout.token_count` tokens are there already (partial prefill). This rank's
        new rows are packed after them: `layout.chunked` says how many. `progress` gets the tokens
        done after each chunk. Returns the layout of the whole document. Raises LayoutError,
        TokenOutOfRange, SpecMismatch, GroupFailed.
        """
        rank = self.communicator.rank
        self._check(shard, tokens)
        final = chunked(shard.layout, len(tokens), chunk_tokens)
        needed = shard.row_start + final.length(rank)
        with self._in_step():
            if needed > shard.arena.rows:  # may differ between ranks, so all must hear of it
                raise LayoutError(f"rank {rank} needs {needed} arena rows and has {shard.arena.rows}")
            waits = _LayerWaits(shard.wait_layer, self._clock)
            fresh = tokens[shard.layout.token_count :]
            for grown, _ in self._chunks([], shard, fresh, chunk_tokens, waits):
                if progress is not None:
                    progress(grown.layout.token_count)
        return final

    @torch.inference_mode()
    def answer(
        self,
        shard: KVShard,
        question: Sequence[int],
        max_new_tokens: int,
        eos: int | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> Answer:
        """Greedily answer `question` over the shard's document, which stays as it is; ends early after `eos`.

        The KV of question and answer lives in a tail of the runner's own. All ranks return the same
        tokens. Raises InvalidRequest for an empty question, TokenOutOfRange, SpecMismatch,
        LayoutError, GroupFailed.
        """
        self._check(shard, question)
        if not question or max_new_tokens < 1:
            raise InvalidRequest("an answer needs a question of at least one token and room for one new token")
        ranks = self.communicator.size
        mine = chunked(Layout((), ranks), len(question), chunk_tokens).length(self.communicator.rank)
        rows = mine + max_new_tokens // ranks + 1
        tail = KVShard(arena=self._arena(rows), layout=Layout((), ranks), first_token=shard.end_token)
        with self._in_step():
            started = self._clock.monotonic_ns()
            waits = _LayerWaits(shard.wait_layer, self._clock)
            hidden: Tensor | None = None
            for grown, states in self._chunks([shard], tail, question, chunk_tokens, waits):
                tail, hidden = grown, states
            assert hidden is not None, "a question has at least one chunk"
            logits = self._last_logits(tail, hidden)
            answering = _Answering(self.model, self.communicator, shard, tail, self._kernel)
            all_logits = [logits]
            tokens = [answering.agree(logits)]
            prefilled = self._clock.monotonic_ns()
            while len(tokens) < max_new_tokens and tokens[-1] != eos:
                all_logits.append(answering.step(tokens[-1]))
                tokens.append(answering.agree(all_logits[-1]))
            ended = self._clock.monotonic_ns()
        return Answer(
            tokens,
            torch.stack(all_logits),
            prefilled - started,
            ended - prefilled,
            waits.exposed_ns,
        )

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Whatever ends this rank's part early ends the group's, so that no rank waits for a message in vain."""
        with ExitStack() as stack:
            stack.callback(self.communicator.abort, "its runner raised")
            yield
            stack.pop_all()

    def _check(self, shard: KVShard, tokens: Sequence[int]) -> None:
        self.model.check_tokens(tokens)
        if shard.arena.spec.fingerprint() != self.model.spec.fingerprint():
            raise SpecMismatch("the shard's arena holds KV of another model")
        if (shard.layout.cp, shard.layout.tp) != (self.communicator.size, 1):
            raise LayoutError(
                f"a group of {self.communicator.size} ranks cannot read a shard of "
                f"cp={shard.layout.cp} tp={shard.layout.tp}; re-shard first"
            )

    def _arena(self, rows: int) -> HBMArena:
        return HBMArena(self.model.spec, rows, device=self.model.device)

    def _chunks(
        self,
        before: Sequence[KVShard],
        into: KVShard,
        tokens: Sequence[int],
        chunk_tokens: int,
        waits: _LayerWaits,
    ) -> Iterator[tuple[KVShard, Tensor]]:
        """Prefill `tokens` behind `into`, chunk by chunk: yields the grown shard and this rank's hidden states."""
        communicator = self.communicator
        for start in range(0, len(tokens), chunk_tokens):
            chunk = tokens[start : start + chunk_tokens]
            fresh = zigzag(len(chunk), communicator.size)
            mine = fresh.spans(communicator.rank)
            base, row = into.end_token, into.row_start + into.layout.length(communicator.rank)
            into = into.grown(fresh)
            local = [token for span in mine for token in chunk[span.start : span.stop]]
            positions = [base + index for span in mine for index in range(span.start, span.stop)]
            queries = [shifted(fresh.spans(rank), base) for rank in range(communicator.size)]
            attention = _RingAttention(communicator, [*before, into], row, queries, waits, self._kernel)
            yield into, self.model.hidden(_ids(self.model, local), _ids(self.model, positions), attention, alone)

    def _last_logits(self, tail: KVShard, hidden: Tensor) -> Tensor:
        """Logits [V] of the last prefilled token, from the rank that has it."""
        owner = tail.layout.runs[-1].rank
        if owner == self.communicator.rank:
            logits = self.model.logits(hidden[-1:])[0]
        else:
            logits = torch.empty(self.model.config.vocabulary_size, device=self.model.device)
        if self.communicator.size > 1:
            self.communicator.broadcast(logits, owner)
        return logits


def _ids(model: Decoder, numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=model.device)


class _LayerWaits:
    """Waits for each layer once, and counts the nanoseconds that took."""

    def __init__(self, wait_layer: Callable[[int], None], clock: Clock) -> None:
        self._clock = clock
        self._wait_layer = wait_layer
        self._ready: set[int] = set()
        self.exposed_ns = 0

    def __call__(self, layer: int) -> None:
        if layer in self._ready:
            return
        started = self._clock.monotonic_ns()
        self._wait_layer(layer)
        self.exposed_ns += self._clock.monotonic_ns() - started
        self._ready.add(layer)


class _RingAttention:
    """Attention of one prefill chunk: its KV is stored in the last shard, then all shards are read by ring."""

    def __init__(
        self,
        communicator: Communicator,
        shards: Sequence[KVShard],
        row: int,
        queries: Sequence[tuple[Span, ...]],
        waits: _LayerWaits,
        kernel: Kernel,
    ) -> None:
        self._communicator = communicator
        self._shards = shards
        self._row = row
        self._queries = queries
        self._waits = waits
        self._kernel = kernel
        self._held = [[shard.spans(rank) for shard in shards] for rank in range(communicator.size)]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._shards[-1].arena.write(layer, self._row, key, value)
        self._waits(layer)
        own = self._held[self._communicator.rank]
        segments = [shard.segment(layer, spans) for shard, spans in zip(self._shards, own, strict=True)]
        share = SequenceShare(self._queries, segments, self._held)
        return pass_kv(self._communicator, self._kernel, query, [share])


class _Answering:
    """Greedy decode: every rank computes every token, one of them keeps its KV, in turn."""

    def __init__(
        self,
        model: Decoder,
        communicator: Communicator,
        shard: KVShard,
        tail: KVShard,
        kernel: Kernel,
    ) -> None:
        self._model = model
        self._communicator = communicator
        self._kernel = kernel
        self._shard = shard
        self._tail = tail
        self._shard_spans = shard.spans(self._communicator.rank)
        self._tail_spans = tail.spans(self._communicator.rank)
        self._row = tail.layout.length(self._communicator.rank)
        self._position = tail.end_token
        self._step = 0

    def agree(self, logits: Tensor) -> int:
        """The greedy token, rank 0's: ranks on unlike hardware may round a tie apart."""
        token = logits.argmax().reshape(1)
        if self._communicator.size > 1:
            self._communicator.broadcast(token, 0)
        return int(token)

    def step(self, token: int) -> Tensor:
        """Logits [V] after `token`, whose KV goes to the next rank, offset by one each step."""
        keeps = self._step % self._communicator.size == self._communicator.rank
        if keeps:
            self._tail_spans = _extended(self._tail_spans, self._position)
        hidden = self._model.hidden(
            _ids(self._model, [token]),
            _ids(self._model, [self._position]),
            self._keep_and_read if keeps else self._read,
            alone,
        )
        self._row += keeps
        self._position += 1
        self._step += 1
        return self._model.logits(hidden)[0]

    def _keep_and_read(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._tail.arena.write(layer, self._row, key, value)
        return self._read(layer, query, key, value)

    def _read(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        segments = [
            self._shard.segment(layer, self._shard_spans),
            self._tail.segment(layer, self._tail_spans),
        ]
        queries = [(Span(self._position, self._position + 1),)] * self._communicator.size
        share = SequenceShare(queries, segments, held=[])
        return decode(self._communicator, self._kernel, query, [share])


def _extended(spans: tuple[Span, ...], position: int) -> tuple[Span, ...]:
    """`spans` with one more token, at a position behind them."""
    if spans and spans[-1].stop == position:
        return (*spans[:-1], replace(spans[-1], stop=position + 1))
    return (*spans, Span(position, position + 1))
