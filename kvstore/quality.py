"""Quality: how good evictions were, as what followed shows. Only what the policy chose counts.

A copy that left is remembered as a ghost for a while. If its extent is used before the ghost is forgotten, that was
regretted: the price of bringing it back, as predicted when it left, is regret. Told by verdicts and uses.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from .extent import ExtentId
from .residency import Placement, Tier

CHOSEN: Final = frozenset({"pressure", "prefetch", "watermark"})  # by the policy; the rest was asked for
BOUNDS_SECONDS: Final = (1.0, 10.0, 60.0, 600.0, 3600.0, 21_600.0, 86_400.0)
NS: Final = 1_000_000_000


@dataclass(slots=True)
class Durations:
    """A histogram: `counts[i]` are at most BOUNDS_SECONDS[i] and more than the bound before; the last is the rest."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_SECONDS) + 1))
    sum_ns: int = 0

    def add(self, duration_ns: int) -> None:
        """One more."""
        self.counts[bisect_left(BOUNDS_SECONDS, duration_ns / NS)] += 1
        self.sum_ns += duration_ns

    @property
    def mean_seconds(self) -> float | None:
        """None where there were none."""
        count = sum(self.counts)
        return self.sum_ns / NS / count if count else None


@dataclass(slots=True)
class TierQuality:
    """Of one kind of memory. `unfetched` of the `evicted` copies came and were never used.

    `idle` is how long those evicted had not been used (or had been there), `gap` from an eviction to the next use of
    the same extent: `returned` of them so far.
    """

    evicted: int = 0
    unfetched: int = 0
    returned: int = 0
    regret_ns: int = 0
    idle: Durations = field(default_factory=Durations)
    gap: Durations = field(default_factory=Durations)


class Ghost(NamedTuple):
    """When it left, and what bringing it back would have cost then."""

    left_ns: int
    restore_ns: int


class Copies(Protocol):
    """An extent's, outside HBM."""

    @property
    def ddr(self) -> Placement | None: ...

    @property
    def nvme(self) -> Placement | None: ...


class Quality:
    """By tier. At most `ghosts` copies are remembered, a third of them in each."""

    def __init__(self, ghosts: int) -> None:
        self.tiers = {tier: TierQuality() for tier in Tier}
        self._limit = max(1, ghosts // len(Tier))
        self._ghosts: dict[Tier, OrderedDict[ExtentId, Ghost]] = {tier: OrderedDict() for tier in Tier}

    def evicted(self, copy: Placement, reason: str, restore_ns: int, now_ns: int) -> None:
        """A verdict: this copy leaves. `reason` is one of CHOSEN, with a comma and more behind it or without."""
        ghosts = self._ghosts[copy.tier]
        if reason.partition(",")[0] not in CHOSEN:
            ghosts.pop(copy.extent, None)
            return
        quality = self.tiers[copy.tier]
        quality.evicted += 1
        quality.unfetched += copy.used_ns is None
        quality.idle.add(now_ns - (copy.came_ns if copy.used_ns is None else copy.used_ns))
        ghosts[copy.extent] = Ghost(now_ns, restore_ns)
        ghosts.move_to_end(copy.extent)
        if len(ghosts) > self._limit:
            ghosts.popitem(last=False)

    def used(
        self,
        chain: Sequence[ExtentId],
        records: Mapping[ExtentId, Copies],
        in_hbm: Sequence[Mapping[ExtentId, Placement]],
        now_ns: int,
    ) -> None:
        """A chain is used, by these copies of its extents: those there are before missing ones come.

        NVMe's is used where DDR has none: else nobody reads it.
        """
        for extent in chain:
            record = records.get(extent)
            copy = None if record is None else record.ddr or record.nvme
            if copy is not None:
                copy.used_ns = now_ns
        for copies in in_hbm:
            for extent in chain:
                if extent in copies:
                    copies[extent].used_ns = now_ns
        for tier, ghosts in self._ghosts.items():
            for extent in [extent for extent in chain if extent in ghosts] if ghosts else ():
                here = _copy(tier, records.get(extent), in_hbm, extent)
                self._returned(tier, ghosts.pop(extent), here, now_ns)

    def _returned(self, tier: Tier, ghost: Ghost, here: Placement | None, now_ns: int) -> None:
        if here is not None and here.came_ns <= ghost.left_ns:
            return  # the same copy is there still: it was called back before it had left
        quality = self.tiers[tier]
        quality.returned += 1
        quality.regret_ns += ghost.restore_ns
        quality.gap.add(now_ns - ghost.left_ns)


def _copy(
    tier: Tier, record: Copies | None, in_hbm: Sequence[Mapping[ExtentId, Placement]], extent: ExtentId
) -> Placement | None:
    if tier is Tier.HBM:
        return next((copies[extent] for copies in in_hbm if extent in copies), None)
    return None if record is None else record.ddr if tier is Tier.DDR else record.nvme
