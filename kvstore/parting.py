"""Parting: writes down why a copy leaves, wherever that is remembered: the log, the document's past, the quality."""

from __future__ import annotations

from .clock import Clock
from .ledger import Verdict
from .planner import Victim
from .residency import Placement, Tier
from .state import State


def part(state: State, victim: Victim, reason: str, policy: str, clock: Clock, wanted_by: str = "") -> None:
    """This copy leaves, or is about to. `wanted_by` is the document that needs the room, where one does."""
    counts = state.ledger.counts
    counts[f"evictions_{victim.tier.label}"] += 1
    counts["not_worth_writing"] += victim.unwritten != ""
    verdict = Verdict(
        wall_ns=clock.wall_ns(),
        extent=victim.extent,
        documents=victim.documents,
        start=victim.start,
        stop=victim.stop,
        tier=victim.tier.label,
        action=victim.action,
        reason=f"{reason}, {victim.unwritten}" if victim.unwritten else reason,
        size_bytes=victim.size_bytes,
        last_copy=victim.action == "drop",
        restore_ns=victim.restore_ns,
        policy=policy,
        scores=victim.scores,
        wanted_by=wanted_by,
    )
    state.ledger.verdicts.append(verdict)
    state.departures.add(verdict)
    copy = _copy(state, victim)
    if copy is not None:
        state.quality.evicted(copy, verdict.reason, verdict.restore_ns, clock.monotonic_ns())


def _copy(state: State, victim: Victim) -> Placement | None:
    if victim.shard is not None:
        shard = next((one for one in state.shards() if one.id == victim.shard), None)
        return shard.copies.get(victim.extent) if shard is not None else None
    record = state.extents.get(victim.extent)
    return None if record is None else record.ddr if victim.tier is Tier.DDR else record.nvme
