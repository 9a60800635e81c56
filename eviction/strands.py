"""Strands: what was used, as runs of units that every use took whole, with the statistics of each.

Ids chain (equal id = equal whole prefix), so the strands form a forest, a radix tree, and a look at two units tells
what of a strand a chain holds: finding a known chain costs per strand, not per unit. Of caches strands know only how
many copies of their units are resident anywhere. Those without any are ghosts: kept for what they teach, and bounded.

* A use that takes a part of a strand splits it. All halves keep all statistics.
* A use that goes on from the end of a strand extends it in place, if nothing followed it and the last use ended there.
* The part-filled last unit of a chain is a strand of its own: when the chain grows, a fuller unit takes its place.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

import numpy as np

from .ages import NEVER_NS
from .use import UnitId, Use

GHOSTS_MIN: Final = 16_384  # strands: so many ghosts are remembered whatever is resident ...
GHOSTS_PER_RESIDENT: Final = 8
GHOST_UNITS_MIN: Final = 65_536  # ... if they do not have more units than this
GHOST_UNITS_PER_RESIDENT: Final = 2
DROPPED_SHARE: Final = 0.1  # of the ghosts, at a time: so it is seldom done
CONTINUES_TOKENS: Final = 1_024  # a turn has more than this in common with the one before ...
CONTINUES_WITHIN_TOKENS: Final = 2_048  # ... which had ended at most this far behind it


@dataclass(slots=True, eq=False, weakref_slot=True)
class Session:
    """How often a conversation or a document was used. It lives as long as a strand names it."""

    uses: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Strand:
    """A run of units and what is known of its uses."""

    units: list[UnitId]
    previous: UnitId | None  # unit before the first
    is_part_filled: bool = False
    is_followed: bool = False  # something has followed it, or does
    resident_count: int = 0  # copies of its units, in all caches

    used_ns: int  # last use, or when its user let go
    first_ns: int
    uses: int = 0
    gap_ns: int | None = None  # between the last two uses
    turn: int = 1
    request_tokens: int = 0  # of the last chain through it
    behind_tokens: int = 0  # from its end to the end of that chain
    parent_uses: int = 0  # of the strand before it, at the last use
    session: Session | None = None
    session_uses: int = 0  # at the last use

    # The learner's: which bin of age it has entered, and the features as they were then.
    slot: int = -1
    age_bin: int = 0
    levels: bytes = b""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a chain, from `start` to `stop`, that lies in one strand from its unit `offset` on, or in none."""

    strand: Strand | None
    start: int
    stop: int
    offset: int = 0


class Strands:
    """All of them, by unit and by slot. `use`, `release`, `came`, `left` and `forget` change them."""

    def __init__(self) -> None:
        self.by_slot: list[Strand | None] = []
        self.look_ns = np.zeros(1_024, np.int64)  # by slot: when the learner wants to see it; new ones at once
        self._free: list[int] = []
        self._by_unit: dict[UnitId, Strand] = {}
        self._copies: dict[UnitId, int] = {}  # resident ones
        self._unnamed: dict[UnitId, int] = {}  # resident, and no use has named them: when they came
        self._sessions: WeakValueDictionary[UnitId, Session] = WeakValueDictionary()
        self._resident_strands = 0

    def __len__(self) -> int:
        return len(self.by_slot) - len(self._free)

    def of(self, unit: UnitId) -> Strand | None:
        """Where a unit is; None when no use named it, or that was forgotten."""
        return self._by_unit.get(unit)

    def before(self, strand: Strand) -> Strand | None:
        """The strand that this one follows, as far as known."""
        return None if strand.previous is None else self._by_unit.get(strand.previous)

    def came_ns(self, unit: UnitId) -> int | None:
        """When a resident unit came that no use has named."""
        return self._unnamed.get(unit)

    def find(self, chain: Sequence[UnitId]) -> list[Piece]:
        """The pieces of a chain in order; changes nothing.

        What is known of a chain is usually a front. But a chain may be told from the middle, and a front be forgotten.
        """
        pieces: list[Piece] = []
        start, stop = 0, 0
        while start < len(chain):
            strand = self._by_unit.get(chain[start])
            offset = 0
            if strand is None:
                stop = start + 1
                while stop < len(chain) and chain[stop] not in self._by_unit:
                    stop += 1
            else:
                offset = 0 if strand.units[0] == chain[start] else strand.units.index(chain[start])
                stop = start + min(len(strand.units) - offset, len(chain) - start)
                if self._by_unit.get(chain[stop - 1]) is not strand:
                    stop = self._leaves(strand, chain, start, stop)
            pieces.append(Piece(strand, start, stop, offset))
            start = stop
        return pieces

    def _leaves(self, strand: Strand, chain: Sequence[UnitId], start: int, stop: int) -> int:
        """Where a chain that is in a strand at `start` is not at `stop - 1`."""
        return bisect_left(
            range(stop), 1, lo=start + 1, key=lambda index: int(self._by_unit.get(chain[index]) is not strand)
        )

    def use(self, use: Use, pieces: Sequence[Piece]) -> list[Strand]:
        """Count a use of a chain that was found in these pieces: its strands, split and new as that made them."""
        ends: list[tuple[Strand, int]] = []  # and where each stops in the chain
        body: Strand | None = None  # the last known that is full
        turn, gap_ns = 1, None
        full_units = use.token_count // use.unit_tokens
        for piece in pieces:
            if piece.strand is not None:
                strand = self._cut(piece, use.unit_tokens)
                if piece.start and strand.previous is None:
                    strand.previous = use.chain[piece.start - 1]  # it had been told from here on
                ends.append((strand, piece.stop))
                if not strand.is_part_filled:
                    body = strand
                    is_turn = piece.stop * use.unit_tokens > CONTINUES_TOKENS
                    is_turn = is_turn and strand.behind_tokens <= CONTINUES_WITHIN_TOKENS
                    turn, gap_ns = (strand.turn + 1, use.now_ns - strand.used_ns) if is_turn else (1, None)
                continue
            start, full_stop = piece.start, max(piece.start, min(piece.stop, full_units))
            is_extended = body is not None and not body.is_followed and body.behind_tokens < use.unit_tokens
            if body is not None and is_extended and start < full_stop and ends[-1] == (body, start):
                self._name(body, use.chain[start:full_stop])
                ends[-1] = (body, full_stop)
                start = full_stop
            for part_start, part_stop in ((start, full_stop), (full_stop, piece.stop)):
                if part_start < part_stop:
                    strand = self._new(use, part_start, part_stop)
                    strand.turn, strand.gap_ns = turn, gap_ns
                    ends.append((strand, part_stop))
        if body is not None and turn > 1:
            body.turn = turn
        for follower, _ in ends[1:]:
            before = self.before(follower)
            assert before is not None, follower.previous
            before.is_followed = True
        self._count(use, ends)
        return [strand for strand, _ in ends]

    def _new(self, use: Use, start: int, stop: int) -> Strand:
        strand = Strand(
            units=[],
            previous=use.chain[start - 1] if start else None,
            is_part_filled=stop * use.unit_tokens > use.token_count,
            used_ns=use.now_ns,
            first_ns=use.now_ns,
        )
        self._add(strand)
        self._name(strand, use.chain[start:stop])
        return strand

    def _count(self, use: Use, ends: Sequence[tuple[Strand, int]]) -> None:
        session: Session | None = None
        if use.session is not None:
            session = self._sessions.get(use.session)
            if session is None:
                session = self._sessions[use.session] = Session()
            session.uses += 1
        for strand, stop in ends:
            if strand.uses:
                strand.gap_ns = use.now_ns - strand.used_ns
            strand.uses += 1
            strand.used_ns = use.now_ns
            strand.request_tokens = use.token_count
            strand.behind_tokens = max(0, use.token_count - stop * use.unit_tokens)
            before = self.before(strand)
            strand.parent_uses = 0 if before is None else before.uses
            strand.session = session
            strand.session_uses = 0 if session is None else session.uses

    def release(self, chain: Sequence[UnitId], now_ns: int) -> list[Strand]:
        """The user of a chain is done: its strands are idle from now on. No use is counted."""
        strands = [piece.strand for piece in self.find(chain) if piece.strand is not None]
        for strand in strands:
            strand.used_ns = now_ns
        return strands

    def came(self, unit: UnitId, now_ns: int) -> None:
        """One more copy of a unit is resident."""
        self._copies[unit] = self._copies.get(unit, 0) + 1
        strand = self._by_unit.get(unit)
        if strand is None:
            self._unnamed.setdefault(unit, now_ns)
            return
        strand.resident_count += 1
        self._resident_strands += strand.resident_count == 1

    def left(self, unit: UnitId) -> None:
        """One copy of a unit less."""
        copies = self._copies.pop(unit) - 1
        if copies:
            self._copies[unit] = copies
        else:
            self._unnamed.pop(unit, None)
        strand = self._by_unit.get(unit)
        if strand is not None:
            strand.resident_count -= 1
            self._resident_strands -= strand.resident_count == 0

    def forget(self) -> None:
        """Drop the ghosts used longest ago, leaf-first, when there are more strands or more units than the bounds."""
        strands = max(GHOSTS_MIN, GHOSTS_PER_RESIDENT * self._resident_strands) + self._resident_strands
        units = max(GHOST_UNITS_MIN, GHOST_UNITS_PER_RESIDENT * len(self._copies)) + len(self._copies)
        if len(self) <= strands and len(self._by_unit) <= units:
            return
        known = [strand for strand in self.by_slot if strand is not None]
        followers = Counter(before.slot for before in map(self.before, known) if before is not None)
        leaves = [
            (strand.used_ns, strand.slot, strand)
            for strand in known
            if not strand.resident_count and not followers[strand.slot]
        ]
        heapq.heapify(leaves)
        kept_share = 1 - DROPPED_SHARE
        while leaves and (len(self) > kept_share * strands or len(self._by_unit) > kept_share * units):
            *_, strand = heapq.heappop(leaves)
            before = self.before(strand)
            self._drop(strand)
            if before is None:
                continue
            followers[before.slot] -= 1
            if not before.resident_count and not followers[before.slot]:
                heapq.heappush(leaves, (before.used_ns, before.slot, before))

    def _drop(self, strand: Strand) -> None:
        for unit in strand.units:
            del self._by_unit[unit]
        self.by_slot[strand.slot] = None
        self.look_ns[strand.slot] = NEVER_NS
        self._free.append(strand.slot)

    def _add(self, strand: Strand) -> None:
        if self._free:
            strand.slot = self._free.pop()
            self.by_slot[strand.slot] = strand
        else:
            strand.slot = len(self.by_slot)
            self.by_slot.append(strand)
            if strand.slot == len(self.look_ns):
                self.look_ns = np.concatenate((self.look_ns, np.zeros_like(self.look_ns)))
        self.look_ns[strand.slot] = 0

    def _name(self, strand: Strand, units: Sequence[UnitId]) -> None:
        """Units that no strand had are the next of this one."""
        strand.units.extend(units)
        self._by_unit.update(dict.fromkeys(units, strand))
        if not self._unnamed:
            return
        came = [unit for unit in units if self._unnamed.pop(unit, None) is not None]
        if came:
            self._resident_strands += not strand.resident_count
            strand.resident_count += sum(self._copies[unit] for unit in came)

    def _cut(self, piece: Piece, unit_tokens: int) -> Strand:
        """The strand that is the piece and nothing else, split off what is before and behind."""
        strand = piece.strand
        assert strand is not None, piece
        if piece.offset:
            _, strand = self._split(strand, piece.offset, unit_tokens)
        if len(strand.units) > piece.stop - piece.start:
            strand, _ = self._split(strand, piece.stop - piece.start, unit_tokens)
        return strand

    def _split(self, strand: Strand, count: int, unit_tokens: int) -> tuple[Strand, Strand]:
        """Two strands: the first `count` units, and the others. The smaller half becomes the new one."""
        front_units, back_units = strand.units[:count], strand.units[count:]
        twin = copy(strand)
        self._add(twin)
        front, back = (twin, strand) if len(front_units) < len(back_units) else (strand, twin)
        front.units, back.units = front_units, back_units
        front.is_followed = True
        front.behind_tokens += len(back_units) * unit_tokens
        back.previous, back.parent_uses = front_units[-1], front.uses
        self._by_unit.update(dict.fromkeys(twin.units, twin))
        if strand.resident_count:
            twin.resident_count = sum(self._copies.get(unit, 0) for unit in twin.units)
            strand.resident_count -= twin.resident_count
            self._resident_strands += bool(twin.resident_count) and bool(strand.resident_count)
        return front, back
