"""Features: what the hazard of a strand depends on, each a small level by which a table is looked up.

To add one: a line in MOVING, STILL or RELATIVE. Those that move while a strand is idle are looked up again whenever
they are needed; the others stand still between two uses. Relative ones are ages themselves: what counts is how far from
it the strand is now, so what is learned of one pace is known of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from .ages import BINS, age_bin
from .strands import Strand

LEVELS: Final = 16  # of every feature, used or not
HALF_SECOND_NS: Final = 500_000_000
LENGTH_TOKENS: Final = 256
UNKNOWN: Final = BINS


@dataclass(frozen=True, slots=True)
class Feature:
    """`level(strand, before)` is in 0 ... LEVELS - 1; `before` is the strand in front of it, if any."""

    name: str
    level: Callable[[Strand, Strand | None], int]
    prior: float = 0.0  # log-odds per level above the first, before anything is learned


def _octave(value: int, most: int) -> int:
    """0 for nothing, 1 for 1, 2 from 2 on, 3 from 4 on ...; at most `most`."""
    return min(most, value.bit_length()) if value > 0 else 0


def _bypass(strand: Strand, before: Strand | None) -> int:
    return 0 if before is None else _octave(before.uses - strand.parent_uses, 7)


def _session_since(strand: Strand, _before: Strand | None) -> int:
    return 0 if strand.session is None else 1 + _octave(strand.session.uses - strand.session_uses, 7)


def _part_filled(strand: Strand, before: Strand | None) -> int:
    """0: full. Part-filled: 1 until what it follows is used without it, 2 then: a fuller unit has its place."""
    if not strand.is_part_filled:
        return 0
    return 1 if before is None or before.uses == strand.parent_uses else 2


def _gap(strand: Strand, _before: Strand | None) -> int:
    return 0 if strand.gap_ns is None else 1 + _octave(strand.gap_ns // HALF_SECOND_NS, 11)


def _turn(strand: Strand, _before: Strand | None) -> int:
    """One by one up to 8, then by octaves: 9 from 9 on, 10 from 16."""
    return strand.turn if strand.turn <= 8 else min(15, 5 + strand.turn.bit_length())


def _mean_gap_ns(strand: Strand) -> int | None:
    """None while the last gap says as much."""
    return None if strand.uses <= 2 else (strand.used_ns - strand.first_ns) // (strand.uses - 1)


def _mean_gap(strand: Strand, _before: Strand | None) -> int:
    mean_ns = _mean_gap_ns(strand)
    return 0 if mean_ns is None else 1 + _octave(mean_ns // HALF_SECOND_NS, 14)


def _bin(age_ns: int | None) -> int:
    return UNKNOWN if age_ns is None else age_bin(age_ns)


MOVING: Final = (
    Feature("bypass", _bypass),  # uses of the strand before it since its own last
    Feature("session_since", _session_since),  # uses of its session since its own last
    Feature("part_filled", _part_filled),
)
STILL: Final = (
    Feature("age", lambda _strand, _before: 0),  # its bin alone
    Feature("gap", _gap),
    Feature("uses", lambda strand, _before: _octave(strand.uses, 7), prior=0.3),
    Feature("turn", _turn),
    Feature("request_length", lambda strand, _before: _octave(strand.request_tokens // LENGTH_TOKENS, 12)),
    Feature("mean_gap", _mean_gap),
    Feature("parent_uses", lambda strand, _before: _octave(strand.parent_uses, 9)),
)
RELATIVE: Final = (  # their level is a bin of age, or UNKNOWN
    Feature("age_to_gap", lambda strand, _before: _bin(strand.gap_ns)),
    Feature("age_to_mean_gap", lambda strand, _before: _bin(_mean_gap_ns(strand))),
)
FEATURES: Final = (*MOVING, *STILL)
TERMS: Final = (*FEATURES, *RELATIVE)
_MOVING_LEVELS: Final = tuple(feature.level for feature in MOVING)
_LEVELS: Final = tuple(feature.level for feature in TERMS)


def levels_at_use(strand: Strand, before: Strand | None) -> bytes:
    """A level for each of TERMS, right after a use."""
    return bytes([level(strand, before) for level in _LEVELS])


def levels_now(strand: Strand, before: Strand | None) -> bytes:
    """The same while it is idle: what stands still is in `strand.levels`."""
    return bytes([level(strand, before) for level in _MOVING_LEVELS]) + strand.levels[len(MOVING) :]
