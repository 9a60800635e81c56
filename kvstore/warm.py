"""Warm index: what lies in the arena, and who was given which slab of it, for the daemon that comes after this one.

A second catalog, beside the slabs: it outlives the process, and goes with the memory that it tells of. A slab is named
by its serial, which is that of one inode with one owner: a row of a slab that has changed hands names nothing. Rows of
bytes are written behind the daemon's back by one thread, in groups; whatever they say is verified before it counts.
Rows of fences are there before a client has its descriptor, and what lay in a slot is forgotten before anybody is
given the slot to write to: else the successor might find it good, and an old writer spoil it afterwards.

Without an index (a file system that cannot hold one, or refuses a write) the daemon works, and leaves nothing to its
successor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Final

from .catalog import Catalog, Durability
from .errors import StorageFailed
from .extent import ExtentId
from .orders import (
    DropDocument,
    DropExtent,
    DropFence,
    PutDocument,
    PutExtent,
    PutFence,
    PutSpec,
    Record,
)
from .slots import Slot
from .state import Left

NAME: Final = "warm.sqlite"
GROUP: Final = 512  # records per commit: few enough that a fence does not wait long
STARTS_MAX: Final = 3
BELONGS: Final = "belongs_to"
STARTS: Final = "starts"

Noted = tuple[Sequence[Record], Mapping[int, int]]  # with the serials of the slabs that are named, as of then


class WarmIndex:
    """The index in `directory`, for an arena and a catalog that `belongs_to` names.

    What an earlier daemon left is in `left` and `fences`, if the index belongs to the same: same boot, slab size,
    catalog. Anything else found, damaged or of three starts that did not get far, is replaced by an empty index.
    """

    def __init__(
        self, directory: Path, belongs_to: str | None, found: Mapping[int, int], crashed: Callable[[Exception], None]
    ) -> None:
        """`found` tells the serials of the slabs that are there, by number. Never fails: see `problem`."""
        self.path = directory / NAME
        self.problem = "" if belongs_to is not None else "the kernel does not name this boot"
        self.left = Left()
        self.fences: list[tuple[PutFence, int]] = []  # with the slab's number
        self._crashed = crashed
        self._came = threading.Condition()
        self._noted: list[Noted] = []
        self._is_writing = False
        self._barriers: list[Callable[[], None]] = []
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._catalog = self._opened(belongs_to, found) if belongs_to is not None else None
        if self._catalog is None:
            self._discarded()
            return
        self._thread = threading.Thread(target=self._serve, name="holdfast-warm", daemon=True)
        self._thread.start()

    # What was left -----------------------------------------------------------------------------

    def _opened(self, belongs_to: str, found: Mapping[int, int]) -> Catalog | None:
        """The index that is there, with what it says in `left` and `fences`; else an empty one; else none."""
        try:
            catalog = Catalog(self.path, Durability.PROCESS)
        except StorageFailed as error:
            self.problem = error.message
        else:
            try:
                if self._read(catalog, belongs_to, found):
                    return catalog
            except StorageFailed as error:
                self.problem = error.message
            catalog.close()
        self.left, self.fences = Left(), []
        self._discarded()
        try:
            catalog = Catalog(self.path, Durability.PROCESS)
            catalog.remember(BELONGS, belongs_to)
            catalog.remember(STARTS, "1")
        except StorageFailed as error:
            self.problem = error.message
            return None
        return catalog

    def _read(self, catalog: Catalog, belongs_to: str, found: Mapping[int, int]) -> bool:
        starts = int(catalog.recall(STARTS) or 0)
        if catalog.recall(BELONGS) != belongs_to or starts >= STARTS_MAX:
            return False
        catalog.remember(STARTS, str(starts + 1))
        numbers = {serial: number for number, serial in found.items()}
        contents = catalog.look()
        here = [(e, Slot(numbers[s.slab], s.offset, s.size_bytes)) for e, s in contents.extents if s.slab in numbers]
        self.left = Left(specs=contents.specs, extents=here, documents=contents.documents)
        fences = catalog.fences()
        self.fences = [(fence, numbers[fence.serial]) for fence in fences if fence.serial in numbers]
        # At once: their serials may come to name other slabs.
        stale: list[Record] = [DropExtent(e.id) for e, slot in contents.extents if slot.slab not in numbers]
        stale += {DropFence(f.client) for f in fences} - {DropFence(f.client) for f, _ in self.fences}
        catalog.commit(stale)
        return True

    def seal(self, extent: ExtentId) -> bytes:
        """The seal of what lies in DDR. Raises StorageFailed, also when the index does not tell."""
        if self._catalog is None:
            raise StorageFailed("there is no warm index")
        return self._catalog.seal(extent)

    def settled(self) -> None:
        """The start that began with this index has succeeded."""
        with self._giving_up() as catalog:
            if catalog is not None:
                catalog.remember(STARTS, "0")

    # Writing -----------------------------------------------------------------------------------

    def note(self, records: Sequence[Record], serial: Callable[[int], int]) -> None:
        """Take changes, to be written soon. Quick. `serial` tells a slab's, as of now."""
        if self._catalog is None:
            return
        slabs = {record.slot.slab for record in records if isinstance(record, PutExtent)}
        with self._came:
            self._noted.append((records, {slab: serial(slab) for slab in slabs}))
            self._came.notify()

    def fence(self, fences: Sequence[PutFence]) -> None:
        """Write who may look at what; there on return."""
        with self._giving_up() as catalog:
            if catalog is not None:
                catalog.commit(fences)

    def is_settled(self, then: Callable[[], None]) -> bool:
        """Whether all that was noted is written. If not, `then` is called, on another thread, when it is."""
        with self._came:
            if not self._noted and not self._is_writing:
                return True
            self._barriers.append(then)
            self._came.notify()
            return False

    def handed_out(self, serials: Mapping[int, int]) -> set[int]:
        """The slabs, of these, that somebody may look at; all of them when that is not known."""
        if self._catalog is None:
            return set()
        try:
            fenced = {fence.serial for fence in self._catalog.fences()}
        except StorageFailed:
            return set(serials)
        return {slab for slab, serial in serials.items() if serial in fenced}

    def close(self) -> None:
        """Write what was noted, and leave the index to a successor."""
        with self._came:
            self._is_closing = True
            self._came.notify()
        if self._thread is not None:
            self._thread.join()
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None

    def discard(self) -> None:
        """Close, and leave nothing."""
        self.close()
        self._discarded()

    @contextmanager
    def _giving_up(self) -> Iterator[Catalog | None]:
        """Use the index. One that a write is missing from is worse than none, so a failure is its end."""
        try:
            yield self._catalog
        except StorageFailed as error:
            self.problem = error.message
            self._catalog = None
            self._discarded()

    def _discarded(self) -> None:
        for companion in ("", "-wal", "-shm"):
            with suppress(OSError):
                self.path.with_name(NAME + companion).unlink(missing_ok=True)

    # The thread --------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._step():
                pass
        except Exception as error:  # noqa: BLE001 - a bug of ours: what is noted would pile up unseen
            self._crashed(error)

    def _step(self) -> bool:
        """Write what has been noted; False when nothing will come any more."""
        with self._came:
            while not self._noted and not self._barriers and not self._is_closing:
                self._came.wait()
            noted, self._noted = self._noted, []
            reached, self._barriers = self._barriers, []
            self._is_writing = True
        latest = iter(_latest(noted).values())
        while group := list(islice(latest, GROUP)):
            with self._giving_up() as catalog:
                if catalog is not None:
                    catalog.commit(group)
        with self._came:
            self._is_writing = False
        for then in reached:
            then()
        return bool(noted or reached)


def _latest(noted: Iterable[Noted]) -> dict[object, Record]:
    """The last word on everything, in the order it was said, with serials for the numbers of slabs."""
    latest: dict[object, Record] = {}
    for records, serials in noted:
        for record in records:
            name: object
            said: Record = record
            match record:
                case PutExtent(slot=slot):
                    name = record.extent.id
                    said = record._replace(slot=slot._replace(slab=serials[slot.slab]))
                case DropExtent(extent=name):
                    pass
                case PutDocument(document=document):
                    name = tuple(document.id)
                case DropDocument(tenant=tenant, name=document_name):
                    name = (tenant, document_name)
                case PutSpec(spec=name):
                    pass
                case _:
                    name = record
            latest.pop(name, None)
            latest[name] = said
    return latest
