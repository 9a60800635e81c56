"""Recent uses: what was asked of the cache lately, in order, for those who want to record it. Bounded."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from .document import DocumentId
from .extent import ExtentId

USES_MAX: Final = 4096
EXTENTS_MAX: Final = 1 << 18  # of different documents' versions, so that ids of what was deleted do not fill memory


@dataclass(eq=False, slots=True, kw_only=True)
class RecentUse:
    """A document's front was used: its first `extent_count` extents of the first layer group, `token_count` tokens.

    `answer_tokens` is what its user reported so far; while `is_open`, more may come.
    """

    number: int
    at_ns: int
    document: DocumentId
    chain: Sequence[ExtentId]
    extent_count: int
    extent_tokens: int
    token_count: int
    answer_tokens: int = 0
    is_open: bool = False


class RecentUses:
    """The newest of them. Each has a number, one more than the one before it; `life` tells two daemons' apart."""

    def __init__(self, life: int, uses_max: int = USES_MAX, extents_max: int = EXTENTS_MAX) -> None:
        self.life = life
        self._uses_max = uses_max
        self._extents_max = extents_max
        self._uses: deque[RecentUse] = deque()
        self._sharers: Counter[int] = Counter()  # by a chain's identity
        self._extents = 0
        self.next_number = 0

    def add(
        self, at_ns: int, document: DocumentId, chain: Sequence[ExtentId], count: int, extent_tokens: int, tokens: int
    ) -> RecentUse:
        """Remember one more; the oldest are forgotten where there are too many."""
        use = RecentUse(
            number=self.next_number,
            at_ns=at_ns,
            document=document,
            chain=chain,
            extent_count=count,
            extent_tokens=extent_tokens,
            token_count=tokens,
        )
        self.next_number += 1
        self._uses.append(use)
        self._sharers[id(chain)] += 1
        if self._sharers[id(chain)] == 1:
            self._extents += len(chain)
        while len(self._uses) > self._uses_max or (self._extents > self._extents_max and len(self._uses) > 1):
            self._forget(self._uses.popleft())
        return use

    def _forget(self, use: RecentUse) -> None:
        self._sharers[id(use.chain)] -= 1
        if not self._sharers[id(use.chain)]:
            del self._sharers[id(use.chain)]
            self._extents -= len(use.chain)

    def since(self, number: int, extents_max: int) -> list[RecentUse]:
        """Those from that number on which are still known: one, and more while they name few enough extents."""
        found: list[RecentUse] = []
        first = self.next_number - len(self._uses)
        for use in islice(self._uses, max(0, number - first), None):
            extents_max -= use.extent_count
            if found and extents_max < 0:
                break
            found.append(use)
        return found
