"""Precedence: whose copies leave before those of others, whatever their scores, and whose must not leave at all now.

The one place where quotas and soft pins speak to eviction: `rank_of` gives Candidate.rank; `choose` asks a contest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from ..eviction.candidate import Candidate
from ..eviction.policy import Ranking
from ..eviction.residents import Forest
from ..eviction.victims import Describe, Satisfied, choose
from .claims import QUARTERS
from .clock import Clock
from .contest import Contest, Permit
from .residency import Placement
from .state import ExtentRecord, State

EXPECTED: Final = QUARTERS + 1  # behind all soft pins


class Precedence:
    """Reads state."""

    def __init__(self, state: State, clock: Clock) -> None:
        self.state = state
        self.clock = clock

    def rank_of(self, record: ExtentRecord, placement: Placement) -> int:
        """Lower ranks leave first: 0, or the quarters that the strongest soft pin on the copy has left of its life.

        Those whose queries wait, or are announced, leave behind all others.
        """
        if self.state.is_expected(record.documents, placement.tier, placement.device):
            return EXPECTED
        if not self.state.pins:
            return 0
        return self.state.pins.quarters(record.documents, placement.tier, self.clock.wall_ns())

    def choose(
        self,
        forest: Forest,
        ranking: Ranking,
        describe: Describe,
        now_ns: int,
        satisfied: Satisfied,
        contest: Contest | None,
    ) -> tuple[Candidate, ...] | None:
        """See `eviction.victims.choose`; in a contest once for each of its permits, until one will do."""
        if contest is None:
            return choose(forest, ranking, describe, now_ns, satisfied)

        def whose(candidate: Candidate) -> str:
            return self.state.extents[str(candidate.unit)].extent.tenant

        def enough(victims: Sequence[Candidate]) -> bool:
            return contest.met((whose(victim), victim.size_bytes) for victim in victims) and satisfied(victims)

        for permitted in contest.permits():
            victims = choose(forest, ranking, describe, now_ns, enough, _of_tenants(permitted, whose))
            if victims is not None:
                return victims
        return None


def _of_tenants(permit: Permit, whose: Callable[[Candidate], str]) -> Callable[[Candidate], bool]:
    return lambda candidate: permit(whose(candidate), candidate.size_bytes)
