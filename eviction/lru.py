"""LRU: what was used longest ago leaves first. The order everybody knows, and the baseline."""

from __future__ import annotations

from typing import Final

from .candidate import Candidate


class Lru:
    """Score is minus the idle time, so the longest idle is the lowest."""

    name: Final = "lru"

    def score(self, candidate: Candidate, now_ns: int) -> float:
        """Minus nanoseconds since the last access; positive when that lies in the future.

        The difference is taken in integers: nanoseconds since the epoch do not fit a float.
        """
        return float(candidate.last_access_ns - now_ns)

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """The score and its only part, the age in seconds."""
        age_ns = now_ns - candidate.last_access_ns
        return {"age_seconds": age_ns / 1e9, "score": self.score(candidate, now_ns)}
