"""Lines: where a copy stands among those that may leave its device. For people: it looks at every leaf."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..eviction.candidate import Candidate
from ..eviction.policy import Ranking


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """`ahead` of `in_line` leaves that may leave now would leave before it; it is no leaf if others of its chain would.

    Lower ranks (see precedence) leave first, whatever the scores. `scores` are the policy's parts.
    """

    scores: Mapping[str, float]
    rank: int
    ahead: int
    in_line: int
    is_leaf: bool
    is_movable: bool


class Line:
    """One device at one moment."""

    def __init__(self, ranking: Ranking, leaves: Sequence[Candidate], now_ns: int) -> None:
        self._ranking = ranking
        self._now_ns = now_ns
        self._leaves = {leaf.id for leaf in leaves}
        movable = [leaf for leaf in leaves if leaf.movable]
        scores = ranking.scores(movable, now_ns)
        self._order = sorted((leaf.rank, score, str(leaf.id)) for leaf, score in zip(movable, scores, strict=True))

    def standing(self, candidate: Candidate) -> Standing:
        """Of one of the device's copies, described as the leaves were."""
        scores = self._ranking.explain(candidate, self._now_ns)
        key = (candidate.rank, scores["score"], str(candidate.id))
        return Standing(
            scores=scores,
            rank=candidate.rank,
            ahead=bisect_left(self._order, key),
            in_line=len(self._order),
            is_leaf=candidate.id in self._leaves,
            is_movable=candidate.movable,
        )
