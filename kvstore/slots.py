"""Allocators, pure: fixed-size slots in slabs (DDR) and segments (NVMe), and rows in a rank's arena (HBM).

They hand out numbers and touch no memory. A slab serves one class (owner, slot size) while any of its slots is in
use, and goes back to the pool when the last is freed, so sizes of different models do not fragment each other. Its
memory is kept: touching fresh pages costs more than copying into them. Only another owner must not see it. A fenced
slab hands out nothing: somebody of an earlier daemon life may still look at it.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from .extent import Extent

NOBODY: Final = ""  # no tenant has this name


class SlotClass(NamedTuple):
    """Slots of one size for one owner (a tenant in DDR; "" on NVMe)."""

    owner: str
    slot_bytes: int


class Slot(NamedTuple):
    """`size_bytes` bytes at `offset` of slab `slab` (a slab or segment number)."""

    slab: int
    offset: int
    size_bytes: int


def slots_of(extents: Iterable[Extent], owner: str | None = None) -> dict[SlotClass, int]:
    """The slots that these extents take in DDR; on NVMe, where nobody owns slots, `owner` is ""."""
    return Counter(SlotClass(extent.tenant if owner is None else owner, extent.slot_bytes) for extent in extents)


@dataclass(slots=True)
class _Slab:
    kind: SlotClass
    free: list[int]  # slot indices, highest first, so that low offsets go first
    slots: int


class _Open:
    """Slabs of one class that hand out slots: how many each has free."""

    def __init__(self) -> None:
        self.free: dict[int, int] = {}
        self.total = 0
        self._order: list[tuple[int, int]] = []  # a heap of (free, slab); what is outdated is passed over

    def set(self, slab: int, free: int) -> None:
        """So many from now on; with none it is not open."""
        self.total += free - self.free.pop(slab, 0)
        if not free:
            return
        self.free[slab] = free
        heapq.heappush(self._order, (free, slab))
        if len(self._order) > 4 * len(self.free) + 64:
            self._order = [(free, slab) for slab, free in self.free.items()]
            heapq.heapify(self._order)

    def fullest(self) -> int:
        """The slab with the fewest free slots, the lowest of several."""
        while True:
            free, slab = self._order[0]
            if self.free.get(slab) == free:
                return slab
            heapq.heappop(self._order)


class SlabPool:
    """`capacity_bytes // slab_bytes` slabs, numbered from 0."""

    def __init__(self, capacity_bytes: int, slab_bytes: int) -> None:
        self.slab_bytes = slab_bytes
        self.slab_count = capacity_bytes // slab_bytes
        self._unused = list(range(self.slab_count))[::-1]
        self._slabs: dict[int, _Slab] = {}
        self._open: dict[SlotClass, _Open] = defaultdict(_Open)
        self._owned: Counter[str] = Counter()  # slabs in use
        self._wrote: dict[int, str] = {}  # whose bytes are in a slab that is unused
        self._foreign: set[int] = set()  # slabs in use that hold another owner's bytes
        self._withdrawn: set[int] = set()  # slabs that take nothing new; what they hold stays
        self._fences: dict[int, set[int]] = {}  # slab -> who may still look at it
        self.used_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        """Bytes that slots can take: whole slabs only, less those withdrawn."""
        return self.slab_count * self.slab_bytes - self.withdrawn_bytes

    @property
    def withdrawn_bytes(self) -> int:
        """Bytes of slabs that the device could not make; one that still holds something is not counted."""
        return sum(number not in self._slabs for number in self._withdrawn) * self.slab_bytes

    @property
    def fragmented_bytes(self) -> int:
        """Free bytes that only one class can use, because a slab in use serves only its own."""
        return len(self._slabs) * self.slab_bytes - self.used_bytes

    def per_slab(self, kind: SlotClass) -> int:
        """Slots of this class in one slab; 0 when the slot is larger than a slab."""
        return self.slab_bytes // kind.slot_bytes

    def largest(self, kind: SlotClass) -> int:
        """Slots of this class if it had the whole pool."""
        return self.per_slab(kind) * (self.capacity_bytes // self.slab_bytes)

    def allocate(self, kind: SlotClass) -> Slot | None:
        """A free slot, or None: of the fullest open slab, so that others empty, else of one its owner used last."""
        if self._open[kind].free:
            number = self._open[kind].fullest()
        elif self._unused and self.per_slab(kind):
            number = next((n for n in reversed(self._unused) if self._wrote.get(n) == kind.owner), self._unused[-1])
            self._dedicate(number, kind)
        else:
            return None
        slab = self._slabs[number]
        index = slab.free.pop()
        self._open[kind].set(number, len(slab.free))
        self.used_bytes += kind.slot_bytes
        return Slot(number, index * kind.slot_bytes, kind.slot_bytes)

    def claim(self, kind: SlotClass, slot: Slot) -> None:
        """Mark a given slot as used (restart: the catalog says where extents lie)."""
        if slot.slab not in self._slabs:
            assert slot.slab in self._unused, f"segment {slot.slab} is outside the pool"
            self._dedicate(slot.slab, kind)
        slab = self._slabs[slot.slab]
        assert slab.kind == kind, f"segment {slot.slab} serves {slab.kind}, not {kind}"
        slab.free.remove(slot.offset // kind.slot_bytes)
        if slot.slab in self._open[kind].free:
            self._open[kind].set(slot.slab, len(slab.free))
        self.used_bytes += kind.slot_bytes

    def _dedicate(self, number: int, kind: SlotClass) -> None:
        """Let an unused slab serve this class."""
        self._unused.remove(number)
        if self._wrote.pop(number, kind.owner) != kind.owner:
            self._foreign.add(number)
        count = self.per_slab(kind)
        self._slabs[number] = _Slab(kind, list(range(count))[::-1], count)
        self._owned[kind.owner] += 1
        self._open[kind].set(number, count)

    # Fences ------------------------------------------------------------------------------------

    def inherit(self, slabs: Iterable[int]) -> None:
        """Restart: these slabs hold bytes; in those that nothing was claimed in, bytes of nobody that we know."""
        for number in slabs:
            if number not in self._slabs:
                self._wrote[number] = NOBODY

    def fence(self, slab: int, holder: int) -> None:
        """Hand out no slot of the slab before `lift(holder)`, those that are freed in it meanwhile included."""
        assert 0 <= slab < self.slab_count, slab
        self._fences.setdefault(slab, set()).add(holder)
        found = self._slabs.get(slab)
        if found is not None:
            self._open[found.kind].set(slab, 0)
        elif slab in self._unused:
            self._unused.remove(slab)

    def lift(self, holder: int) -> None:
        """The holder looks at nothing any more."""
        for slab in [slab for slab, holders in self._fences.items() if holder in holders]:
            self._fences[slab].discard(holder)
            if self._fences[slab]:
                continue
            del self._fences[slab]
            if slab in self._withdrawn:
                continue
            found = self._slabs.get(slab)
            if found is None:
                self._unused.append(slab)
            else:
                self._open[found.kind].set(slab, len(found.free))

    def is_fenced(self, slab: int) -> bool:
        """Whether what is freed in it is of no use for now."""
        return slab in self._fences

    @property
    def fenced_bytes(self) -> int:
        """Bytes in fenced slabs that would be free without the fences."""
        used = (self._slabs[n] for n in self._fences if n in self._slabs)
        return len(self._fences) * self.slab_bytes - sum((s.slots - len(s.free)) * s.kind.slot_bytes for s in used)

    def fits_in(self, kind: SlotClass, slot: Slot) -> bool:
        """Whether `slot` could be claimed for this class."""
        if slot.size_bytes != kind.slot_bytes or slot.offset % kind.slot_bytes:
            return False
        index = slot.offset // kind.slot_bytes
        slab = self._slabs.get(slot.slab)
        if slab is None:
            return slot.slab in self._unused and index < self.per_slab(kind)
        return slab.kind == kind and index in slab.free

    def must_retire(self, slot: Slot) -> bool:
        """Whether the slab holds another owner's bytes, so that its memory has to go before use. True once."""
        if slot.slab not in self._foreign:
            return False
        self._foreign.discard(slot.slab)
        return True

    def free(self, slot: Slot) -> None:
        """Give a slot back."""
        slab = self._slabs[slot.slab]
        index = slot.offset // slab.kind.slot_bytes
        assert index not in slab.free, f"{slot} is freed twice"
        slab.free.append(index)
        self.used_bytes -= slab.kind.slot_bytes
        is_fenced = slot.slab in self._fences
        if len(slab.free) < slab.slots:
            if not is_fenced and slot.slab not in self._withdrawn:
                self._open[slab.kind].set(slot.slab, len(slab.free))
            return
        del self._slabs[slot.slab]
        self._owned[slab.kind.owner] -= 1
        self._open[slab.kind].set(slot.slab, 0)
        if slot.slab in self._withdrawn:
            return
        self._wrote[slot.slab] = slab.kind.owner
        if not is_fenced:
            self._unused.append(slot.slab)

    def in_use(self) -> set[int]:
        """Slabs that something lies in, and those that are fenced."""
        return {*self._slabs, *self._fences}

    def withdraw(self, slab: int) -> None:
        """The device has no room for this slab: let it take nothing new, nor any that was never used, until `offer`."""
        self._withdrawn |= {slab, *(number for number in self._unused if number not in self._wrote)}
        self._unused = [number for number in self._unused if number not in self._withdrawn]
        for slabs in self._open.values():
            slabs.set(slab, 0)

    def offer(self) -> None:
        """Try the withdrawn slabs again."""
        for number in sorted(self._withdrawn - self._fences.keys()):
            slab = self._slabs.get(number)
            if slab is None:
                self._unused.insert(0, number)  # tried after those that are known to exist
            else:
                self._open[slab.kind].set(number, len(slab.free))
        self._withdrawn.clear()

    def owner(self, slab: int) -> str | None:
        """Whose slots the slab serves now; None when unused."""
        found = self._slabs.get(slab)
        return found.kind.owner if found else None

    def used_slots(self, slab: int) -> int:
        """Slots in use in a slab."""
        found = self._slabs.get(slab)
        return found.slots - len(found.free) if found else 0

    def slabs_of(self, owner: str) -> int:
        """Slabs in use that serve this owner."""
        return self._owned[owner]

    def is_open(self, kind: SlotClass) -> bool:
        """Whether a slab in use has a free slot of this class."""
        return bool(self._open[kind].free)

    def could_hold(self, wanted: Mapping[SlotClass, int]) -> bool:
        """Whether these slots would fit if the whole pool were free."""
        slabs = 0
        for kind, count in wanted.items():
            per_slab = self.per_slab(kind)
            if not per_slab:
                return False
            slabs += -(-count // per_slab)
        return slabs * self.slab_bytes <= self.capacity_bytes

    def fits(
        self, wanted: Mapping[SlotClass, int], freeing: Iterable[Slot] = (), slabs_most: int | None = None
    ) -> bool:
        """Whether the wanted slots could all be allocated once the slots in `freeing` are free.

        `slabs_most` bounds the slabs that their one owner has then; None: no bound.
        """
        return self.fits_without(wanted, Counter(slot.slab for slot in freeing), slabs_most)

    def fits_without(
        self, wanted: Mapping[SlotClass, int], freed: Mapping[int, int], slabs_most: int | None = None
    ) -> bool:
        """The same once so many slots are free in these slabs; looks at no others."""
        empty = len(self._unused)
        spare = {kind: self._open[kind].total for kind in wanted}
        owned = {kind.owner: self._owned[kind.owner] for kind in wanted}
        for number, count in freed.items():
            if number in self._withdrawn or number in self._fences:
                continue
            slab = self._slabs[number]
            is_empty = len(slab.free) + count == slab.slots
            empty += is_empty
            if slab.kind in spare:
                spare[slab.kind] += -len(slab.free) if is_empty else count
            if slab.kind.owner in owned:
                owned[slab.kind.owner] -= is_empty
        for kind, count in wanted.items():
            missing = max(0, count - spare[kind])
            if missing:
                per_slab = self.per_slab(kind)
                if not per_slab:
                    return False
                empty -= -(-missing // per_slab)
                owned[kind.owner] += -(-missing // per_slab)
        return empty >= 0 and (slabs_most is None or all(count <= slabs_most for count in owned.values()))


class RowPool:
    """Token rows 0..rows of a rank's arena, handed out as contiguous ranges, first fit."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._free: list[tuple[int, int]] = [(0, rows)] if rows else []

    @property
    def used_rows(self) -> int:
        """Rows handed out."""
        return self.rows - sum(stop - start for start, stop in self._free)

    def copy(self) -> RowPool:
        """An independent pool in the same state, to try things on."""
        twin = RowPool(0)
        twin.rows = self.rows
        twin._free = list(self._free)
        return twin

    def allocate(self, count: int) -> int | None:
        """The first row of a free range of `count` rows, or None. Zero rows always fit, at row 0."""
        if count == 0:
            return 0
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= count:
                self._free[index] = (start + count, stop)
                if start + count == stop:
                    del self._free[index]
                return start
        return None

    def claim(self, start: int, count: int) -> bool:
        """Take exactly these rows, if they are free."""
        if count == 0:
            return True
        for index, (low, high) in enumerate(self._free):
            if low <= start and start + count <= high:
                pieces = [(low, start), (start + count, high)]
                self._free[index : index + 1] = [piece for piece in pieces if piece[0] < piece[1]]
                return True
        return False

    def free(self, start: int, count: int) -> None:
        """Give rows back; neighbours merge."""
        if count == 0:
            return
        stop = start + count
        assert 0 <= start < stop <= self.rows, f"rows [{start}, {stop}) are outside the arena"
        merged = [(start, stop)]
        for low, high in self._free:
            assert high <= start or low >= stop, f"rows [{start}, {stop}) are freed twice"
            merged.append((low, high))
        merged.sort()
        self._free = []
        for low, high in merged:
            if self._free and self._free[-1][1] == low:
                self._free[-1] = (self._free[-1][0], high)
            else:
                self._free.append((low, high))
