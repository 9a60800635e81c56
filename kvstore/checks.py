"""Checks: audits of the running daemon, one at a time, asked for and followed over the admin API.

The service goes on meanwhile: its memory is looked at in slices, catalog and files are read on a thread, extents by the
mover when nothing else wants it. What looks wrong is reported only if a second audit sees it too.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Final, TypeVar

import msgspec
from aiohttp import web

from .audit import Facts, StoredExtent, audit
from .audit_state import Held, Look, accounts, against_rows, books, claims, marks
from .check import ROUNDS_MAX, Report, Wish
from .check_view import CheckView
from .config import Config
from .errors import CorruptExtent, Draining, HoldfastError, InUse, NotFound, Unavailable
from .extent import ExtentId
from .findings import Finding, Remove, Repair, Severity, ordered
from .inspector import gather, remove
from .problems import body, reply
from .repairs import Done, Repairs
from .service import Service
from .spec import KVSpec

SLICE: Final = 500  # records looked at in one go: a few milliseconds at most
READS_IN_FLIGHT: Final = 2
LOOKS_MAX: Final = 4  # for one at which no copy came or went

T = TypeVar("T")


class CheckRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Start a check, and wait for its end for as long as `deadline_seconds`."""

    fix: bool = False
    data: bool = False
    deadline_seconds: Annotated[float, msgspec.Meta(ge=0, le=600)] = 2.0


@dataclass(slots=True)
class _Reading:
    """How far the reading of extents is, and what it found."""

    total_bytes: int
    read_bytes: int
    damage: dict[ExtentId, str]
    failed: dict[ExtentId, str]


class Checks:
    """Starts checks and remembers the last. `clients`: those that may hold something; `ready`: why not, or None."""

    def __init__(
        self,
        service: Service,
        config: Config,
        clients: Callable[[], set[int]],
        ready: Callable[[], str | None],
    ) -> None:
        self._service = service
        self._repairs = Repairs(service)
        self._config = config
        self._clients = clients
        self._ready = ready
        self._thread = ThreadPoolExecutor(1, "holdfast-check")
        self._task: asyncio.Task[Report] | None = None
        self._reading = _Reading(0, 0, {}, {})

    def routes(self) -> list[web.RouteDef]:
        """The API."""
        return [web.get("/v1/check", self.show), web.post("/v1/check", self.start)]

    async def start(self, request: web.Request) -> web.Response:
        """Check: 200 with what was found, 202 while it goes on."""
        reason = self._ready()
        if reason is not None:
            raise Unavailable(reason)
        wanted = await body(request, CheckRequest)
        if self._task is not None and not self._task.done():
            raise InUse("a check is under way already; GET /v1/check shows how far it is")
        self._reading = _Reading(0, 0, {}, {})
        work = self._check(Wish(fix=wanted.fix, data=wanted.data))
        self._task = task = asyncio.get_running_loop().create_task(work)
        await asyncio.wait([task], timeout=wanted.deadline_seconds)
        return self._answer(task)  # not the next one, which may have begun since

    async def show(self, request: web.Request) -> web.Response:
        """The check under way, or the last one."""
        if self._task is None:
            raise NotFound("no check has run since the daemon started; POST /v1/check starts one")
        return self._answer(self._task)

    def _answer(self, task: asyncio.Task[Report]) -> web.Response:
        if task.cancelled():
            raise Unavailable("the daemon is shutting down; the check was ended")
        if task.done():
            return reply(CheckView.of(task.result()))
        reading = self._reading
        return reply(CheckView.running(reading.read_bytes, reading.total_bytes), status=202)

    async def close(self) -> None:
        """End a check that is under way."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError, HoldfastError):
                await self._task
        self._thread.shutdown()

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # One check ---------------------------------------------------------------------------------

    async def _check(self, wish: Wish) -> Report:
        """Without collections meanwhile: those of an audit's many values would hold up the loop, and free nothing."""
        collects = gc.isenabled()
        gc.disable()
        try:
            return await self._checked(wish)
        finally:
            if collects:
                gc.enable()

    async def _checked(self, wish: Wish) -> Report:
        clock = self._service.clock
        started_ns = clock.monotonic_ns()
        look = await self._look()
        documents, extents = len(look.documents), len(look.settled)
        if wish.data:
            await self._read(look)
        del look
        remaining = await self._confirmed()
        found, fixed = list(remaining), list[Finding]()
        for _ in range(ROUNDS_MAX if wish.fix else 0):
            chosen = [finding for finding in remaining if finding.repair is not None]
            if not chosen:
                break
            for finding in chosen:
                await self._mend(finding)
            fixed += chosen
            remaining = await self._confirmed()
            found += remaining
        return Report(
            found=tuple(ordered(found)),
            fixed=tuple(ordered(fixed)),
            remaining=tuple(ordered(remaining)),
            documents=documents,
            extents=extents,
            read_bytes=self._reading.read_bytes,
            elapsed_ns=clock.monotonic_ns() - started_ns,
        )

    async def _confirmed(self) -> list[Finding]:
        """What two audits in a row agree on; notes are not worth the second one."""
        first = await self._audit()
        if all(finding.severity is Severity.NOTE for finding in first):
            return first
        known = {finding.identity for finding in first}
        return [finding for finding in await self._audit() if finding.identity in known]

    async def _audit(self) -> list[Finding]:
        before = await self._look()
        facts = await self._on_thread(lambda: gather(self._config, before.present))
        after = await self._look()
        state, ingests = self._service.state, self._service.ingests
        writers = {ingest.client: f"an ingest of {ingest.document.id}" for ingest in ingests.open.values()}
        found = list(claims(state, writers, self._clients()))
        specs = dict(state.specs)

        def compare() -> list[Finding]:
            ours = self._facts(facts, after, specs)
            rows = {row.extent.id: row for row in facts.extents}
            documents = {document.id: document for document in facts.documents}
            pins = {pin.document for pin in facts.pins}
            return [*audit(ours), *accounts(after), *against_rows(before, rows, documents, pins, after)]

        return ordered([*found, *await self._on_thread(compare)])

    def _facts(self, disk: Facts, look: Look, specs: Mapping[bytes, KVSpec]) -> Facts:
        """The facts of an audit in which the daemon's memory stands for the rows: it is what is served."""
        rows = {row.extent.id: row for row in disk.extents}
        there = {held.extent.id: held for held in look.settled}
        reading = self._reading
        return replace(
            disk,
            specs=specs,
            extents=tuple(StoredExtent(h.extent, rows[e].seal, h.slot) for e, h in there.items() if e in rows),
            documents=tuple(document for document, _ in look.documents.values()),
            pins=(),
            damage={extent: what for extent, what in reading.damage.items() if extent in there},
            failed={extent: what for extent, what in reading.failed.items() if extent in there},
            present=look.present,
        )

    async def _look(self) -> Look:
        """The service's memory, in slices; again if copies came or went meanwhile, but not for ever."""
        for _ in range(LOOKS_MAX):
            look = await self._gathered()
            if look.is_steady:
                break
        return look

    async def _gathered(self) -> Look:
        state, look = self._service.state, Look()
        before = marks(state)
        self._add_others(look)
        async for extent in _sliced(list(state.extents)):
            record = state.extents.get(extent)
            if record is not None:
                look.extents[extent] = Held.of(record)
                look.add(record.placements())
        async for document in _sliced(list(state.documents)):
            owner = state.documents.get(document)
            if owner is not None:
                look.documents[document] = owner.document, owner.durable
        self._add_others(look)
        look.is_steady = marks(state) == before
        look.books = books(state)
        return look

    def _add_others(self, look: Look) -> None:
        """What is few, or may have moved between containers."""
        state = self._service.state
        outside = (*state.private.values(), state.spares.values(), state.leaving)
        for copies in (*outside, *(shard.copies.values() for shard in state.shards())):
            look.add(list(copies))
        look.telling |= self._service.upkeep.telling
        look.pins |= {pin.document for pin in state.pins.all()}
        look.unlisted |= {copy.extent for copies in (state.leaving, *state.private.values()) for copy in copies}

    # Reading and mending -------------------------------------------------------------------------

    async def _read(self, look: Look) -> None:
        """Read every extent that is on NVMe, a few at a time, and remember what is not as sealed."""
        reading = self._reading
        sizes = [(held.extent.id, held.slot.size_bytes) for held in look.settled]
        reading.total_bytes = sum(size_bytes for _, size_bytes in sizes)
        waiting: Iterator[tuple[ExtentId, int]] = iter(sizes)

        async def reader() -> None:
            for extent, size_bytes in waiting:
                error = await self._told(partial(self._repairs.scrub, extent))
                if isinstance(error, Draining):
                    raise error
                if isinstance(error, CorruptExtent):
                    reading.damage[extent] = error.message
                elif error is not None:
                    reading.failed[extent] = error.message
                reading.read_bytes += size_bytes

        await asyncio.gather(*(reader() for _ in range(READS_IN_FLIGHT)))

    async def _mend(self, finding: Finding) -> None:
        """Carry out one repair. Raises StorageFailed."""
        repair: Repair | None = finding.repair
        assert repair is not None
        if isinstance(repair, Remove):
            path = repair.path
            await self._on_thread(lambda: remove(path))
            return
        error = await self._told(partial(self._repairs.carry_out, repair))
        if error is not None:
            raise error

    async def _told(self, start: Callable[[Done], None]) -> HoldfastError | None:
        """Await what a command of the service tells."""
        ended: asyncio.Future[HoldfastError | None] = asyncio.get_running_loop().create_future()

        def done(error: HoldfastError | None) -> None:
            if not ended.done():  # the check may have been cancelled
                ended.set_result(error)

        start(done)
        return await ended


async def _sliced(items: list[T]) -> AsyncIterator[T]:
    """The items, letting others have the loop after every slice."""
    for index, item in enumerate(items):
        if index % SLICE == SLICE - 1:
            await asyncio.sleep(0)
        yield item
