"""Measure: what the DDR and NVMe tiers do on this machine, by the very code that serves them.

All on scratch memory and scratch files of the caller's, beside the real ones. Bytes that come back are compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from .arena import Arena
from .calibration import Rate
from .catalog import Catalog
from .clock import Clock
from .errors import DeadlineExceeded, StorageFailed
from .extent import Extent
from .geometry import Geometry
from .mover import Mover
from .orders import Outcome, PutExtent, ReadIn, Urgency, WriteOut
from .seal import seal_planes
from .segments import Segments
from .slots import Slot

EXTENT: Final = Geometry(layers=16, heads=8, rows=128, key_bytes=256, value_bytes=256, align=4096)  # 8 MiB
PAGE: Final = Geometry(layers=1, heads=1, rows=16, key_bytes=256, value_bytes=0, align=4096)
EXTENTS: Final = 8
SLAB_BYTES: Final = EXTENTS * EXTENT.size_bytes
LATENCIES: Final = 8  # single moves per round
ORDER_SECONDS: Final = 120.0

Progress = Callable[[str], None]


class _Ends:
    """Hears how orders end."""

    def __init__(self) -> None:
        self._waiting: set[int] = set()
        self._all_ended = threading.Event()
        self._lock = threading.Lock()
        self._error: Exception | None = None

    def expect(self, ids: Iterable[int]) -> None:
        self._waiting = set(ids)
        self._all_ended.clear()

    def finished(self, order_id: int, outcome: Outcome) -> None:
        """See mover.Report."""
        with self._lock:
            self._error = self._error or outcome.error
            self._waiting.discard(order_id)
            if not self._waiting:
                self._all_ended.set()

    def advanced(self, order_id: int, layers: int) -> None:
        """See mover.Report."""

    def crashed(self, error: Exception) -> None:
        """See mover.Report."""
        self._error = error
        self._all_ended.set()

    def wait(self) -> None:
        if not self._all_ended.wait(ORDER_SECONDS):
            raise DeadlineExceeded(f"the disk did not answer within {ORDER_SECONDS:g} s")
        if self._error is not None:
            raise self._error


class _Scratch:
    """An arena of two slabs, one to move from and one to move to, and one segment file."""

    def __init__(self, arena: Arena, directory: Path, clock: Clock, threads: int) -> None:
        self._arena = arena
        self._clock = clock
        self._ends = _Ends()
        self._segments = Segments(directory, SLAB_BYTES)
        self._catalog = Catalog(directory / "scratch.sqlite")
        self._mover = Mover(arena, self._segments, self._catalog, clock, threads, self._ends, self._catalog.seal)
        self.full = scratch_slots(0)
        self.empty = scratch_slots(1)
        self.names = [f"extent-{number}" for number in range(EXTENTS)]
        self._fill()

    def _fill(self) -> None:
        """Bytes that no disk compresses, and the seals of what will be read back."""
        chance = np.random.default_rng(0)
        for slot in self.full:
            self._arena.view(slot)[:] = chance.bytes(slot.size_bytes)
        pages = [(self.full[0], "page", PAGE)]
        whole = [(slot, name, EXTENT) for slot, name in zip(self.full, self.names, strict=True)]
        records = [
            PutExtent(_extent(name, slot), seal_planes(self._arena.view(slot)[: shape.size_bytes], shape), slot)
            for slot, name, shape in whole + pages
        ]
        self._catalog.commit(records)

    def copy(self) -> int:
        """Nanoseconds of copying every extent from slab to slab, by one thread."""
        started_ns = self._clock.monotonic_ns()
        for source, target in zip(self.full, self.empty, strict=True):
            np.copyto(_bytes(self._arena.view(target)), _bytes(self._arena.view(source)))
        return self._clock.monotonic_ns() - started_ns

    def copy_page(self) -> int:
        """Nanoseconds of copying one page."""
        source, target = (_bytes(self._arena.view(slots[0]))[: PAGE.size_bytes] for slots in (self.full, self.empty))
        started_ns = self._clock.monotonic_ns()
        np.copyto(target, source)
        return self._clock.monotonic_ns() - started_ns

    def write(self, slots: Sequence[Slot], shape: Geometry) -> int:
        """Nanoseconds until these extents are written and synced."""
        return self._carry(
            WriteOut(id=i, source=slot, target=slot, size_bytes=shape.size_bytes, urgency=Urgency.DEMOTE)
            for i, slot in enumerate(slots)
        )

    def read(self, names: Sequence[str], shape: Geometry) -> int:
        """Nanoseconds until they are read into the other slab and verified."""
        return self._carry(
            ReadIn(id=i, extent=name, source=source, target=target, geometry=shape, urgency=Urgency.ATTACH)
            for i, (name, source, target) in enumerate(zip(names, self.full, self.empty, strict=False))
        )

    def _carry(self, orders: Iterable[ReadIn | WriteOut]) -> int:
        waiting = list(orders)
        self._ends.expect(order.id for order in waiting)
        started_ns = self._clock.monotonic_ns()
        for order in waiting:
            self._mover.submit(order)
        self._ends.wait()
        return self._clock.monotonic_ns() - started_ns

    def compare(self) -> None:
        """Raises StorageFailed when something else came back."""
        for source, target in zip(self.full, self.empty, strict=True):
            if not np.array_equal(_bytes(self._arena.view(target)), _bytes(self._arena.view(source))):
                raise StorageFailed("what was read back is not what was written; do not trust this disk")
            _bytes(self._arena.view(target)).fill(0)

    def close(self) -> None:
        self._mover.close(self._clock.monotonic_ns() + int(ORDER_SECONDS * 1e9))
        self._segments.close()
        self._catalog.close()


def measure(
    arena: Arena, directory: Path, clock: Clock, threads: int, rounds: int, progress: Progress
) -> tuple[Rate, ...]:
    """Rates of DDR, DDR to NVMe and back. `arena` has slabs of SLAB_BYTES, `directory` is scratch on the NVMe tier.

    One round more is run and not counted: it touches every page and allocates every block. Raises StorageFailed.
    """
    assert arena.slab_bytes == SLAB_BYTES, arena.slab_bytes
    found: dict[str, list[int]] = {"ddr": [], "ddr->nvme": [], "nvme->ddr": []}
    single: dict[str, list[int]] = {"ddr": [], "ddr->nvme": [], "nvme->ddr": []}
    scratch = _Scratch(arena, directory, clock, threads)
    try:
        for number in range(rounds + 1):
            progress(f"round {number} of {rounds}" if number else "warming up")
            found["ddr"].append(scratch.copy())
            scratch.compare()
            found["ddr->nvme"].append(scratch.write(scratch.full, EXTENT))
            found["nvme->ddr"].append(scratch.read(scratch.names, EXTENT))
            scratch.compare()
            single["ddr"] += [scratch.copy_page() for _ in range(LATENCIES)]
            single["ddr->nvme"] += [scratch.write(scratch.full[:1], PAGE) for _ in range(LATENCIES)]
            single["nvme->ddr"] += [scratch.read(["page"], PAGE) for _ in range(LATENCIES)]
    finally:
        scratch.close()
    return tuple(rate(name, SLAB_BYTES, times[1:], single[name]) for name, times in found.items())


def rate(name: str, size_bytes: int, times_ns: Sequence[int], latencies_ns: Sequence[int]) -> Rate:
    """The rate of rounds that moved `size_bytes` each."""
    speeds = [size_bytes * 1e9 / max(time_ns, 1) for time_ns in times_ns]
    return Rate(
        name=name,
        size_bytes=size_bytes,
        rounds=len(speeds),
        bytes_per_second=median(speeds),
        slowest=min(speeds),
        fastest=max(speeds),
        latency_ns=round(median(latencies_ns)),
    )


def scratch_slots(slab: int) -> list[Slot]:
    """The slots of a slab of SLAB_BYTES."""
    return [Slot(slab, number * EXTENT.size_bytes, EXTENT.size_bytes) for number in range(EXTENTS)]


def _bytes(view: memoryview) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(view, np.uint8)


def _extent(name: str, slot: Slot) -> Extent:
    return Extent(
        id=name,
        tenant="scratch",
        fingerprint=b"",
        group=0,
        start=0,
        valid_tokens=1,
        previous=None,
        block_keys=b"",
        slot_bytes=slot.size_bytes,
    )
