"""Precedence: whose copies leave before those of others, whatever their scores, and whose must not leave at all now.

The one place where quotas and soft pins speak to eviction: `rank_of` gives Candidate.rank, `permit` goes to `choose`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..eviction.candidate import Candidate
from ..eviction.victims import anybody
from .residency import Placement
from .state import ExtentRecord, State

HINTED: Final = 2  # above the normal 0


class Precedence:
    """Reads state."""

    def __init__(self, state: State) -> None:
        self.state = state

    def rank_of(self, record: ExtentRecord, placement: Placement) -> int:
        """Lower ranks leave first: those of announced documents behind all others."""
        return HINTED if self.state.is_hinted(record.documents, placement.tier, placement.device) else 0

    def permit(self, device: str) -> Callable[[Candidate], bool]:
        """For one decision: asked of each candidate of that device as it is about to be chosen."""
        return anybody
