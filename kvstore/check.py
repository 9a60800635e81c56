"""Check: one audit of a data directory on which no daemon runs, with repairs if they are wanted.

Repairing one thing may show the next (a segment whose last row went is a file too many), so it audits until nothing
that can be repaired is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .audit import Facts, audit, overlapping, readable
from .clock import Clock
from .config import Config
from .findings import Finding, ordered
from .inspector import gather, repair, with_damage

ROUNDS_MAX = 5
Progress = Callable[[int, int], None]  # hears (bytes read, bytes to read)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a check found, which of that it repaired, and what remains."""

    found: tuple[Finding, ...]
    fixed: tuple[Finding, ...]
    remaining: tuple[Finding, ...]
    documents: int
    extents: int
    read_bytes: int
    elapsed_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a check is asked: to repair what can be, to read every extent."""

    fix: bool
    data: bool


def check(config: Config, clock: Clock, wish: Wish, progress: Progress) -> Report:
    """Audit the directory, whose lock the caller holds. Raises StorageFailed, InvalidRequest without a catalog."""
    started_ns = clock.monotonic_ns()
    facts = gather(config)
    rows = readable(facts)
    rows = rows if wish.data else overlapping(rows)
    total = sum(row.slot.size_bytes for row in rows)
    read = 0

    def came(size_bytes: int) -> None:
        nonlocal read
        read += size_bytes
        progress(read, total)

    facts = with_damage(config, facts, rows, came)
    first, found, fixed = facts, audit(facts), []
    remaining = found
    for _ in range(ROUNDS_MAX if wish.fix else 0):
        done = repair(config, remaining)
        if not done:
            break
        fixed += done
        facts = _again(config, facts)
        remaining = audit(facts)
        found = [*found, *remaining]
    return Report(
        found=tuple(ordered(found)),
        fixed=tuple(ordered(fixed)),
        remaining=tuple(remaining),
        documents=len(first.documents),
        extents=len(first.extents),
        read_bytes=read,
        elapsed_ns=clock.monotonic_ns() - started_ns,
    )


def _again(config: Config, before: Facts) -> Facts:
    """The facts after a repair; what was read before holds for the rows that are left."""
    facts = gather(config)
    left = {row.extent.id for row in facts.extents}

    damage = {extent: what for extent, what in before.damage.items() if extent in left}
    return replace(facts, damage=damage, failed={e: what for e, what in before.failed.items() if e in left})
