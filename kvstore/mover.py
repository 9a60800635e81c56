"""Mover: carries out the orders that touch memory and disk, on threads, and reports how they ended.

Byte work (seal, read in, write out) goes to a pool in the order of (urgency, layer, age), so that an attach overtakes
write-through and the first layers of many extents come before the last of any. Catalog writes go to one thread that
commits together whatever has queued up. Nothing here decides anything; the service does.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from .arena import Arena
from .catalog import Catalog
from .clock import Clock
from .errors import CorruptExtent, Draining, HoldfastError, StorageFailed
from .geometry import Geometry
from .orders import Outcome, ReadIn, RetireSlab, Scrub, Seal, Urgency, Write, WriteOut
from .seal import CHECKSUM_BYTES, checksum, seal_planes, sealed_as
from .segments import Segments
from .verify import verify

CHUNK_TARGET_BYTES: Final = 1 << 20  # smaller reads pay more per call than per byte
COMMIT_WRITES_MAX: Final = 256  # bounds how long one commit, and so one answer, takes

MoverOrder = Seal | ReadIn | WriteOut | Scrub | Write | RetireSlab


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


@dataclass(slots=True)
class _Job:
    """How far an order of the pool has come; `lock` guards all but `order`, `slab` and `started_ns`."""

    order: Seal | ReadIn | WriteOut | Scrub | RetireSlab
    slab: int | None  # that the order uses
    started_ns: int
    chunks_left: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy_ns: int = 0
    size_bytes: int = 0
    layers_ready: int = 0
    layers_ahead: dict[int, int] = field(default_factory=dict)  # start -> stop of chunks behind a gap
    checksums: bytes = b""
    error: HoldfastError | None = None

    def fail(self, error: HoldfastError) -> None:
        """Remember the first error."""
        with self.lock:
            self.error = self.error or error


class _Chunk(NamedTuple):
    """What one thread does in one go. The first three fields are its place in the queue, and unique."""

    urgency: Urgency
    layer_start: int
    sequence: int
    layer_stop: int
    job: _Job


class Mover:
    """`threads` workers for bytes and one for the catalog, running from construction to `close`.

    It takes orders from one thread. It closes neither arena, segments nor catalog.
    """

    def __init__(
        self, arena: Arena, segments: Segments, catalog: Catalog, clock: Clock, threads: int, report: Report
    ) -> None:
        self._arena = arena
        self._segments = segments
        self._catalog = catalog
        self._clock = clock
        self._report = report
        lock = threading.Lock()
        self._chunk_came = threading.Condition(lock)
        self._write_came = threading.Condition(lock)
        self._chunks: list[_Chunk] = []  # a heap
        self._writes: deque[tuple[Write, int]] = deque()  # with the time of their submission
        self._in_use: Counter[int] = Counter()  # slabs, by orders not finished
        self._sequence = 0
        self._is_closing = False
        self._threads = [self._started(f"holdfast-mover-{index}", self._move) for index in range(threads)]
        self._threads.append(self._started("holdfast-catalog", self._commit))

    def submit(self, order: MoverOrder) -> None:
        """Take the order; it is reported from another thread. Orders that come after `close` began are dropped."""
        now_ns = self._clock.monotonic_ns()
        with self._chunk_came:
            if self._is_closing:
                return
            self._sequence += 1
            match order:
                case Write():
                    self._writes.append((order, now_ns))
                    self._write_came.notify()
                case RetireSlab(slab=slab):
                    assert not self._in_use[slab], f"slab {slab} is retired while orders use it"
                    # At once, so that whatever is asked of the slab next finds its new inode.
                    self._arena.retire(slab)
                    self._push(_Job(order, None, now_ns, 1), Urgency.DEMOTE)
                case Seal(slot=slot):
                    assert order.geometry.size_bytes <= slot.size_bytes, order
                    self._push(_Job(order, slot.slab, now_ns, 1), Urgency.ATTACH)  # a commit waits for it
                case Scrub():
                    self._push(_Job(order, None, now_ns, 1), Urgency.SCRUB)
                case WriteOut(source=source):
                    assert order.size_bytes <= min(source.size_bytes, order.target.size_bytes), order
                    self._push(_Job(order, source.slab, now_ns, 1), order.urgency)
                case ReadIn(target=target, geometry=geometry):
                    assert geometry.size_bytes <= min(order.source.size_bytes, target.size_bytes), order
                    self._push(_Job(order, target.slab, now_ns, 0), order.urgency, geometry)

    def close(self, deadline_ns: int) -> list[str]:
        """Commit the queued writes, refuse queued byte work with Draining, end the threads.

        Waits until `deadline_ns` (monotonic) at most; returns the names of the threads that still run then.
        """
        with self._chunk_came:
            self._is_closing = True
            queued = [chunk.job for chunk in self._chunks]
            self._chunk_came.notify_all()
            self._write_came.notify_all()
        for job in queued:  # workers still take these chunks, skip them and report
            job.fail(Draining("the daemon shuts down"))
        for thread in self._threads:
            thread.join(max(0.0, (deadline_ns - self._clock.monotonic_ns()) / 1e9))
        return [thread.name for thread in self._threads if thread.is_alive()]

    # The queue, under the lock --------------------------------------------------------------------

    def _push(self, job: _Job, urgency: Urgency, geometry: Geometry | None = None) -> None:
        """Queue the job: in chunks of layers where there is a geometry, else whole."""
        layers = geometry.layers if geometry else 1
        step = -(-CHUNK_TARGET_BYTES // geometry.layer_bytes) if geometry else 1
        starts = range(0, layers, step)
        job.chunks_left = len(starts)
        if job.slab is not None:
            self._in_use[job.slab] += 1
        for start in starts:
            stop = min(start + step, layers)
            heapq.heappush(self._chunks, _Chunk(urgency, start, self._sequence, stop, job))
        self._chunk_came.notify(len(starts))

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
            with self._chunk_came:
                self._is_closing = True
                self._chunks.clear()
                self._writes.clear()
                self._chunk_came.notify_all()
                self._write_came.notify_all()
            self._report.crashed(error)

    def _move(self) -> bool:
        """Carry out the next chunk; False when there will be none."""
        with self._chunk_came:
            while not self._chunks and not self._is_closing:
                self._chunk_came.wait()
            if not self._chunks:
                return False
            chunk = heapq.heappop(self._chunks)
        job = chunk.job
        if job.error is None:
            self._carry(chunk)
        with job.lock:
            job.chunks_left -= 1
            is_last = job.chunks_left == 0
        if is_last and not isinstance(job.order, RetireSlab):
            self._finish(job, job.order.id)
        return True

    def _carry(self, chunk: _Chunk) -> None:
        job, started_ns = chunk.job, self._clock.monotonic_ns()
        size_bytes = 0
        try:
            match job.order:
                case Seal() as seal:
                    job.checksums = seal_planes(self._arena.view(seal.slot), seal.geometry)
                    size_bytes = seal.geometry.size_bytes
                case ReadIn() as read_in:
                    size_bytes = self._read_in(job, read_in, chunk.layer_start, chunk.layer_stop)
                case WriteOut() as write_out:
                    content = self._arena.view(write_out.source)[: write_out.size_bytes]
                    self._segments.write(write_out.target, content)
                    size_bytes = write_out.size_bytes
                case Scrub() as scrub:
                    verify(self._segments, scrub.slot, scrub.geometry, self._seal_of(job, scrub))
                    size_bytes = scrub.geometry.size_bytes
                case RetireSlab(slab=slab):
                    self._arena.sweep()
                    self._arena.make(slab)  # else whoever uses the slab next would wait for its pages
        except HoldfastError as error:
            job.fail(error)
        except OSError as error:
            job.fail(StorageFailed(str(error)))
        with job.lock:
            job.busy_ns += self._clock.monotonic_ns() - started_ns
            job.size_bytes += size_bytes
            if isinstance(job.order, ReadIn) and job.error is None:
                self._advance(job, job.order.id, chunk)

    def _read_in(self, job: _Job, order: ReadIn, layer_start: int, layer_stop: int) -> int:
        """Read layers and verify them while they are in the CPU's cache; returns their bytes."""
        seal = self._seal_of(job, order)
        planes = order.geometry.planes(layer_start, layer_stop)
        first = planes[0][1]
        into = self._arena.view(order.target)[first : first + (layer_stop - layer_start) * order.geometry.layer_bytes]
        self._segments.read(order.source, first, into)
        for plane, offset, size in planes:
            found, sealed = checksum(into[offset - first : offset - first + size]), sealed_as(seal, plane)
            if found != sealed:
                raise CorruptExtent(
                    f"segment {order.source.slab}, offset {order.source.offset + offset}, plane {plane}: "
                    f"checksum {found.hex()}, sealed as {sealed.hex()}"
                )
        return len(into)

    def _seal_of(self, job: _Job, order: ReadIn | Scrub) -> bytes:
        """The seal that the catalog has, read once for all chunks."""
        with job.lock:
            job.checksums = job.checksums or self._catalog.seal(order.extent)
        if len(job.checksums) != CHECKSUM_BYTES * order.geometry.plane_count:
            raise CorruptExtent(f"extent {order.extent}: its seal has {len(job.checksums)} bytes")
        return job.checksums

    def _advance(self, job: _Job, order_id: int, chunk: _Chunk) -> None:
        """Say so, under the job's lock, if there are more leading layers than before."""
        job.layers_ahead[chunk.layer_start] = chunk.layer_stop
        before = job.layers_ready
        while job.layers_ready in job.layers_ahead:
            job.layers_ready = job.layers_ahead.pop(job.layers_ready)
        if job.layers_ready > before:
            self._report.advanced(order_id, job.layers_ready)

    def _finish(self, job: _Job, order_id: int) -> None:
        with self._chunk_came:
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
