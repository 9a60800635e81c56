"""Mover: carries out the orders that touch memory and disk, on threads, and reports how they ended.

Byte work (seal, read in, write out) goes to a pool in pieces, in the order of `Transfers`: an attach overtakes
write-through, also one that is under way, and the first layers of many extents come before the last of any. What is
written is synced in groups: all that was written while the last sync ran, and more where nobody waits for it. Catalog
writes go to one thread that commits together whatever has queued up. Nothing here decides anything; the service does.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from .arena import Arena
from .catalog import Catalog
from .clock import Clock
from .errors import CorruptExtent, Draining, HoldfastError, StorageFailed
from .extent import ExtentId
from .geometry import Geometry
from .orders import Hasten, MoverOrder, Outcome, ReadIn, RetireSlab, Scrub, Seal, Urgency, Verify, Write, WriteOut
from .seal import CHECKSUM_BYTES, seal_planes
from .segments import Segments
from .transfers import Transfers
from .verify import compare, verify

READ_FIRST_BYTES: Final = 1 << 20  # the first read of an extent is short, so that all first layers are early
READ_BYTES: Final = 4 << 20  # the others: each call costs, and the disk likes them long (benchmarks/LOG.md)
WRITE_BYTES: Final = 8 << 20  # each writer may leave the disk that much to do when an attach comes; shorter costs 5-8 %
SYNC_BYTES: Final = 128 << 20  # written through before a sync while more is being written: each sync holds up writes
COMMIT_WRITES_MAX: Final = 256  # bounds how long one commit, and so one answer, takes

Plane = tuple[int, int, int]  # index, offset, bytes


class Report(Protocol):
    """Who hears of orders. Any worker thread may call, so the methods must be quick and thread-safe."""

    def finished(self, order_id: int, outcome: Outcome) -> None:
        """The order ended; said once."""
        ...

    def advanced(self, order_id: int, layers: int) -> None:
        """The first `layers` layers are read and verified; ever more of them, and never after `finished`."""
        ...

    def crashed(self, error: Exception) -> None:
        """A worker hit a bug of ours. No queued order is carried out or reported any more: stop the process."""
        ...


@dataclass(frozen=True, slots=True)
class _Sync:
    """What was written so far is to last."""


@dataclass(slots=True)
class _Job:
    """How far an order of the pool has come; `lock` guards what changes."""

    order: Seal | Verify | ReadIn | WriteOut | Scrub | RetireSlab | _Sync
    started_ns: int
    slab: int | None = None
    sync_failures: int = 0  # of the target segment, when the order came
    pieces_left: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy_ns: int = 0
    size_bytes: int = 0
    planes_ready: int = 0
    planes_ahead: dict[int, int] = field(default_factory=dict)  # start -> stop of pieces behind a gap
    checksums: bytes = b""
    error: HoldfastError | None = None

    def fail(self, error: HoldfastError) -> None:
        """Remember the first error."""
        with self.lock:
            self.error = self.error or error


class _Piece(NamedTuple):
    """What one thread does in one go: planes of a read, bytes [start, stop) of a write, or all of something else."""

    job: _Job
    planes: tuple[Plane, ...] = ()
    start: int = 0
    stop: int = 0


class Mover:
    """`threads` workers for bytes and one for the catalog, running from construction to `close`.

    It takes orders from one thread. It closes neither arena, segments nor catalog.
    """

    def __init__(
        self,
        arena: Arena,
        segments: Segments,
        catalog: Catalog,
        clock: Clock,
        threads: int,
        report: Report,
        left_seal: Callable[[ExtentId], bytes],
    ) -> None:
        """`left_seal` tells the seal of what an earlier daemon left in DDR; it raises StorageFailed."""
        self._arena = arena
        self._segments = segments
        self._catalog = catalog
        self._clock = clock
        self._report = report
        self._left_seal = left_seal
        self._lock = lock = threading.Lock()
        self._piece_came = threading.Condition(lock)
        self._write_came = threading.Condition(lock)
        self._transfers: Transfers[_Piece] = Transfers(threads)
        self._unsynced: list[_Job] = []
        self._is_syncing = False  # or about to
        self._writing = 0  # pieces under way
        self._sync_failures: Counter[int] = Counter()  # by segment
        self._writes: deque[tuple[Write, int]] = deque()  # with the time of their submission
        self._in_use: Counter[int] = Counter()  # slabs, by orders not finished
        self._is_closing = False
        self._threads = [self._started(f"holdfast-mover-{index}", self._move) for index in range(threads)]
        self._threads.append(self._started("holdfast-catalog", self._commit))

    def submit(self, order: MoverOrder) -> None:
        """Take the order; it is reported from another thread. Orders that come after `close` began are dropped."""
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            if self._is_closing:
                return
            match order:
                case Write():
                    self._writes.append((order, now_ns))
                    self._write_came.notify()
                case RetireSlab(slab=slab):
                    assert not self._in_use[slab], f"slab {slab} is retired while orders use it"
                    # At once, so that whatever is asked of the slab next finds its new inode.
                    self._arena.retire(slab)
                    self._push(Urgency.DEMOTE, [_Piece(_Job(order, now_ns))])
                case Seal(slot=slot):
                    assert order.geometry.size_bytes <= slot.size_bytes, order
                    self._push(Urgency.ATTACH, [_Piece(_Job(order, now_ns, slot.slab))])  # a commit waits for it
                case Scrub():
                    self._push(Urgency.SCRUB, [_Piece(_Job(order, now_ns))])
                case Verify(slot=slot):
                    assert order.geometry.size_bytes <= slot.size_bytes, order
                    self._push(order.urgency, [_Piece(_Job(order, now_ns, slot.slab))])
                case WriteOut(source=source, target=target, size_bytes=size_bytes):
                    assert size_bytes <= min(source.size_bytes, target.size_bytes), order
                    job = _Job(order, now_ns, source.slab, self._sync_failures[target.slab])
                    starts = range(0, size_bytes, WRITE_BYTES) or range(1)
                    pieces = [_Piece(job, (), start, min(start + WRITE_BYTES, size_bytes)) for start in starts]
                    self._push(order.urgency, pieces)
                case Hasten(reads=reads):
                    count = self._transfers.hasten(lambda piece: getattr(piece.job.order, "id", None) in reads)
                    self._piece_came.notify(count)
                case ReadIn(target=target, geometry=geometry):
                    assert geometry.size_bytes <= min(order.source.size_bytes, target.size_bytes), order
                    job = _Job(order, now_ns, target.slab)
                    cut = _cut(geometry, READ_FIRST_BYTES, READ_BYTES)
                    self._push(order.urgency, [_Piece(job, planes) for planes in cut])

    def close(self, deadline_ns: int) -> list[str]:
        """Commit the queued writes, refuse queued byte work with Draining, end the threads.

        Waits until `deadline_ns` (monotonic) at most; returns the names of the threads that still run then.
        """
        with self._lock:
            self._is_closing = True
            self._piece_came.notify_all()
            self._write_came.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, (deadline_ns - self._clock.monotonic_ns()) / 1e9))
        return [thread.name for thread in self._threads if thread.is_alive()]

    # The queue, under the lock --------------------------------------------------------------------

    def _push(self, urgency: Urgency, pieces: list[_Piece]) -> None:
        """Queue the pieces of one job; reads layer by layer."""
        job = pieces[0].job
        job.pieces_left = len(pieces)
        if job.slab is not None:
            self._in_use[job.slab] += 1
        parts = job.order.geometry.parts if isinstance(job.order, ReadIn) else 1
        for piece in pieces:
            self._transfers.push(urgency, piece.planes[0][0] // parts if piece.planes else 0, piece)
        self._piece_came.notify(len(pieces))

    # The threads ----------------------------------------------------------------------------------

    def _started(self, name: str, step: Callable[[], bool]) -> threading.Thread:
        thread = threading.Thread(target=self._serve, args=(step,), name=name, daemon=True)
        thread.start()
        return thread

    def _serve(self, step: Callable[[], bool]) -> None:
        """Take steps until one says that there are no more."""
        try:
            while step():
                pass
        except Exception as error:  # noqa: BLE001 - a bug of ours: a thread that died silently would hang every waiter
            with self._lock:
                self._is_closing = True
                self._transfers.clear()
                self._writes.clear()
                self._piece_came.notify_all()
                self._write_came.notify_all()
            self._report.crashed(error)

    def _move(self) -> bool:
        """Carry out the next piece; False when there will be none."""
        with self._lock:
            while not (found := self._transfers.pop()) and not self._is_closing:
                self._piece_came.wait()
            if found is None:
                return False
            if isinstance(found[1].job.order, WriteOut):
                self._writing += 1
        urgency, piece = found
        job = piece.job
        if self._is_closing and not isinstance(job.order, _Sync):
            job.fail(Draining("the daemon shuts down"))
        if job.error is None:
            self._carry(piece)
        with job.lock:
            job.pieces_left -= 1
            is_last = job.pieces_left == 0
        with self._lock:
            self._transfers.done(urgency)
            if isinstance(job.order, WriteOut):
                self._writing -= 1
                if is_last and job.error is None:
                    self._unsynced.append(job)
                    is_last = False  # the sync is
                self._call_sync()
        if is_last and isinstance(job.order, Seal | Verify | ReadIn | WriteOut | Scrub):
            self._finish(job, job.order.id)
        return True

    def _carry(self, piece: _Piece) -> None:
        job, started_ns = piece.job, self._clock.monotonic_ns()
        size_bytes = 0
        try:
            match job.order:
                case Seal() as seal:
                    job.checksums = seal_planes(self._arena.view(seal.slot), seal.geometry)
                    size_bytes = seal.geometry.size_bytes
                case Verify() as check:
                    job.checksums = self._verify(check)
                    size_bytes = check.geometry.size_bytes
                case ReadIn() as read_in:
                    size_bytes = self._read_in(job, read_in, piece.planes)
                case WriteOut() as write_out:
                    content = self._arena.view(write_out.source)[piece.start : piece.stop]
                    self._segments.write(write_out.target, piece.start, content)
                    size_bytes = len(content)
                case Scrub() as scrub:
                    verify(self._segments, scrub.slot, scrub.geometry, self._seal_of(job, scrub))
                    size_bytes = scrub.geometry.size_bytes
                case RetireSlab(slab=slab):
                    self._arena.sweep()
                    self._arena.make(slab)  # else whoever uses the slab next would wait for its pages
                case _Sync():
                    self._sync(started_ns)
        except StorageFailed as error:
            size_bytes = error.moved_bytes  # what wore the device down is counted, whatever it was good for
            job.fail(error)
        except HoldfastError as error:
            job.fail(error)
        except OSError as error:
            job.fail(StorageFailed(str(error)))
        with job.lock:
            job.busy_ns += self._clock.monotonic_ns() - started_ns
            job.size_bytes += size_bytes
            if isinstance(job.order, ReadIn) and job.error is None:
                self._advance(job, job.order, piece.planes)

    def _verify(self, order: Verify) -> bytes:
        found = seal_planes(self._arena.view(order.slot), order.geometry)
        if found != self._left_seal(order.extent):
            raise CorruptExtent(f"slab {order.slot.slab}, offset {order.slot.offset}: not as it was sealed")
        return found

    def _read_in(self, job: _Job, order: ReadIn, planes: tuple[Plane, ...]) -> int:
        """Read planes and verify them while they are in the CPU's cache; returns their bytes."""
        seal = self._seal_of(job, order)
        first, stop = planes[0][1], planes[-1][1] + planes[-1][2]
        into = self._arena.view(order.target)[first:stop]
        self._segments.read(order.source, first, into)
        compare(order.source, planes, into, seal)
        return len(into)

    def _seal_of(self, job: _Job, order: ReadIn | Scrub) -> bytes:
        """The seal that the catalog has, read once for all pieces."""
        with job.lock:
            job.checksums = job.checksums or self._catalog.seal(order.extent)
        if len(job.checksums) != CHECKSUM_BYTES * order.geometry.plane_count:
            raise CorruptExtent(f"extent {order.extent}: its seal has {len(job.checksums)} bytes")
        return job.checksums

    def _advance(self, job: _Job, order: ReadIn, planes: tuple[Plane, ...]) -> None:
        """Say so, under the job's lock, if there are more leading layers than before."""
        job.planes_ahead[planes[0][0]] = planes[-1][0] + 1
        before = job.planes_ready
        while job.planes_ready in job.planes_ahead:
            job.planes_ready = job.planes_ahead.pop(job.planes_ready)
        layers = job.planes_ready // order.geometry.parts
        if layers > before // order.geometry.parts:
            self._report.advanced(order.id, layers)

    def _call_sync(self) -> None:
        """Have what is unsynced synced if it is time to, under the lock. One sync at a time, so that more gathers."""
        gathered_bytes = sum(job.size_bytes for job in self._unsynced)
        is_awaited = any(
            isinstance(job.order, WriteOut) and job.order.urgency <= Urgency.DEMOTE for job in self._unsynced
        )
        if self._is_syncing or not self._unsynced:
            return
        if is_awaited or not self._writing or gathered_bytes >= SYNC_BYTES:
            self._is_syncing = True
            # Before whatever else waits in its class: the work is done but for this.
            job = _Job(_Sync(), self._clock.monotonic_ns(), pieces_left=1)
            self._transfers.push(Urgency.DEMOTE, -1, _Piece(job))
            self._piece_came.notify()

    def _sync(self, began_ns: int) -> None:
        """Sync each segment once for all jobs that have gathered, and report them."""
        with self._lock:
            gathered, self._unsynced = self._unsynced, []
        jobs = [(job, job.order) for job in gathered if isinstance(job.order, WriteOut)]
        failed: dict[int, StorageFailed] = {}
        for segment in sorted({order.target.slab for _, order in jobs}):
            try:
                self._segments.sync(segment)
            except StorageFailed as error:
                failed[segment] = error
        with self._lock:
            self._sync_failures.update(failed.keys())
        each_ns = (self._clock.monotonic_ns() - began_ns) // len(jobs)
        for job, order in jobs:
            segment = order.target.slab
            # The kernel tells of a lost write once, maybe while this one was under way: the next sync proves nothing.
            if job.sync_failures != self._sync_failures[segment]:
                job.fail(failed.get(segment) or StorageFailed(f"segment {segment}: a sync failed during the write"))
            job.busy_ns += each_ns
            self._finish(job, order.id)
        with self._lock:
            self._is_syncing = False
            self._call_sync()

    def _finish(self, job: _Job, order_id: int) -> None:
        with self._lock:
            if job.slab is not None:
                self._in_use[job.slab] -= 1
                if not self._in_use[job.slab]:
                    del self._in_use[job.slab]
        outcome = Outcome(
            elapsed_ns=self._clock.monotonic_ns() - job.started_ns,
            busy_ns=job.busy_ns,
            size_bytes=job.size_bytes,
            error=job.error,
            checksums=job.checksums,
        )
        self._report.finished(order_id, outcome)

    def _commit(self) -> bool:
        """Commit what has queued up, as one transaction; False when nothing will come any more."""
        with self._write_came:
            while not self._writes and not self._is_closing:
                self._write_came.wait()
            batch = [self._writes.popleft() for _ in range(min(len(self._writes), COMMIT_WRITES_MAX))]
        if not batch:
            return False
        began_ns = self._clock.monotonic_ns()
        error: HoldfastError | None = None
        try:
            self._catalog.commit([record for write, _ in batch for record in write.records])
        except HoldfastError as failure:
            error = failure
        now_ns = self._clock.monotonic_ns()
        for write, submitted_ns in batch:
            outcome = Outcome(elapsed_ns=now_ns - submitted_ns, busy_ns=now_ns - began_ns, error=error)
            self._report.finished(write.id, outcome)
        return True


@lru_cache(maxsize=64)  # a model has few geometries
def _cut(geometry: Geometry, first_bytes: int, most_bytes: int) -> tuple[tuple[Plane, ...], ...]:
    """The planes in pieces of about `first_bytes`, then twice as much each time up to `most_bytes`.

    So a layer is announced before as many bytes as lie before it were read twice.
    """
    pieces: list[tuple[Plane, ...]] = []
    gathered: list[Plane] = []
    target = first_bytes
    for plane in geometry.planes(0, geometry.layers):
        gathered.append(plane)
        if sum(size for _, _, size in gathered) >= target:
            pieces.append(tuple(gathered))
            gathered, target = [], min(2 * target, most_bytes)
    if gathered and pieces and 2 * len(gathered) < len(pieces[-1]):
        pieces[-1] += tuple(gathered)  # a short read costs nearly as much as a long one
    elif gathered:
        pieces.append(tuple(gathered))
    return tuple(pieces)
