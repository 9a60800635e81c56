"""Watermarks: when a tier is used beyond its high mark, copies leave in the background until it is at its low mark.

So an attach that comes after a burst finds room, and waits for no eviction. Who leaves is chosen as for any demand; but
what is announced or softly pinned stays, and so does what is guaranteed to tenants. Nobody waits for this, so it gives
way: it starts nothing while somebody waits for room, nor writes while attaches read. What is on its way when somebody
comes to wait for it goes on as if that demand had asked for it (`Writes.hasten`).

What keeps copies from going down and up by turns: between the marks nothing leaves; what leaves is what scores least,
and a document that passed through scores less than one that comes back, however lately it was here (test_hysteresis);
what queries wait for, or a soft pin names, does not leave for this at all; a copy on its way out stays if it is hit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .loader import Loader
from .orders import Urgency
from .planner import Victim
from .residency import Tier
from .sections import DdrConfig, NvmeConfig
from .state import ExtentRecord

STEP_BYTES: Final = 1 << 30  # a tier and tick, so that a decision stays short
REST_NS: Final = 1_000_000_000  # before another try where nothing may leave
REASON: Final = "watermark"


@dataclass(eq=False, slots=True, kw_only=True)
class Mark:
    """A tier's marks, as parts of its capacity; `relieving` from the one until the other is reached."""

    high: float
    low: float
    relieving: bool = False
    rest_until_ns: int = 0


class Watermarks:
    """Relieves DDR and NVMe, a step a tick. HBM is its engine's: rows of a shard have to lie together."""

    def __init__(self, loader: Loader, ddr: DdrConfig, nvme: NvmeConfig) -> None:
        self.loader = loader
        self.store = loader.store
        self.room = loader.room
        self.marks: Mapping[Tier, Mark] = {
            Tier.DDR: Mark(high=ddr.high_watermark, low=ddr.low_watermark),
            Tier.NVME: Mark(high=nvme.high_watermark, low=nvme.low_watermark),
        }

    @property
    def relieving(self) -> list[Tier]:
        """Tiers that are being relieved, or whose copies are being written for that."""
        writing = Tier.DDR if self.room.writes.relief else None
        return [tier for tier, mark in self.marks.items() if mark.relieving or tier is writing]

    def tick(self) -> None:
        """One step for each tier that needs it."""
        for tier, mark in self.marks.items():
            capacity_bytes = self.store.planner.tenancy.capacity_bytes(tier)
            leaving_bytes = sum(copy.size_bytes for copy in self.store.planner.tenancy.leaving(tier))
            kept_bytes = sum(self.store.records.usage.of(tier).values()) - leaving_bytes
            excess_bytes = kept_bytes - int(mark.low * capacity_bytes)
            if kept_bytes > mark.high * capacity_bytes:
                mark.relieving = True
            mark.relieving = mark.relieving and excess_bytes > 0
            if mark.relieving:  # done once enough is on its way out: what comes meanwhile waits for the high mark
                mark.relieving = self._relieve(tier, mark, min(excess_bytes, STEP_BYTES)) < excess_bytes

    def _relieve(self, tier: Tier, mark: Mark, size_bytes: int) -> int:
        """Bytes that leave from now on."""
        now_ns = self.store.clock.monotonic_ns()
        if self.room.waiting or self.room.writes.relief or now_ns < mark.rest_until_ns:
            return 0
        victims = self._victims(tier, size_bytes)
        if not victims:
            mark.rest_until_ns = now_ns + REST_NS
        counts = self.store.records.ledger.counts
        counts[f"watermark_{tier.label}"] += len(victims)
        left_bytes = sum(victim.size_bytes for victim in victims)
        counts[f"watermark_{tier.label}_bytes"] += left_bytes
        self.room.execute(victims, REASON, Urgency.RELIEF)
        return left_bytes

    def _victims(self, tier: Tier, size_bytes: int) -> Sequence[Victim]:
        """Who leaves: as many as are wanted, else a part of them, for it is all or nothing that is chosen."""
        for part in (1, 4, 16, 64):
            victims = self.store.planner.relieve(tier, max(1, size_bytes // part), self._may_leave(tier))
            if victims is not None:
                return victims
        return ()

    def _may_leave(self, tier: Tier) -> Callable[[ExtentRecord], bool]:
        """Of DDR what NVMe has, or gets while no attach reads from it: nothing is lost that nobody has asked for."""
        if tier is Tier.NVME:
            return lambda _: True
        is_read = bool(self.loader.reads.waiting)

        def may(record: ExtentRecord) -> bool:
            is_clean = record.nvme is not None and record.nvme.readable
            return is_clean or (not is_read and self.store.planner.is_written(record))

        return may
