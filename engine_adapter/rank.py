"""Rank: one process of a group of cp x tp ranks. `python -m holdfast.engine_adapter.rank` is started by the driver.

It holds the model, the HBM arena with its residency agent, and the runner; it takes orders from the driver one by
one, and ends when the driver does.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..kvstore.calibration import RingSpeed
from ..kvstore.clock import Clock, SystemClock
from ..kvstore.errors import ClaimNotFound, GroupFailed, HoldfastError
from ..kvstore.keys import token_list
from ..kvstore.layouts import LayoutMessage, ShardMessage
from ..ring_attention.answering import Answer
from ..ring_attention.answering import Ask as Question
from ..ring_attention.arena import HBMArena
from ..ring_attention.checkpoint import load_model
from ..ring_attention.choice import Decision
from ..ring_attention.device import device_of, use_threads
from ..ring_attention.join import join as join_group
from ..ring_attention.model import Decoder
from ..ring_attention.prefilling import AUTO
from ..ring_attention.runner import ContextParallelRunner
from ..ring_attention.shard import KVShard
from .agent import Agent, Seat
from .calibrating import Calibrating
from .control import (
    Answered,
    AnswerMessage,
    AnyOrder,
    AnyReport,
    Ask,
    Asked,
    Cancel,
    Channel,
    Failed,
    Grow,
    Grown,
    Measure,
    Prefill,
    Prefilled,
    Progress,
    Quit,
    Ready,
    Recompute,
    Rejoin,
    Rejoined,
    Start,
    Token,
)
from .launch import joined
from .rank_config import RankConfig

JOIN_SECONDS: Final = 120.0
LOGITS_BYTES: Final = 128 << 20  # of one report, whose frame is limited; a large vocabulary takes half a MiB a token


class Rank:
    """The process, from joining to quitting."""

    def __init__(self, config: RankConfig, channel: Channel, clock: Clock) -> None:
        self._config = config
        self._channel = channel
        self._clock = clock
        use_threads(config.threads)
        self._device = device_of(config.device, config.rank)
        self._model: Decoder = load_model(
            Path(config.model), str(self._device), tp=config.tp, tp_rank=config.rank % config.tp
        )
        self._arena = HBMArena(self._model.spec, config.rows, config.tp, self._device)
        self._runner = self._join(config.init_method)
        seat = Seat(
            group=config.group,
            rank=config.rank,
            cp=config.cp,
            tp=config.tp,
            kernel=self._runner.kernel.name,
            communicator=self._runner.group.name,
            device=str(self._device),
        )
        self._agent = Agent(Path(config.daemon_socket), config.tenant, seat, self._model.spec, self._arena, clock)
        self._call = 0
        self._tails: dict[int, KVShard] = {}  # of that call, by question
        self._next: AnyOrder | None = None  # it came in the middle of a call
        self._calibrating = Calibrating(Path(config.daemon_socket), config.tenant, clock)
        if config.strategy == AUTO and config.cp > 1:
            self._calibrating.choose(self._runner)

    def _join(self, init_method: str, speed: RingSpeed | None = None) -> ContextParallelRunner:
        config = self._config
        size = config.cp * config.tp
        communicator = join_group(
            config.communicator, config.rank, size, init_method, self._device, config.deadline_seconds
        )
        return ContextParallelRunner(
            self._model,
            communicator,
            kernel=config.kernel or None,
            strategy=config.strategy,
            speed=speed,
            clock=self._clock,
        )

    def serve(self) -> None:
        """Carry out orders until told to quit, or the driver is gone."""
        self._channel.send(Ready(self._model.spec.fingerprint()))
        while True:
            order, self._next = self._next or self._channel.receive_order(), None
            match order:
                case None | Quit():
                    return
                case Cancel():
                    continue  # of a call that had ended
            try:
                report = self._carry_out(order)
            except HoldfastError as error:
                report = Failed(error.code, f"rank {self._config.rank}: {error.message}")
            self._channel.send(report)

    def _is_cancelled(self) -> bool:
        """Whether the driver has said something since: in the middle of a call that can only be to end it."""
        if self._next is None and self._channel.has_more:
            self._next = self._channel.receive_order() or Quit()
        return self._next is not None

    def close(self) -> None:
        """Leave the group and the daemon."""
        self._agent.close()
        self._runner.group.abort("the rank quits")

    def _carry_out(self, order: AnyOrder) -> AnyReport:
        if isinstance(order, Grow):
            return self._grow(order)
        self._tails.clear()
        match order:
            case Prefill():
                return self._prefill(order)
            case Ask():
                return self._ask(order)
            case Recompute():
                return self._recompute(order)
            case Measure():
                return self._calibrating.measure(self._runner)
            case Rejoin(init_method):
                self._runner.group.abort("the group starts anew")
                self._runner = self._join(init_method, self._runner.choice.speed)
                return Rejoined()
            case _:
                raise GroupFailed(f"{type(order).__name__} is no order")

    def _shard(self, shard: ShardMessage, token_count: int, deadline_seconds: float) -> KVShard:
        """The rows that the daemon gave to this opening of the shard, of its first `token_count` tokens."""
        deadline_ns = self._clock.monotonic_ns() + int(deadline_seconds * 1e9)
        return KVShard(
            arena=self._arena,
            layout=shard.layout.layout().truncated(token_count),
            row_start=self._agent.row(shard.id, shard.generation, deadline_ns),
            wait_layer=self._agent.waiter(shard.id, shard.generation, token_count, deadline_ns),
        )

    def _prefill(self, order: Prefill) -> AnyReport:
        shard = self._shard(order.shard, order.cached_tokens, order.deadline_seconds)
        ids = token_list(order.tokens)
        cached = shard.layout.token_count
        points: list[tuple[int, int, int]] = []
        last = [cached, self._clock.monotonic_ns()]

        def progress(done: int) -> None:
            now_ns = self._clock.monotonic_ns()
            new = min(done, len(ids)) - last[0]
            points.append((last[0], new, now_ns - last[1]))
            last[:] = [done, now_ns]
            if self._config.rank == 0:
                self._channel.send(Progress(done))
                if self._is_cancelled():
                    raise GroupFailed("the prefill was cancelled")

        if cached < len(ids):
            self._runner.prefill(shard, ids, order.chunk_tokens, progress)
        else:
            for layer in range(len(self._model.spec.groups[0].layers)):
                shard.wait_layer(layer)
        return Prefilled(points)

    def _ask(self, order: Ask) -> AnyReport:
        limit = logits_limit(self._model.config.vocabulary_size, len(order.questions))
        asks = [
            self._question(index, asked, order.deadline_seconds, limit) for index, asked in enumerate(order.questions)
        ]
        answers = self._runner.answer_batch(asks)
        self._call = order.call
        for index, (asked, ask, answer) in enumerate(zip(order.questions, asks, answers, strict=True)):
            if asked.keeps_tail:
                self._tails[index] = self._runner.complete_tail(ask.shard, answer)
        return Answered([self._answered(answer, self._tails.get(index)) for index, answer in enumerate(answers)])

    def _question(self, index: int, asked: Asked, deadline_seconds: float, logits_limit: int) -> Question:
        def tell(token: int) -> None:
            if self._config.rank == 0:
                self._channel.send(Token(index, token))

        return Question(
            shard=self._shard(asked.shard, asked.shard.layout.layout().token_count, deadline_seconds),
            question=asked.tokens,
            max_new_tokens=asked.new_tokens,
            eos=asked.eos,
            on_token=tell,
            cancelled=self._is_cancelled,
            logits_limit=logits_limit,
        )

    def _grow(self, order: Grow) -> AnyReport:
        tail = self._tails.get(order.index) if order.call == self._call else None
        if tail is None:
            raise ClaimNotFound("the KV of that question and answer is gone: the ranks have done something else since")
        count = order.document.layout.layout().token_count
        document = self._shard(order.document, count, order.deadline_seconds)
        into = self._shard(order.into, count + tail.layout.token_count, order.deadline_seconds)
        self._runner.grow(into, document, tail, order.from_token)
        return Grown()

    def _recompute(self, order: Recompute) -> AnyReport:
        """The same answer without the daemon: what an engine falls back to, and what a reload saves."""
        shard = self._runner.private_shard(len(order.tokens) // 4, order.chunk_tokens)
        started_ns = self._clock.monotonic_ns()
        layout = self._runner.prefill(shard, token_list(order.tokens), order.chunk_tokens).layout
        prefill_ns = self._clock.monotonic_ns() - started_ns
        filled = KVShard(arena=shard.arena, layout=layout)
        ask = Question(
            shard=filled,
            question=order.question,
            max_new_tokens=order.new_tokens,
            logits_limit=logits_limit(self._model.config.vocabulary_size, 1),
        )
        answer = self._runner.answer_batch([ask])[0]
        return Answered([self._answered(answer, document_prefill_ns=prefill_ns)])

    def _answered(self, answer: Answer, tail: KVShard | None = None, document_prefill_ns: int = 0) -> AnswerMessage:
        strategy, reason = _chosen(answer.decisions)
        logits = answer.logits.float().cpu().numpy().tobytes() if self._config.rank == 0 else b""
        return AnswerMessage(
            answer.tokens,
            logits,
            document_prefill_ns + answer.prefill_ns,
            answer.decode_ns,
            answer.exposed_ns,
            strategy,
            reason,
            LayoutMessage.of(tail.layout) if tail is not None else None,
        )


def logits_limit(vocabulary_size: int, answers: int) -> int:
    """How many tokens' logits of each of so many answers are reported."""
    return max(1, LOGITS_BYTES // (4 * vocabulary_size * max(1, answers)))


def _chosen(decisions: Sequence[Decision]) -> tuple[str, str]:
    """The strategies that a question's chunks took, and why the last one took its own."""
    names = dict.fromkeys(decision.strategy for decision in decisions)
    return ", ".join(names), decisions[-1].reason


def join(path: Path, rank: int) -> int:
    """Be that rank of the group whose driver listens, or will, at `path` (see launch.JoinLauncher), until its end.

    For a process of its own: returns its exit status. Raises GroupFailed when no driver comes.
    """
    # Whoever started it signals all of its processes; the driver ends its ranks in order.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return run(joined(path, rank, JOIN_SECONDS))


def run(channel: Channel) -> int:
    """Be the rank that the driver at the other end says; exit status 1 when it cannot, with the reason sent there."""
    # Ctrl-C on a terminal reaches the whole process group; the driver ends its ranks in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order = channel.receive_order()
    if not isinstance(order, Start):
        return 1  # the driver is gone
    try:
        rank = Rank(order.config, channel, SystemClock())
    except HoldfastError as error:
        channel.send(Failed(error.code, f"rank {order.config.rank}: {error.message}"))
        return 1
    try:
        rank.serve()
    except GroupFailed:
        return 1  # the driver is gone
    finally:
        rank.close()
    return 0


if __name__ == "__main__":
    # Torch's threads may outlive main; nothing of ours is left to save.
    if len(sys.argv) == 2:
        status = run(Channel(socket.socket(fileno=int(sys.argv[1]))))
    else:
        status = join(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(status)
