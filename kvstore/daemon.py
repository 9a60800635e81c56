"""Daemon: puts the parts together in one process, and takes it down in order.

One data directory, one daemon: a lock file says so. A bug of ours (an assertion, a worker's crash) stops the process:
everything durable is on disk, and a restart is cheaper than a wrong answer.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import json
import logging
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import structlog

from .admin import make_app
from .arena import Arena
from .backing import open_backing
from .catalog import Catalog
from .checks import Checks
from .clock import Clock, SystemClock
from .config import Config
from .document import Document, WritePolicy
from .errors import ConfigError, DataDirectoryBusy, HoldfastError, StorageFailed
from .event_publisher import EventPublisher
from .inheritance import Inheritance, inherit
from .machine import Machine
from .measurements import Measured
from .mover import Mover
from .orders import CloseShard, LoadShard, Note, OpenShard, Order, RankOrder, SaveShard
from .ownership import claim
from .pauses import shorten_pauses
from .prefault import Prefault
from .ranks import Ranks
from .reports import Reports
from .rest import Rest
from .sections import OFF
from .segments import Segments
from .server import Server
from .service import NS, Service, policy_maker
from .warm import WarmIndex

TICK_SECONDS: Final = 0.1  # how late a deadline may be noticed
PROGRESS_SECONDS: Final = 1.0
PREFAULT_THREADS: Final = 4  # clearing pages is bound by memory, which a few cores saturate
EXIT_BUG: Final = 70


LOSSES: Final = (  # the ledger's counts that an operator should hear of without asking
    "quarantined",
    "not_restored",
    "pins_not_restored",
    "read_failures",
    "write_failures",
    "catalog_failures",
    "segments_withdrawn",
    "nvme_full",
)


class DataDirectory:
    """The directory, locked for this process until it ends."""

    def __init__(self, path: Path) -> None:
        """Raises DataDirectoryBusy, or StorageFailed when it cannot be made."""
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageFailed(f"data directory {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            os.close(self._lock)
            raise DataDirectoryBusy(
                f"another daemon (pid {owner or 'unknown'}) owns {path}; stop it, or choose another daemon.data_dir"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let the next one have it."""
        os.close(self._lock)


class _Effects:
    """Sends each order to who carries it out. What ranks are told waits for the warm index, and keeps its order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, index: WarmIndex, serial: Callable[[int], int]) -> None:
        self._loop = loop
        self._held: deque[RankOrder] = deque()
        self.index = index
        self.serial = serial
        self.mover: Mover | None = None
        self.ranks: Ranks | None = None

    def submit(self, order: Order) -> None:
        """See orders.Effects."""
        assert self.mover is not None
        assert self.ranks is not None
        if isinstance(order, OpenShard | LoadShard | SaveShard | CloseShard):
            self._held.append(order)
            if len(self._held) == 1:
                self._release()
        elif isinstance(order, Note):
            self.index.note(order.records, self.serial)
        else:
            self.mover.submit(order)

    def _release(self) -> None:
        """Tell the ranks what they may hear by now: to write into slots, only when the index knows."""
        assert self.ranks is not None
        while self._held:
            if isinstance(self._held[0], SaveShard) and not self.index.is_settled(self._released):
                return
            self.ranks.submit(self._held.popleft())

    def _released(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._release)


class Daemon:
    """Everything, from start to stop."""

    def __init__(self, config: Config, clock: Clock) -> None:
        """Takes the data directory, and finds what the last daemon left there. Raises HoldfastError."""
        assert __debug__, "Holdfast keeps its assertions on: do not run it with python -O"
        _check_host(config)
        policy_maker(config)  # before anything is made or mounted
        self.config = config
        self.clock = clock
        self.log = structlog.get_logger("holdfast")
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        self._state = "starting"
        self._told: Counter[str] = Counter()
        self._was_ready = False
        self.directory = DataDirectory(config.daemon.data_dir)
        try:
            self._open()
        except HoldfastError:
            self.directory.close()
            raise

    def _open(self) -> None:
        config = self.config
        self.catalog = Catalog(config.daemon.data_dir / "catalog.sqlite")
        contents = self.catalog.load()
        self.segments = Segments(config.nvme.directory, config.nvme.segment_bytes)
        claim(config.nvme.directory, self.catalog.identity(), len(contents.extents))
        reports = Reports(self._loop, self._crashed)
        inherited = self._open_arena(contents.documents, reports)
        self.index = inherited.index
        effects = _Effects(self._loop, self.index, self.arena.serial)
        effects.ranks = self.ranks = Ranks(reports.finished, self.arena.serial)
        effects.mover = self.mover = Mover(
            self.arena, self.segments, self.catalog, self.clock, config.nvme.threads, reports, self.index.seal
        )
        self.service = reports.service = Service(config, self.clock, effects, self.catalog.tenant_secret)
        self.service.state.ledger.wear = contents.wear
        self.service.state.bypass = contents.bypass
        self.service.restore(
            contents.specs,
            contents.extents,
            contents.documents,
            contents.pins,
            Measured(prefills=contents.prefills, calibration=contents.calibration, rings=contents.rings),
            inherited.left,
        )
        # Not what the catalog names but what was taken over: a smaller budget is kept from the start.
        taken = (record.nvme.slot for record in self.service.state.extents.values() if record.nvme is not None)
        self.segments.prune({slot.slab for slot in taken if slot is not None})
        self.prefault = Prefault(self.arena, range(self.service.state.ddr.slab_count), PREFAULT_THREADS)
        number = version("holdfast")
        self.server = Server(self.service, self.arena, self.index, self.ranks, config.limits, number)
        for holder in inherited.holders:
            self.server.watch(*holder)
        self.checks = Checks(self.service, config, self.server.clients, self.readiness)
        app = make_app(self.service, self.readiness, self.backing.description)
        app.add_routes(self.checks.routes())
        self.rest = Rest(app)
        self.events: EventPublisher | None = None
        self.log.info(
            "opened",
            version=number,
            data_dir=str(config.daemon.data_dir),
            documents=len(contents.documents),
            extents=len(contents.extents),
            orphans=len(contents.orphans),
            adopted=self.service.state.ledger.counts["adopted"],
            fenced_bytes=self.service.state.ddr.fenced_bytes,
            arena=self.backing.description,
            direct_io=self.segments.direct,
        )
        if self.index.problem:
            self.log.warning("no warm index: a restart will find nothing in memory", problem=self.index.problem)
        self._check_space()

    def _open_arena(self, documents: Sequence[Document], reports: Reports) -> Inheritance:
        ddr = self.config.ddr
        self.backing = open_backing(self.config, Machine())
        if self.backing.warning:
            self.log.warning(self.backing.warning)
        try:
            self.arena = Arena(self.backing.directory, ddr.slab_bytes)
            slab_count = ddr.capacity_bytes // ddr.slab_bytes
            return inherit(self.arena, self.catalog, documents, slab_count, reports.crashed)
        except StorageFailed:
            self.backing.release()
            raise

    def _check_space(self) -> None:
        """Warn of an NVMe tier that promises more than its device has."""
        pool, directory = self.service.state.nvme, self.config.nvme.directory
        device = os.statvfs(directory)
        free_bytes = device.f_bavail * device.f_frsize + pool.used_bytes
        if pool.capacity_bytes > free_bytes:
            self.log.warning(
                "capacity_bytes is more than the device has free",
                tier="nvme",
                capacity_bytes=pool.capacity_bytes,
                free_bytes=free_bytes,
                directory=str(directory),
            )

    def readiness(self) -> str | None:
        """None when ready, else why not."""
        if self._state == "starting":
            return f"starting: pre-faulting {self.prefault.percent} %"
        return None if self._state == "ready" else self._state

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status."""
        self._loop.set_exception_handler(lambda _, context: self._unhandled(context))
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        config = self.config.daemon
        ticks = self._loop.create_task(self._tick())
        try:
            if self.config.events.endpoint != OFF:
                self.events = EventPublisher(self.config.events, self.service.state, self.clock)
            port = await self.rest.start(config.rest_host, config.rest_port)
            host = f"[{config.rest_host}]" if ":" in config.rest_host else config.rest_host
            url = f"http://{host}:{port}"
            (config.data_dir / "rest.json").write_text(json.dumps({"url": url, "pid": os.getpid()}))
            await self._make_slabs()
            if not self._stop.is_set():
                await self.server.start(config.socket)
                self._state, self._was_ready = "ready", True
                self.index.settled()
                self.log.info("ready", socket=str(config.socket), rest=url)
            await self._stop.wait()
            if self._failure is None:
                await self._drain()
        finally:
            ticks.cancel()
            await self._close()
        return EXIT_BUG if self._failure is not None else 0

    async def _make_slabs(self) -> None:
        """Pre-fault the arena. Raises StorageFailed."""
        work = self.prefault
        making = self._loop.run_in_executor(None, work.run)
        stopping = self._loop.create_task(self._stop.wait())
        try:
            while not making.done() and not stopping.done():
                await asyncio.wait((making, stopping), timeout=PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not making.done():
                    self.log.info("pre-faulting", done_bytes=work.done_bytes, total_bytes=work.total_bytes)
            self._state = "stopping" if stopping.done() else self._state
        finally:
            stopping.cancel()
            work.stop()
            await making

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.service.tick()
            self._tell_losses()
            if self.events is not None:
                self.events.tick()

    def _tell_losses(self) -> None:
        """Log what was lost or could not be kept since the last time."""
        counts = self.service.state.ledger.counts
        grown = {name: counts[name] - self._told[name] for name in LOSSES if counts[name] > self._told[name]}
        if grown:
            self.log.warning("lost or not kept; `holdfast doc ls` and `holdfast check` tell more", **grown)
            self._told.update(grown)

    async def _drain(self) -> None:
        """Refuse new work, write out what should survive, and wait for what is under way, within the limit."""
        self._state = "draining"
        self.server.drain()
        await self.checks.close()
        self.log.info("draining", leases=len(self.service.state.leases), writes=self.service.writes.queued)
        self.service.write_back()
        deadline_ns = self.clock.monotonic_ns() + int(self.config.daemon.drain_seconds * NS)
        while self.clock.monotonic_ns() < deadline_ns and self._busy():  # noqa: ASYNC110 - many things, one deadline
            await asyncio.sleep(TICK_SECONDS / 2)
        volatile = [
            str(d)
            for d, r in self.service.state.documents.items()
            if not r.durable and r.document.write_policy is not WritePolicy.MEMORY
        ]
        if volatile:
            self.log.warning("not written out before the drain deadline", documents=volatile[:10], count=len(volatile))

    def _busy(self) -> bool:
        service = self.service
        return bool(service.store.orders_in_flight or service.writes.queued or service.attaches.open)

    async def _close(self) -> None:
        self._state = "stopped"
        await self.checks.close()
        await self.rest.close()
        await self.server.close()
        if self.events is not None:
            self.events.close()
        stuck = self.mover.close(self.clock.monotonic_ns() + int(self.config.daemon.drain_seconds * NS))
        if stuck:
            # They may still use their descriptors, whose numbers must not come to mean other files.
            self.log.error("workers did not stop", threads=stuck)
        else:
            self.catalog.close()
            self.segments.close()
            self._close_arena()
        for left in (self.config.daemon.socket, self.config.daemon.data_dir / "rest.json"):
            left.unlink(missing_ok=True)
        self.directory.close()
        self.log.info("stopped", failed=self._failure is not None)

    def _close_arena(self) -> None:
        """Let go of the arena's memory, or leave what the next daemon can use: nothing that this one only made.

        After a bug of ours nothing is left: the state that it came from may be what the index tells of.
        """
        keep: Collection[int] = ()
        if self.config.ddr.on_stop == "keep" and self._failure is None:
            keep = self.service.state.ddr.in_use() | self.index.handed_out(self.arena.serials())
        if keep:
            self.index.close()
        else:
            self.index.discard()
        left_bytes = self.arena.close(keep)
        self.backing.release()
        if left_bytes:
            self.log.info(
                "slabs are left for the next start",
                size_bytes=left_bytes,
                directory=str(self.backing.directory),
                free_with=self.backing.free_command,
            )

    # Bugs --------------------------------------------------------------------------------------

    def _unhandled(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception):
            self._crashed(error)
        else:
            self.log.warning("event loop", message=context.get("message"))

    def _crashed(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            self.log.critical("bug: stopping", exc_info=error)
            self._stop.set()


def _check_host(config: Config) -> None:
    host = config.daemon.rest_host
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost":
        raise ConfigError(f"daemon.rest_host {host!r} is not a loopback address, and the admin API has no tokens yet")


def configure_logging(level: str) -> None:
    """One event per line on stderr: for people on a terminal, JSON elsewhere."""
    renderer: Any = structlog.processors.JSONRenderer()
    chain: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if os.isatty(2):
        renderer = structlog.dev.ConsoleRenderer()
    else:
        chain.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*chain, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=open(2, "w", closefd=False, buffering=1)),  # noqa: SIM115
    )


def serve(config: Config) -> int:
    """Run a daemon until it is told to stop; returns the exit status. Raises HoldfastError when it cannot start."""
    configure_logging(config.daemon.log_level)

    async def main() -> int:
        daemon = Daemon(config, SystemClock())
        shorten_pauses()
        return await daemon.run()

    return asyncio.run(main())
