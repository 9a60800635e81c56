"""ContextParallelRunner: prefill and answer over sharded KV, one instance per rank, all in step.

It knows nothing of the daemon: shards are handed to it, and it waits for a layer only when it first
reads it. Shapes: E hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from ..kvstore.calibration import RingSpeed
from ..kvstore.clock import Clock, SystemClock
from ..kvstore.errors import InvalidRequest, LayoutError, SpecMismatch
from ..kvstore.layout import Layout, chunked
from .answering import Answer, Answering, Ask, Growing, ignore_token, never
from .arena import HBMArena
from .choice import AttentionShape, ChoiceModel, Decision
from .communicator import Communicator
from .forward import Forward
from .grid import Grid
from .kernels.registry import choose_kernel
from .model import Decoder
from .prefilling import AUTO, CHUNK_TOKENS, Prefilling
from .sequence import LiveSequence
from .shard import KVShard
from .strategies import STRATEGIES
from .weight_share import share_of


@dataclass(frozen=True, slots=True)
class Prompt:
    """A document to prefill: whole `tokens`, of which the shard holds the first `shard.layout.token_count`."""

    shard: KVShard
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The layout of a whole document, and how each of its chunks was computed."""

    layout: Layout
    decisions: tuple[Decision, ...]


def ignore_progress(_document: int, _tokens: int) -> None:
    """For callers that show none."""


class ContextParallelRunner:
    """One rank of a group that runs a model over shards. Every rank calls the same methods with equal arguments.

    The group has cp x tp ranks, tp being the model's: rank r is (cp rank r // tp, tp rank r % tp), as in
    `kvstore.layout.Layout`.
    """

    def __init__(
        self,
        model: Decoder,
        group: Communicator,
        *,
        kernel: str | None = None,
        strategy: str = AUTO,
        speed: RingSpeed | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`kernel` names an attention kernel; by default the device chooses. All ranks call it at once.

        `strategy` is "auto", or one for all prefills. Auto decides for every step from the `speed` measured in this
        group; without one, by bytes. Raises InvalidRequest, ConfigError, LayoutError, GroupFailed.
        """
        if strategy != AUTO and strategy not in STRATEGIES:
            known = ", ".join([AUTO, *STRATEGIES])
            raise InvalidRequest(f"unknown strategy {strategy!r}; use one of {known}")
        if group.size % model.tp:
            raise LayoutError(f"a model loaded for tp={model.tp} cannot run on a group of {group.size} ranks")
        share = share_of(model.config, model.tp, group.rank % model.tp)
        assert model.share == share, "rank r of the group loads the part of tp rank r % tp"
        self.model = model
        self.group = group
        self.kernel = choose_kernel(model.device, getattr(torch, model.config.dtype), kernel)
        self.strategy = strategy
        self._clock = clock or SystemClock()
        self.grid = Grid.over(group, model.tp)
        self._forward = Forward(model, self.grid, self.kernel)
        self.choice = ChoiceModel(_shape(model, self.grid.cp.size), speed)

    def no_document(self) -> KVShard:
        """A shard of no tokens, for a prompt without a document."""
        return KVShard(arena=self._arena(0), layout=self._nothing())

    def private_shard(self, token_count: int, chunk_tokens: int = CHUNK_TOKENS) -> KVShard:
        """An empty shard in memory of its own, with rows for a document of that length."""
        rows = chunked(self._nothing(), token_count, chunk_tokens).length(self.grid.cp.rank)
        return KVShard(arena=self._arena(rows), layout=self._nothing())

    def prefill(
        self,
        shard: KVShard,
        tokens: Sequence[int],
        chunk_tokens: int = CHUNK_TOKENS,
        progress: Callable[[int], None] | None = None,
    ) -> Prefilled:
        """`prefill_batch` of one document; `progress` gets its tokens done after each chunk."""
        hear = ignore_progress if progress is None else lambda _, done: progress(done)
        return self.prefill_batch([Prompt(shard, tokens)], chunk_tokens, progress=hear)[0]

    @torch.inference_mode()
    def prefill_batch(
        self,
        prompts: Sequence[Prompt],
        chunk_tokens: int = CHUNK_TOKENS,
        batch_tokens: int | None = None,
        progress: Callable[[int, int], None] = ignore_progress,
    ) -> list[Prefilled]:
        """Compute the KV of documents into their shards' arenas, behind what the shards already hold.

        This rank's new rows are packed after those: `layout.chunked` says how many. Chunks of several documents are
        computed together up to `batch_tokens` (by default, of one chunk). `progress` gets the number of a document and
        how many of its tokens are done, after each of its chunks. Raises LayoutError, TokenOutOfRange, SpecMismatch,
        GroupFailed, and what the loading of a layer raises.
        """
        rank = self.grid.cp.rank
        for prompt in prompts:
            self._check(prompt.shard, prompt.tokens)
        finals = [chunked(prompt.shard.layout, len(prompt.tokens), chunk_tokens) for prompt in prompts]
        with self._in_step():
            for prompt, final in zip(prompts, finals, strict=True):
                needed, rows = prompt.shard.row_start + final.length(rank), prompt.shard.arena.rows
                if needed > rows:  # may differ between ranks, so all must hear of it
                    raise LayoutError(f"rank {self.group.rank} needs {needed} arena rows and has {rows}")
            live = [self._live([], prompt.shard) for prompt in prompts]
            new = [prompt.tokens[prompt.shard.layout.token_count :] for prompt in prompts]
            decisions: list[list[Decision]] = [[] for _ in prompts]
            for step in self._prefilling().run(live, new, chunk_tokens, batch_tokens or chunk_tokens):
                for chunk in step.chunks:
                    decisions[chunk.document].append(step.decision)
                    progress(chunk.document, live[chunk.document].end_token)
        return [Prefilled(final, tuple(made)) for final, made in zip(finals, decisions, strict=True)]

    def answer(
        self,
        shard: KVShard,
        question: Sequence[int],
        max_new_tokens: int,
        eos: Collection[int] = (),
        chunk_tokens: int = CHUNK_TOKENS,
        on_token: Callable[[int], None] = ignore_token,
        cancelled: Callable[[], bool] = never,
    ) -> Answer:
        """`answer_batch` of one question; see `Ask`."""
        ask = Ask(
            shard=shard,
            question=question,
            max_new_tokens=max_new_tokens,
            eos=eos,
            on_token=on_token,
            cancelled=cancelled,
        )
        return self.answer_batch([ask], chunk_tokens)[0]

    @torch.inference_mode()
    def answer_batch(
        self, asks: Sequence[Ask], chunk_tokens: int = CHUNK_TOKENS, batch_tokens: int | None = None
    ) -> list[Answer]:
        """Greedily answer questions together, each over its own document; several may share one.

        Documents stay as they are: the KV of question and answer lies in memory of its own. All ranks return the same
        tokens. Raises InvalidRequest for an empty question, TokenOutOfRange, SpecMismatch, LayoutError, GroupFailed,
        and what the loading of a layer raises.
        """
        for ask in asks:
            self._check(ask.shard, ask.question)
            if not ask.question or ask.max_new_tokens < 1:
                raise InvalidRequest("an answer needs a question of at least one token and room for one new token")
        with self._in_step():
            started_ns = self._clock.monotonic_ns()
            live = [self._asked(ask, chunk_tokens) for ask in asks]
            batch = [Growing(ask, sequence) for ask, sequence in zip(asks, live, strict=True)]
            questions = [ask.question for ask in asks]
            decisions: list[list[Decision]] = [[] for _ in asks]
            states = self._forward.states(len(asks))
            for step in self._prefilling().run(live, questions, chunk_tokens, batch_tokens or chunk_tokens):
                for chunk, stop in zip(step.chunks, step.stops, strict=True):
                    decisions[chunk.document].append(step.decision)
                    if self.grid.cp.rank == 0:  # zigzag gives it the last token
                        states[chunk.document] = step.hidden[stop - 1]
            if self.group.size > 1:
                self.group.broadcast(states, 0)
            first_ns = Answering(self._forward, self._clock).run(batch, states)
        return [
            Answer(
                tokens=growing.tokens,
                logits=torch.stack(growing.logits),
                prefill_ns=first_ns - started_ns,
                decode_ns=growing.ended_ns - first_ns,
                exposed_ns=growing.sequence.exposed_ns,
                decisions=tuple(made),
                tail=growing.sequence.grown,
            )
            for growing, made in zip(batch, decisions, strict=True)
        ]

    @torch.inference_mode()
    def complete_tail(self, shard: KVShard, answer: Answer) -> KVShard:
        """The answer's tail with its last token, whose KV one more step makes, so that it may become a document's end.

        `shard` is the document that was answered over. Raises GroupFailed.
        """
        with self._in_step():
            live = self._live([shard], answer.tail)
            self._forward.token([live.place_token()], answer.tokens[-1:])
        return live.grown

    def grow(self, into: KVShard, document: KVShard, tail: KVShard, from_token: int) -> None:
        """Copy tokens [from_token, end) of document and tail into the rows of `into`, the document grown by the tail.

        What lies before `from_token` comes from elsewhere. `into.layout` is document.layout.then(tail.layout), so every
        token stays on its rank: no messages, and ranks need not be in step. Raises LayoutError for another layout, and
        what the loading of a layer of the document raises.
        """
        if into.layout != document.layout.then(tail.layout):
            raise LayoutError("a document grows by a tail into a shard of the joined layout; use layout.then")
        rank = self.grid.cp.rank
        front = document.layout.length(rank)
        document.copy_rows(document.layout.truncated(from_token).length(rank), into, 0, front)
        before = tail.layout.truncated(max(0, from_token - document.layout.token_count)).length(rank)
        tail.copy_rows(before, into, front, tail.layout.length(rank))

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Whatever ends this rank's part early ends the group's, so that no rank waits for a message in vain."""
        with ExitStack() as stack:
            stack.callback(self.group.abort, "its runner raised")
            yield
            stack.pop_all()

    def _check(self, shard: KVShard, tokens: Sequence[int]) -> None:
        self.model.check_tokens(tokens)
        if shard.arena.spec.fingerprint() != self.model.spec.fingerprint():
            raise SpecMismatch("the shard's arena holds KV of another model")
        degrees = (shard.layout.cp, shard.layout.tp)
        if degrees != (self.grid.cp.size, self.model.tp):
            raise LayoutError(
                f"a group of cp={self.grid.cp.size} tp={self.model.tp} cannot read a shard of "
                f"cp={degrees[0]} tp={degrees[1]}; re-shard first"
            )

    def _nothing(self) -> Layout:
        return Layout((), self.grid.cp.size, self.model.tp)

    def _arena(self, rows: int) -> HBMArena:
        return HBMArena(self.model.spec, rows, self.model.tp, self.model.device)

    def _prefilling(self) -> Prefilling:
        return Prefilling(self._forward, self.strategy, self.choice)

    def _live(self, before: Sequence[KVShard], into: KVShard) -> LiveSequence:
        return LiveSequence(before, into, self.grid.cp.rank, self._clock, self.model.config.window)

    def _asked(self, ask: Ask, chunk_tokens: int) -> LiveSequence:
        """The document, and an empty tail with rows for this rank's share of question and answer."""
        ranks, count = self.grid.cp.size, len(ask.question)
        asked = chunked(self._nothing(), count, chunk_tokens).length(self.grid.cp.rank)
        # Decode fills the shortest tail: one that gets a token had at most its even share before.
        rows = max(asked, (count + ask.max_new_tokens - 1) // ranks + 1)
        tail = KVShard(arena=self._arena(rows), layout=self._nothing(), first_token=ask.shard.end_token)
        return self._live([ask.shard], tail)


def _shape(model: Decoder, cp: int) -> AttentionShape:
    """What a rank's attention computes in one layer."""
    share, dim = model.share, model.config.head_dim
    element_bytes = getattr(torch, model.config.dtype).itemsize
    return AttentionShape(
        heads=share.heads,
        kv_heads=share.kv_heads,
        head_dim=dim,
        value_dim=dim,
        element_bytes=element_bytes,
        cp=cp,
        windows=model.config.windows,
    )
