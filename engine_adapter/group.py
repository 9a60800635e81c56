"""RankGroup: drives the rank processes of the built-in runner. An Engine.

One process a rank, on this machine; every call has a deadline, and a rank that dies or hangs ends the group.
"""

from __future__ import annotations

import os
import selectors
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeVar

import numpy as np

from ..kvstore.client import token_bytes
from ..kvstore.errors import DeadlineExceeded, GroupFailed, HoldfastError, from_code
from ..kvstore.layouts import ShardMessage
from ..kvstore.spec import KVSpec
from .control import (
    Answered,
    AnswerMessage,
    AnyOrder,
    AnyReport,
    Ask,
    Asked,
    Cancel,
    Failed,
    Grow,
    Grown,
    Measure,
    Measured,
    Prefill,
    Prefilled,
    Quit,
    Ready,
    Recompute,
    Rejoin,
    Rejoined,
    Start,
    Token,
)
from .control import Progress as ProgressReport
from .engine import Answer, OnToken, PrefillPoint, Progress, Question, Tail, ignore_progress, ignore_token
from .launch import Launcher, Member, SpawnLauncher
from .rank_config import RankConfig

START_SECONDS: Final = 1800.0  # reading a large model's weights from a slow disk; a rank that dies is noticed at once
CALL_SECONDS: Final = 3600.0  # a long prefill
LAG_SECONDS: Final = 15.0  # ranks end a call together, but for one that waits for the others until its own deadline
QUIT_SECONDS: Final = 10.0
PASSING: Final = (ProgressReport, Token)  # what a rank says in the middle of a call
R = TypeVar("R", bound=AnyReport)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOptions:
    """How to start a group of cp x tp ranks. `rows` are token rows of HBM per rank.

    `threads` 0 shares the cores evenly. `communicator` and `strategy` are "auto", or name the only one to use; so does
    `kernel`, which is empty for the device's own.
    """

    name: str
    model: Path
    cp: int
    tp: int = 1
    rows: int
    daemon_socket: Path
    tenant: str = "default"
    device: str = "cpu"
    threads: int = 0
    communicator: str = "auto"
    kernel: str = ""
    strategy: str = "auto"
    collective_seconds: float = 120.0

    @property
    def ranks(self) -> int:
        """Rank processes."""
        return self.cp * self.tp


class RankGroup:
    """A running group. Use as a context manager, or call `close`."""

    def __init__(self, options: GroupOptions, spec: KVSpec, launcher: Launcher | None = None) -> None:
        """Launch all ranks and wait until each has its model and its seat. Raises GroupFailed or a rank's refusal.

        By default they are children of this process.
        """
        self._options = options
        self._spec = spec
        self._scratch = tempfile.TemporaryDirectory(prefix="holdfast-group-")
        self._joins = 0
        self._calls = 0
        self._members: list[Member] = []
        self._broken = ""
        try:
            self._members = (launcher or SpawnLauncher()).launch(options.ranks)
            self._start()
        except HoldfastError:
            self.close()
            raise

    @property
    def group(self) -> str:
        """See Engine."""
        return self._options.name

    @property
    def spec(self) -> KVSpec:
        """See Engine."""
        return self._spec

    @property
    def failure(self) -> str:
        """See Engine."""
        for rank, member in enumerate(self._members):
            if not self._broken and member.wait(0.0) is not None:
                self._died(rank)
        return self._broken

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [member.pid for member in self._members]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Start and end -----------------------------------------------------------------------------

    def _new_init_method(self) -> str:
        self._joins += 1
        return f"file://{self._scratch.name}/join-{self._joins}"

    def _start(self) -> None:
        """Raises the first refusal at once: the other ranks would wait in vain for the one that refused."""
        options, init_method = self._options, self._new_init_method()
        cores = len(os.sched_getaffinity(0))
        for rank in range(options.ranks):
            config = RankConfig(
                rank=rank,
                cp=options.cp,
                tp=options.tp,
                group=options.name,
                tenant=options.tenant,
                daemon_socket=str(options.daemon_socket),
                model=str(options.model),
                device=options.device,
                threads=options.threads or max(1, cores // options.ranks),
                rows=options.rows,
                init_method=init_method,
                communicator=options.communicator,
                kernel=options.kernel,
                strategy=options.strategy,
                deadline_seconds=options.collective_seconds,
            )
            self._send_to(rank, Start(config))
        for rank, report in self._told(START_SECONDS):
            if isinstance(report, Failed):
                self._fail(f"rank {rank} did not start")
                raise from_code(report.code, report.message)
            assert isinstance(report, Ready), report

    def close(self) -> None:
        """Ask the ranks to quit; kill those that do not."""
        for member in self._members:
            with suppress(GroupFailed):
                member.channel.send(Quit())
        deadline = time.monotonic() + (QUIT_SECONDS if not self._broken else 1.0)
        for member in self._members:
            if member.wait(max(0.0, deadline - time.monotonic())) is None:
                member.kill()
                member.wait(QUIT_SECONDS)
            member.channel.close()
        self._members.clear()
        self._broken = self._broken or "the group is closed"
        self._scratch.cleanup()

    # Calls -------------------------------------------------------------------------------------

    def prefill(
        self,
        shard: ShardMessage,
        tokens: Sequence[int],
        cached_tokens: int,
        chunk_tokens: int,
        progress: Progress,
    ) -> list[PrefillPoint]:
        """See Engine."""
        order = Prefill(shard, cached_tokens, chunk_tokens, token_bytes(tokens), CALL_SECONDS)
        points = self._call(order, Prefilled, progress)[0].points
        return [PrefillPoint(cached, new, elapsed_ns) for cached, new, elapsed_ns in points]

    def answer_many(self, questions: Sequence[Question], on_token: OnToken = ignore_token) -> list[Answer]:
        """See Engine."""
        self._calls += 1
        asked = [Asked(q.shard, list(q.tokens), q.new_tokens, list(q.eos), q.keeps_tail) for q in questions]
        reports = self._call(Ask(self._calls, asked, CALL_SECONDS), Answered, on_token=on_token)
        return [self._joined([report.answers[i] for report in reports], i) for i in range(len(questions))]

    def grow(self, into: ShardMessage, document: ShardMessage, tail: Tail, from_token: int) -> None:
        """See Engine."""
        self._call(Grow(into, document, tail.call, tail.index, from_token, CALL_SECONDS), Grown)

    def recompute(self, tokens: Sequence[int], question: Sequence[int], new_tokens: int, chunk_tokens: int) -> Answer:
        """See Engine."""
        order = Recompute(token_bytes(tokens), chunk_tokens, list(question), new_tokens, CALL_SECONDS)
        return self._joined([report.answers[0] for report in self._call(order, Answered)], 0)

    def measure(self) -> Measured:
        """Have the ranks measure themselves. Raises GroupFailed."""
        return self._call(Measure(), Measured)[0]

    def _joined(self, answers: Sequence[AnswerMessage], index: int) -> Answer:
        """One answer of all ranks': their tokens must agree, and the slowest rank's times count."""
        first = answers[0]
        assert all(answer.tokens == first.tokens for answer in answers), "ranks decoded different tokens"
        logits = np.frombuffer(first.logits, dtype=np.float32).reshape(-1, self._spec.vocabulary_size)
        return Answer(
            tokens=first.tokens,
            logits=logits,
            prefill_ns=max(answer.prefill_ns for answer in answers),
            decode_ns=max(answer.decode_ns for answer in answers),
            exposed_ns=max(answer.exposed_ns for answer in answers),
            strategy=first.strategy,
            strategy_reason=first.strategy_reason,
            tail=Tail(self._calls, index, first.tail) if first.tail is not None else None,
        )

    def _call(
        self, order: AnyOrder, kind: type[R], progress: Progress = ignore_progress, on_token: OnToken = ignore_token
    ) -> list[R]:
        """Give all ranks an order and collect their reports; a failed call leaves the group joined anew."""
        if self._broken:
            raise GroupFailed(f"group {self.group!r}: {self._broken}")
        self._send(order)
        reports: dict[int, AnyReport] = {}
        try:
            return self._collect(kind, reports, CALL_SECONDS, progress, on_token)
        finally:
            if any(isinstance(report, Failed) for report in reports.values()) and not self._broken:
                self._rejoin()

    def _rejoin(self) -> None:
        """The ranks' process group does not survive a failed call: make a new one."""
        init_method = self._new_init_method()
        self._send(Rejoin(init_method))
        try:
            self._collect(Rejoined, {}, self._options.collective_seconds + LAG_SECONDS)
        except HoldfastError as error:
            self._fail(self._broken or f"it could not start anew: {error}")

    def _collect(
        self,
        kind: type[R],
        reports: dict[int, AnyReport],
        deadline_seconds: float,
        progress: Progress = ignore_progress,
        on_token: OnToken = ignore_token,
    ) -> list[R]:
        """One report of that kind from every rank. Raises the first failure, after all ranks have reported.

        `reports` takes the last that each has said.
        """
        told = self._told(deadline_seconds)
        try:
            for rank, report in told:
                match report:
                    case ProgressReport(tokens):
                        progress(tokens)
                    case Token(question, token):
                        on_token(question, token)
                    case _:
                        reports[rank] = report
        finally:
            # Whatever a callback raised: a rank that still computes writes into rows that are about to be given away,
            # and what it says at last is no answer to the next call.
            if len(reports) < len(self._members) and not self._broken:
                self._wind_up(reports, told)
        failures = [from_code(r.code, r.message) for r in reports.values() if isinstance(r, Failed)]
        if failures:
            # Ranks that only lost a peer say GroupFailed; the rank with the cause says more.
            raise next((f for f in failures if not isinstance(f, GroupFailed)), failures[0])
        found: list[R] = [report for _, report in sorted(reports.items()) if isinstance(report, kind)]
        assert len(found) == len(self._members), reports
        return found

    def _wind_up(self, reports: dict[int, AnyReport], told: Iterator[tuple[int, AnyReport]]) -> None:
        """End a call that nobody waits for any more: soon, because rank 0 looks up after every chunk and token."""
        try:
            self._send_to(0, Cancel())
            reports.update((rank, report) for rank, report in told if not isinstance(report, PASSING))
        finally:
            if len(reports) < len(self._members) and not self._broken:
                self._fail("a call was abandoned")

    def _told(self, deadline_seconds: float) -> Iterator[tuple[int, AnyReport]]:
        """What the ranks say, as it comes, until each has said its last. Raises GroupFailed or DeadlineExceeded.

        They end together: one that is still silent when it must have heard that the others ended is stuck.
        """
        deadline = time.monotonic() + deadline_seconds
        waiting = set(range(len(self._members)))
        with selectors.DefaultSelector() as selector:
            for rank, member in enumerate(self._members):
                selector.register(member.channel, selectors.EVENT_READ, rank)
            while waiting:
                ready = selector.select(max(0.0, min(1.0, deadline - time.monotonic())))
                if not ready and time.monotonic() >= deadline:
                    self._fail(f"rank {min(waiting)} did not answer before the deadline of the call")
                    raise DeadlineExceeded(f"group {self.group!r}: {self._broken}")
                for key, _ in ready:
                    for report in self._reports(key.data):
                        if not isinstance(report, PASSING):
                            waiting.discard(key.data)
                            lag = lag_seconds(report, self._options.collective_seconds)
                            deadline = min(deadline, time.monotonic() + lag)
                        yield key.data, report

    def _reports(self, rank: int) -> list[AnyReport]:
        """What a rank has said. Raises GroupFailed when it is gone."""
        reports = self._members[rank].channel.receive_reports()
        if reports is None:
            raise self._died(rank)
        return reports

    def _died(self, rank: int) -> GroupFailed:
        self._fail(f"rank {rank} died ({self._members[rank].wait(1.0) or 'its channel closed'})")
        return GroupFailed(f"group {self.group!r}: {self._broken}")

    def _send(self, order: AnyOrder) -> None:
        """Give all ranks an order. Raises GroupFailed when one is gone, and then no rank waits for it."""
        for rank in range(len(self._members)):
            self._send_to(rank, order)

    def _send_to(self, rank: int, order: AnyOrder) -> None:
        try:
            self._members[rank].channel.send(order)
        except GroupFailed as error:
            raise self._died(rank) from error

    def _fail(self, reason: str) -> None:
        """The group is lost: no rank may go on waiting for one that is not there."""
        self._broken = reason
        for member in self._members:
            member.kill()


def lag_seconds(report: AnyReport, collective_seconds: float) -> float:
    """How long after a rank's last report the others may take to theirs.

    One that gave up the group has waited for the others already, or has heard that another gave up: so have they.
    """
    if isinstance(report, Failed) and report.code == GroupFailed.code:
        return LAG_SECONDS
    return collective_seconds + LAG_SECONDS
