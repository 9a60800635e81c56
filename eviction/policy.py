"""What a policy is, and which there are.

A policy is a pure function of one candidate and the time. Memory of the past lives in History and
reaches it through the candidate, so the same policy decides in the daemon and in a simulation. To
add one: a class with `name`, `score` and `explain` in a file of its own, a line in POLICIES, and a
subclass of the contract tests.
"""

from __future__ import annotations

from typing import Final, Protocol

from .candidate import Candidate
from .lru import Lru
from .popularity import Popularity


class Policy(Protocol):
    """Ranks candidates: the lowest score leaves first. Pure, deterministic, never raises."""

    @property
    def name(self) -> str:
        """What configuration calls it."""
        ...

    def score(self, candidate: Candidate, now_ns: int) -> float:
        """How much it is worth keeping; finite. Comparable within one policy and one `now_ns`."""
        ...

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """Parts of the score by name, with "score" among them."""
        ...


POLICIES: Final[dict[str, Policy]] = {rule.name: rule for rule in (Lru(), Popularity())}
