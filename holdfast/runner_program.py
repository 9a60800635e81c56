"""RunnerProgram: `holdfast runner` in the foreground: waits for a daemon, starts the group, serves, ends in order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from .cli_tables import moment
from .engine_adapter.group import GroupOptions, RankGroup
from .engine_adapter.launch import SpawnLauncher
from .engine_adapter.runner_server import RunnerSeat, RunnerServer
from .engine_adapter.runner_service import RESTARTS, Parts, RunnerService
from .engine_adapter.runner_wire import RunnerFacts, RunnerStatus
from .engine_adapter.texts import Texts
from .kvstore.client import Client
from .kvstore.clock import SystemClock
from .kvstore.config import Config
from .kvstore.errors import DaemonUnavailable, GroupFailed, HoldfastError
from .rest import Rest, left_address
from .runner_plan import RunnerOptions, RunnerPlan
from .torchrun import TorchrunLauncher, World, become_rank

DAEMON_SECONDS: Final = 60.0
DAEMON_RETRY_SECONDS: Final = 0.2
DRAIN_SECONDS: Final = 10.0
KILLED_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a runner's words go: `say` what happens, `ready` once with what it is."""

    say: Callable[[str], None]
    ready: Callable[[RunnerStatus], None]


def run_runner(options: RunnerOptions, config: Config, listener: Listener) -> None:
    """Serve until SIGINT or SIGTERM. Raises HoldfastError when it cannot start, or cannot go on."""
    world = World.of(os.environ)
    meeting = None
    if world is not None:
        world.check(options.cp * options.tp)
        meeting = world.socket(config.daemon.data_dir, options.name)
        if world.rank:
            become_rank(meeting, world.rank)
    with stop_signals() as stopped, ExitStack() as stack:
        plan = RunnerPlan.of(options, listener.say)
        await_daemon(config.daemon.socket, options.tenant, listener.say, stopped)
        if stopped.is_set():
            return
        seat = RunnerSeat(config.daemon.data_dir, options.name)
        stack.callback(seat.close)
        ranks = _Ranks(plan, config.daemon.socket, meeting)
        listener.say(f"starting cp {options.cp} x tp {options.tp} ranks")
        service = RunnerService(
            Parts(
                facts=plan.facts,
                start=ranks.start,
                connect=lambda resume: Client(config.daemon.socket, options.tenant, resume=resume),
                tokenizer=plan.tokenizer,
                eos=plan.eos,
                texts=Texts(seat.directory / "texts", options.tenant, plan.spec.fingerprint()),
                clock=SystemClock(),
                say=listener.say,
                restarts=RESTARTS if meeting is None else 0,  # torchrun starts its processes anew itself
                settings=lambda: chosen(config.daemon.data_dir, plan.facts),
            )
        )
        stack.callback(service.close)
        server = RunnerServer(service, seat)
        stack.callback(server.close)  # when the worker has ended: its last words are heard
        worker = _Worker(service)
        stack.callback(_end, service, worker, ranks, listener.say, stopped)
        listener.ready(service.status())
        while worker.is_alive() and not stopped.wait(0.5):
            pass
        stopped.clear()  # a second signal ends what runs
    if worker.error is not None:
        raise worker.error


def chosen(data_dir: Path, facts: RunnerFacts) -> dict[str, str]:
    """What the ranks compute with, and what `auto` decides by, as the daemon knows it."""
    try:
        rest = Rest(left_address(data_dir))
        groups, calibration = rest.get("/v1/groups")["groups"], rest.get("/v1/calibration")
    except DaemonUnavailable:
        return {}
    ours = [group for group in groups if group["name"] == facts.group]
    found = {what: group[what] for group in ours for what in ("kernel", "communicator") if group[what]}
    same = {"cp": facts.cp, "tp": facts.tp, **found}
    rates = [rate for rate in calibration["rings"] if same.items() <= rate["setting"].items()]
    strategy = facts.strategy
    if strategy == "auto":
        strategy += f", by what was measured {moment(rates[0]['measured_wall_ns'])}" if rates else ", not calibrated"
    return {**found, "strategy": strategy} if facts.cp > 1 else found  # one rank has nobody to exchange KV with


def await_daemon(path: Path, tenant: str, say: Callable[[str], None], stopped: threading.Event) -> None:
    """Returns when a daemon answers, or when stopped. Raises DaemonUnavailable when none does in time."""
    deadline = time.monotonic() + DAEMON_SECONDS
    told = False
    while not stopped.is_set():
        try:
            Client(path, tenant).close()
            return
        except DaemonUnavailable:
            if time.monotonic() > deadline:
                raise
            if not told:
                say(f"waiting {DAEMON_SECONDS:g} s for a daemon at {path}; start one with `holdfast serve`")
                told = True
            stopped.wait(DAEMON_RETRY_SECONDS)


class _Ranks:
    """Starts the group, and knows its processes."""

    def __init__(self, plan: RunnerPlan, daemon_socket: Path, meeting: Path | None) -> None:
        self._launcher = TorchrunLauncher(meeting) if meeting is not None else SpawnLauncher()
        self._plan = plan
        self._daemon_socket = daemon_socket
        self._group: RankGroup | None = None

    def start(self) -> RankGroup:
        """Start it. Raises what its start raises."""
        facts = self._plan.facts
        options = GroupOptions(
            name=facts.group,
            model=Path(facts.model),
            cp=facts.cp,
            tp=facts.tp,
            rows=facts.rows,
            daemon_socket=self._daemon_socket,
            tenant=facts.tenant,
            device=facts.device,
            threads=facts.threads,
            communicator=facts.communicator,
            kernel=facts.kernel,
            strategy=facts.strategy,
        )
        self._group = RankGroup(options, self._plan.spec, self._launcher)
        return self._group

    def kill(self) -> None:
        """End them at once: the call that they compute fails."""
        for pid in self._group.pids if self._group is not None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class _Worker(threading.Thread):
    """Runs the service; `error` is what ended it, None when it was told to end."""

    def __init__(self, service: RunnerService) -> None:
        super().__init__(name="holdfast-runner-worker", daemon=True)
        self._service = service
        self.error: HoldfastError | None = GroupFailed("the runner died of a bug; what it is stands above")
        self.start()

    def run(self) -> None:
        """See Thread."""
        try:
            self._service.serve()
            self.error = None
        except HoldfastError as error:
            self.error = error


def _end(
    service: RunnerService, worker: _Worker, ranks: _Ranks, say: Callable[[str], None], stopped: threading.Event
) -> None:
    """What waits is refused; what runs has some time, or until the next signal."""
    service.stop()
    if service.status().busy:
        say(f"ending: what runs has {DRAIN_SECONDS:g} s; the same signal again ends it now")
    deadline = time.monotonic() + DRAIN_SECONDS
    while worker.is_alive() and time.monotonic() < deadline and not stopped.is_set():
        worker.join(0.05)
    if worker.is_alive():
        ranks.kill()
        worker.join(KILLED_SECONDS)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    stopped = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
