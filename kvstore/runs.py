"""Runs: where extents lie in shared memory, as messages say it: one by one, or as runs of consecutive slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

import msgspec

from .extent import Extent
from .slots import Slot


class PartMessage(msgspec.Struct, frozen=True, array_like=True):
    """An extent in DDR: slot (in the slab's memory number `serial`), first token, tokens, layer group."""

    slab: int
    offset: int
    size_bytes: int
    serial: int
    start: int
    valid_tokens: int
    group: int = 0

    @property
    def slot(self) -> Slot:
        """Where it lies."""
        return Slot(self.slab, self.offset, self.size_bytes)


class RunMessage(msgspec.Struct, frozen=True, array_like=True):
    """Extents of one layer group that follow each other in the document, and in a slab of memory number `serial`.

    `count` slots of `slot_bytes` begin at `offset` and hold tokens [start, stop), `step` in each; the last perhaps
    fewer.
    """

    slab: int
    serial: int
    offset: int
    slot_bytes: int
    count: int
    start: int
    stop: int
    step: int
    group: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all its slots."""
        return self.count * self.slot_bytes

    def part(self, index: int) -> PartMessage:
        """One of its extents."""
        start = self.start + index * self.step
        offset = self.offset + index * self.slot_bytes
        valid_tokens = min(self.step, self.stop - start)
        return PartMessage(self.slab, offset, self.slot_bytes, self.serial, start, valid_tokens, self.group)

    def singles(self) -> Iterator[RunMessage]:
        """Its extents as runs of one."""
        for part in map(self.part, range(self.count)):
            stop = part.start + part.valid_tokens
            yield RunMessage(
                part.slab, part.serial, part.offset, part.size_bytes, 1, part.start, stop, self.step, part.group
            )


class Parts(Sequence[PartMessage]):
    """The extents of some runs, each made when it is looked at: a document may have thousands."""

    def __init__(self, runs: Sequence[RunMessage]) -> None:
        self._runs = runs

    def __len__(self) -> int:
        return sum(run.count for run in self._runs)

    @overload
    def __getitem__(self, index: int) -> PartMessage: ...

    @overload
    def __getitem__(self, index: slice) -> list[PartMessage]: ...

    def __getitem__(self, index: int | slice) -> PartMessage | list[PartMessage]:
        if isinstance(index, slice):
            return list(self)[index]
        left = range(len(self))[index]  # raises IndexError
        for run in self._runs:
            if left < run.count:
                return run.part(left)
            left -= run.count
        raise AssertionError(index)

    def __iter__(self) -> Iterator[PartMessage]:
        return (run.part(index) for run in self._runs for index in range(run.count))


def in_runs(
    extents: Iterable[tuple[Extent, Slot]], extent_tokens: int, serial: Callable[[int], int]
) -> list[RunMessage]:
    """These extents, which are in document order, as few runs; `serial(slab)` names the slab's present memory."""
    runs: list[RunMessage] = []
    first: Extent | None = None
    begin = Slot(0, 0, 0)
    count = stop = 0
    for extent, slot in extents:
        if (
            first is not None
            and slot.slab == begin.slab
            and slot.offset == begin.offset + count * begin.size_bytes
            and slot.size_bytes == begin.size_bytes
            and extent.start == stop
            and extent.group == first.group
        ):
            count += 1
        else:
            if first is not None:
                runs.append(_run(first, begin, count, stop, extent_tokens, serial))
            first, begin, count = extent, slot, 1
        stop = extent.start + extent.valid_tokens
    if first is not None:
        runs.append(_run(first, begin, count, stop, extent_tokens, serial))
    return runs


def _run(first: Extent, begin: Slot, count: int, stop: int, step: int, serial: Callable[[int], int]) -> RunMessage:
    return RunMessage(
        begin.slab, serial(begin.slab), begin.offset, begin.size_bytes, count, first.start, stop, step, first.group
    )
