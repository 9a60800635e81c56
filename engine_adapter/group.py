"""RankGroup: starts and drives the rank processes of the built-in runner. An Engine.

One process a rank, on this machine; every call has a deadline, and a rank that dies or hangs ends the group.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeVar

import msgspec
import numpy as np

from ..kvstore.client import token_bytes
from ..kvstore.errors import DeadlineExceeded, GroupFailed, HoldfastError, from_code
from ..kvstore.layouts import ShardMessage
from ..kvstore.spec import KVSpec
from .control import (
    Answered,
    AnyOrder,
    AnyReport,
    Ask,
    Channel,
    Failed,
    Prefill,
    Prefilled,
    Progress,
    Quit,
    Recompute,
    Rejoin,
    Rejoined,
)
from .engine import Answer, PrefillPoint
from .rank_config import RankConfig

START_SECONDS: Final = 120.0  # importing torch on a busy machine, and loading weights
CALL_SECONDS: Final = 3600.0  # a long prefill
QUIT_SECONDS: Final = 10.0
R = TypeVar("R", bound=AnyReport)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOptions:
    """How to start a group. `rows` are token rows of HBM per rank; `threads` 0 shares the cores evenly."""

    name: str
    model: Path
    cp: int
    rows: int
    daemon_socket: Path
    tenant: str = "default"
    device: str = "cpu"
    threads: int = 0
    collective_seconds: float = 120.0


@dataclass(eq=False, slots=True)
class _Process:
    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel


class RankGroup:
    """A running group. Use as a context manager, or call `close`."""

    def __init__(self, options: GroupOptions, spec: KVSpec) -> None:
        """Start all ranks and wait until each has its model and its seat. Raises GroupFailed or a rank's refusal."""
        self._options = options
        self._spec = spec
        self._scratch = tempfile.TemporaryDirectory(prefix="holdfast-group-")
        self._joins = 0
        self._ranks: list[_Process] = []
        self._broken = ""
        try:
            init_method = self._new_init_method()
            for rank in range(options.cp):
                self._ranks.append(self._start(rank, init_method))
            self._await_ready()
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
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [rank.process.pid for rank in self._ranks]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Start and end -----------------------------------------------------------------------------

    def _new_init_method(self) -> str:
        self._joins += 1
        return f"file://{self._scratch.name}/join-{self._joins}"

    def _start(self, rank: int, init_method: str) -> _Process:
        options = self._options
        ours, theirs = socket.socketpair()
        cores = len(os.sched_getaffinity(0))
        config = RankConfig(
            rank=rank,
            cp=options.cp,
            group=options.name,
            tenant=options.tenant,
            daemon_socket=str(options.daemon_socket),
            model=str(options.model),
            device=options.device,
            threads=options.threads or max(1, cores // options.cp),
            rows=options.rows,
            init_method=init_method,
            channel=theirs.fileno(),
            deadline_seconds=options.collective_seconds,
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "holdfast.engine_adapter.rank", msgspec.json.encode(config).decode()],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        return _Process(rank, process, Channel(ours))

    def _await_ready(self) -> None:
        """Raises the first refusal at once: the other ranks would wait in vain for the one that refused."""
        for rank, report in self._told(START_SECONDS):
            if isinstance(report, Failed):
                self._fail(f"rank {rank} did not start")
                raise from_code(report.code, report.message)

    def close(self) -> None:
        """Ask the ranks to quit; kill those that do not."""
        for rank in self._ranks:
            try:
                rank.channel.send(Quit())
            except GroupFailed:
                continue
        for rank in self._ranks:
            try:
                rank.process.wait(QUIT_SECONDS if not self._broken else 1.0)
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
            rank.channel.close()
        self._ranks.clear()
        self._broken = self._broken or "the group is closed"
        self._scratch.cleanup()

    # Calls -------------------------------------------------------------------------------------

    def prefill(
        self,
        shard: ShardMessage,
        tokens: Sequence[int],
        cached_tokens: int,
        chunk_tokens: int,
        progress: Callable[[int], None],
    ) -> list[PrefillPoint]:
        """See Engine."""
        data = token_bytes(tokens)
        order = Prefill(shard.id, shard.generation, shard.layout, cached_tokens, chunk_tokens, data, CALL_SECONDS)
        points = self._call(order, Prefilled, progress)[0].points
        return [PrefillPoint(cached, new, elapsed_ns) for cached, new, elapsed_ns in points]

    def answer(self, shard: ShardMessage, question: Sequence[int], new_tokens: int) -> Answer:
        """See Engine."""
        order = Ask(shard.id, shard.generation, shard.layout, list(question), new_tokens, CALL_SECONDS)
        return self._joined(self._call(order, Answered))

    def recompute(self, tokens: Sequence[int], question: Sequence[int], new_tokens: int, chunk_tokens: int) -> Answer:
        """See Engine."""
        order = Recompute(token_bytes(tokens), chunk_tokens, list(question), new_tokens, CALL_SECONDS)
        return self._joined(self._call(order, Answered))

    def _joined(self, answers: list[Answered]) -> Answer:
        """One answer of all ranks': their tokens must agree, and the slowest rank's times count."""
        first = answers[0]
        assert all(answer.tokens == first.tokens for answer in answers), "ranks decoded different tokens"
        logits = np.frombuffer(first.logits, dtype=np.float32).reshape(len(first.tokens), -1)
        return Answer(
            tokens=first.tokens,
            logits=logits,
            prefill_ns=max(answer.prefill_ns for answer in answers),
            decode_ns=max(answer.decode_ns for answer in answers),
            exposed_ns=max(answer.exposed_ns for answer in answers),
        )

    def _call(self, order: AnyOrder, kind: type[R], progress: Callable[[int], None] = lambda _: None) -> list[R]:
        """Give all ranks an order and collect their reports; a failed call leaves the group joined anew."""
        if self._broken:
            raise GroupFailed(f"group {self.group!r}: {self._broken}")
        self._send(order)
        try:
            return self._collect(kind, CALL_SECONDS, progress)
        except HoldfastError:
            if not self._broken:
                self._rejoin()
            raise

    def _rejoin(self) -> None:
        """The ranks' process group does not survive a failed call: make a new one."""
        init_method = self._new_init_method()
        self._send(Rejoin(init_method))
        try:
            self._collect(Rejoined, START_SECONDS)
        except HoldfastError as error:
            self._fail(self._broken or f"it could not start anew: {error}")

    def _collect(
        self, kind: type[R], deadline_seconds: float, progress: Callable[[int], None] = lambda _: None
    ) -> list[R]:
        """One report of that kind from every rank. Raises the first failure, after all ranks have reported."""
        reports: dict[int, AnyReport] = {}
        told = self._told(deadline_seconds)
        try:
            for rank, report in told:
                if isinstance(report, Progress):
                    progress(report.tokens)
                else:
                    reports[rank] = report
        finally:
            # Whatever `progress` raised: a rank that still computes writes into rows that are about to be given away,
            # and what it says at last is no answer to the next call.
            try:
                reports.update((rank, report) for rank, report in told if not isinstance(report, Progress))
            finally:
                if len(reports) < len(self._ranks) and not self._broken:
                    self._fail("a call was abandoned")
        failures = [from_code(r.code, r.message) for r in reports.values() if isinstance(r, Failed)]
        if failures:
            # Ranks that only lost a peer say GroupFailed; the rank with the cause says more.
            raise next((f for f in failures if not isinstance(f, GroupFailed)), failures[0])
        found: list[R] = [report for _, report in sorted(reports.items()) if isinstance(report, kind)]
        assert len(found) == len(self._ranks), reports
        return found

    def _told(self, deadline_seconds: float) -> Iterator[tuple[int, AnyReport]]:
        """What the ranks say, as it comes, until each has said its last. Raises GroupFailed or DeadlineExceeded."""
        deadline = time.monotonic() + deadline_seconds
        waiting = {rank.rank for rank in self._ranks}
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.channel, selectors.EVENT_READ, rank)
            while waiting:
                ready = selector.select(max(0.0, min(1.0, deadline - time.monotonic())))
                if not ready and time.monotonic() >= deadline:
                    self._fail(f"rank {min(waiting)} did not answer within {deadline_seconds:g} s")
                    raise DeadlineExceeded(f"group {self.group!r}: {self._broken}")
                for key, _ in ready:
                    for report in self._reports(key.data):
                        if not isinstance(report, Progress):
                            waiting.discard(key.data.rank)
                        yield key.data.rank, report

    def _reports(self, rank: _Process) -> list[AnyReport]:
        """What a rank has said. Raises GroupFailed when it is gone."""
        reports = rank.channel.receive_reports()
        if reports is None:
            raise self._died(rank)
        return reports

    def _died(self, rank: _Process) -> GroupFailed:
        self._fail(f"rank {rank.rank} died ({self._status(rank)})")
        return GroupFailed(f"group {self.group!r}: {self._broken}")

    def _send(self, order: AnyOrder) -> None:
        """Give all ranks an order. Raises GroupFailed when one is gone, and then no rank waits for it."""
        for rank in self._ranks:
            try:
                rank.channel.send(order)
            except GroupFailed as error:
                raise self._died(rank) from error

    def _status(self, rank: _Process) -> str:
        try:
            code = rank.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "its channel closed"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def _fail(self, reason: str) -> None:
        """The group is lost: no rank may go on waiting for one that is not there."""
        self._broken = reason
        for rank in self._ranks:
            rank.process.kill()
