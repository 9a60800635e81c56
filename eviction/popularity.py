"""Popularity: the best rate at which a unit can still save time, per byte it takes.

    score = index x restore_ns / size_bytes

`index` is the Gittins index (`gittins`) of the strand the unit is in, from its hazards of use by age (`hazard`), which
are learned online from all that was used, resident or ghost (`strands`, `learner`). `restore_ns` is what its cache
would pay to have the unit back: every tier has its own. One memory serves all caches.

* Cost multiplies the chance of reuse and never replaces it: policies that rank by cost alone lose to LRU on agents.
* Scan resistant: what was used once scores by how often such things came back.
* It forgets: a session that has ended soon reaches ages at which sessions do not go on.

What no use has named (after a restart) counts as used once, when it came; before the first use nobody tells the time,
so what came before counts as used at the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from .ages import age_bin
from .candidate import Candidate
from .features import TERMS, levels_at_use, levels_now
from .gittins import indices, reuse_probability, spans_seconds
from .guard import Guard
from .hazard import cells
from .learner import Learner
from .strands import Strand, Strands
from .use import UnitId, Use

USES_PER_FORGETTING: Final = 128
HORIZON_SECONDS: Final = 600.0  # of the reuse probability that is explained; the score has no horizon


class Popularity:
    """Learns, for all caches, who comes back when. Holds strands of residents, and a bounded number of ghosts."""

    name: Final = "popularity"

    def __init__(self) -> None:
        self.strands = Strands()
        self._learner = Learner(self.strands)
        self._uses = 0
        self._now_ns = 0
        self._first_ns: int | None = None  # since when anything is known
        self._indices: dict[Strand | UnitId, float] = {}  # at one time, of what was asked for
        self._indices_ns = 0

    def used(self, use: Use) -> None:
        """Record how long what the chain holds was idle, and count the use."""
        self._passes(use.now_ns)
        pieces = self.strands.find(use.chain)
        self._learner.saw_use([piece.strand for piece in pieces if piece.strand is not None], use.now_ns)
        self._learner.idle(self.strands.use(use, pieces))
        self._uses += 1
        if self._uses % USES_PER_FORGETTING == 0:
            self.strands.forget()

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """Age counts from here: while it was in use it was not idle."""
        self._passes(now_ns)
        self._learner.idle(self.strands.release(chain, now_ns))

    def ranking(self, capacity_bytes: int, worth: Callable[[int], float]) -> PopularityRanking:
        """All caches share this memory; what losing a unit costs is the candidate's."""
        return PopularityRanking(self)

    def came(self, unit: UnitId) -> None:
        """One more copy is resident somewhere, as of the last use."""
        self.strands.came(unit, self._now_ns)

    def indices(self, units: Sequence[UnitId], now_ns: int) -> list[float]:
        """Gittins index per second of each; computed once for all units of a strand that are asked for at one time."""
        if now_ns != self._indices_ns:
            self._indices.clear()
            self._indices_ns = now_ns
        keys = [self.strands.of(unit) or unit for unit in units]
        fresh = [key for key in dict.fromkeys(keys) if key not in self._indices]
        if fresh:
            states = [self._state(key, now_ns) for key in fresh]
            logits = self._learner.hazards.logits(cells([levels for levels, _ in states]))
            found = indices(logits, spans_seconds([age_ns for _, age_ns in states]))
            self._indices.update(zip(fresh, found.tolist(), strict=True))
        return [self._indices[key] for key in keys]

    def explain(self, unit: UnitId, now_ns: int) -> dict[str, float]:
        """What the index of a unit is made of: "logit_..." are the terms of the log-odds of a use at its age."""
        strand = self.strands.of(unit) or self._once(unit, now_ns)
        levels, age_ns = self._state(self.strands.of(unit) or unit, now_ns)
        hazards = self._learner.hazards
        parts = hazards.parts(levels, age_bin(age_ns))
        spans = spans_seconds([age_ns])
        known = {} if strand.gap_ns is None else {"gap_seconds": strand.gap_ns / 1e9}
        return {
            "age_seconds": age_ns / 1e9,
            "uses": float(strand.uses),
            **known,
            "turn": float(strand.turn),
            **{f"logit_{feature.name}": part for feature, part in zip(TERMS, parts, strict=True)},
            "reuse_probability_10_min": reuse_probability(hazards.logits(cells([levels])), spans, HORIZON_SECONDS),
            "index_per_second": self.indices([unit], now_ns)[0],
        }

    def _passes(self, now_ns: int) -> None:
        self._now_ns = now_ns
        self._indices.clear()
        if self._first_ns is None:
            self._first_ns = now_ns

    def _state(self, key: Strand | UnitId, now_ns: int) -> tuple[bytes, int]:
        """Features now, and age in nanoseconds."""
        if not isinstance(key, Strand):
            once = self._once(key, now_ns)
            return levels_at_use(once, None), max(0, now_ns - once.used_ns)
        return levels_now(key, self.strands.before(key)), max(0, now_ns - key.used_ns)

    def _once(self, unit: UnitId, now_ns: int) -> Strand:
        came_ns = self.strands.came_ns(unit)
        if came_ns is None or self._first_ns is None:
            came_ns = now_ns
        came_ns = max(came_ns, self._first_ns or 0)
        return Strand(units=[unit], previous=None, used_ns=came_ns, first_ns=came_ns, uses=1)


class PopularityRanking:
    """One cache's view: what losing a unit costs there, times its index."""

    def __init__(self, policy: Popularity) -> None:
        self._policy = policy

    def came(self, unit: UnitId, size_bytes: int) -> None:
        """No ghost, from now on."""
        self._policy.came(unit)

    def left(self, unit: UnitId) -> None:
        """A ghost, if no other cache has it."""
        self._policy.strands.left(unit)

    def scores(self, candidates: Sequence[Candidate], now_ns: int) -> Sequence[float]:
        """The best rate at which each can still save nanoseconds, per second and byte; never negative."""
        found = self._policy.indices([candidate.unit for candidate in candidates], now_ns)
        return [index * _worth(candidate) for index, candidate in zip(found, candidates, strict=True)]

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """The score and its parts: score = index_per_second x restore_ns / size_bytes."""
        parts = self._policy.explain(candidate.unit, now_ns)
        return {
            **parts,
            "restore_seconds": candidate.restore_ns / 1e9,
            "size_bytes": float(candidate.size_bytes),
            "score": parts["index_per_second"] * _worth(candidate),
        }


def _worth(candidate: Candidate) -> float:
    """Nanoseconds per byte; an empty unit takes one byte."""
    return max(0, candidate.restore_ns) / max(1, candidate.size_bytes)


def guarded() -> Guard:
    """How it is served: behind a guard."""
    return Guard(Popularity())
