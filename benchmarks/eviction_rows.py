"""Rows of bench-eviction, of what replays found. Pure.

A grid maps (trace, policy, capacity) to the line that `holdfast policy simulate --json` prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from curves import Axis, Curve, curves
from rich.table import Table
from rows import Row, row

OURS: Final = "popularity"
BEST: Final = "belady"
BASE: Final = "lru"  # exact: see eviction.exactly_lru
CAPACITIES: Final = ("1%", "5%", "10%", "20%")
CONV, SYN, AGENT, LONG = "conv_h1", "syn_h1", "agent_a", "long_s1"
ROUNDS: Final = {"rounds": 1.0}  # a replay is deterministic
HBM_GOALS: Final = {AGENT: 0.73, LONG: 0.85, CONV: 0.90}
SLACK: Final = 0.002

Key = tuple[str, str, str]
Grid = Mapping[Key, Mapping[str, Any]]


@dataclass(frozen=True)
class TraceFile:
    """A trace that goals are about, and in which units it is judged."""

    name: str
    file: str
    block_tokens: int


FILES: Final = (
    TraceFile(CONV, "mooncake_conversation_h1.jsonl.gz", 512),
    TraceFile(SYN, "mooncake_synthetic_h1.jsonl.gz", 512),
    TraceFile(AGENT, "agentic_a.jsonl.gz", 2048),
    TraceFile(LONG, "longdoc_synth_s1.jsonl.gz", 2048),
)


def saved(grid: Grid, trace: str, policy: str, capacity: str) -> float:
    """Share of prefill-seconds."""
    return float(grid[trace, policy, capacity]["prefill_seconds_saved"])


def gap_row(grid: Grid) -> Row:
    """Share of the gap from LRU to Belady that is closed, pooled over the six small caches."""
    gained = gap = 0.0
    raw = dict(ROUNDS)
    for trace in (CONV, AGENT, LONG):
        for capacity in CAPACITIES[:2]:
            lru, ours, best = (saved(grid, trace, policy, capacity) for policy in (BASE, OURS, BEST))
            gained, gap = gained + ours - lru, gap + best - lru
            raw |= {
                f"{trace} {capacity} {name}": each for name, each in (("lru", lru), ("ours", ours), ("belady", best))
            }
            raw[f"{trace} {capacity} share"] = (ours - lru) / max(best - lru, 1e-9)
    return row("gap_share", gained / max(gap, 1e-9), 0.45, "higher", raw)


def worst_row(grid: Grid) -> Row:
    """The least that is gained over LRU at any of the sixteen points."""
    gains = {
        f"{file.name} {capacity}": saved(grid, file.name, OURS, capacity) - saved(grid, file.name, BASE, capacity)
        for file in FILES
        for capacity in CAPACITIES
    }
    return row("worst_vs_lru", min(gains.values()), -SLACK, "higher", ROUNDS | gains)


def hindsight_row(grid: Grid, classical: Sequence[str]) -> Row:
    """At how many points we are at the best classical policy, chosen afterwards, less a hundredth of its value."""
    raw = dict(ROUNDS)
    for file in FILES:
        for capacity in CAPACITIES:
            best = max(saved(grid, file.name, policy, capacity) for policy in classical)
            raw[f"{file.name} {capacity}"] = saved(grid, file.name, OURS, capacity) / max(best, 1e-9)
    reached = sum(ratio >= 0.99 for name, ratio in raw.items() if name not in ROUNDS)
    return row("near_best_classical", float(reached), 14.0, "higher", raw)


def hbm_row(trace: str, lru: Mapping[str, Any], ours: Mapping[str, Any], best: Mapping[str, Any], held: int) -> Row:
    """Bytes to load into HBM above tiers that hold everything, over LRU's. `held`: hit tokens of an endless cache."""
    lru_tokens, our_tokens, best_tokens = (held - int(one["hit_tokens"]) for one in (lru, ours, best))
    raw = ROUNDS | {
        "belady": best_tokens / max(lru_tokens, 1),
        "lru_mtokens": lru_tokens / 1e6,
        "held_mtokens": held / 1e6,
    }
    return row(f"hbm_bytes_{trace}", our_tokens / max(lru_tokens, 1), HBM_GOALS[trace], "lower", raw)


def speed_rows(grid: Grid) -> list[Row]:
    """CPU of the default policy's replay of the agents, at the capacity where it takes most; reading is not in it."""
    here = {capacity: grid[AGENT, OURS, capacity] for capacity in CAPACITIES}
    per_block = {capacity: float(one["cpu_us_per_block"]) for capacity, one in here.items()}
    per_request = {capacity: 1e3 * one["cpu_seconds"] / one["requests"] for capacity, one in here.items()}
    p99 = {f"{capacity} p99": float(one["request_p99_ms"]) for capacity, one in here.items()}
    lru = {f"lru {capacity}": float(grid[AGENT, BASE, capacity]["cpu_us_per_block"]) for capacity in CAPACITIES}
    return [
        row("us_per_block", max(per_block.values()), 30.0, "lower", ROUNDS | per_block | lru),
        row("ms_per_request", max(per_request.values()), 2.0, "lower", ROUNDS | per_request | p99),
    ]


def daemon_rows(decisions: Mapping[str, float], memory: Mapping[str, float]) -> list[Row]:
    """What deciding takes in a daemon under pressure (CPU of its thread), and what is remembered of an extent."""
    part, whole = decisions["part_ms_p99"], decisions["whole_ms_p99"]
    return [
        row("attach_decision_ms", part, 2.0, "lower", ROUNDS | dict(decisions)),
        row("attach_whole_decision_ms", whole, 2.0, "lower", ROUNDS | dict(decisions)),
        row("bytes_per_extent", memory["bytes_per_extent"], 400.0, "lower", ROUNDS | dict(memory)),
    ]


def table(grid: Grid, policies: Sequence[str]) -> Table:
    """Share of prefill-seconds saved: a line a policy, a column a trace and capacity."""
    made = Table(title="Share of prefill-seconds saved")
    made.add_column("policy")
    for file in FILES:
        for capacity in CAPACITIES:
            made.add_column(f"{file.name}\n{capacity}", justify="right")
    for policy in policies:
        cells = [f"{saved(grid, file.name, policy, capacity):.4f}" for file in FILES for capacity in CAPACITIES]
        made.add_row(policy, *cells)
    return made


def pictures(grid: Grid, policies: Sequence[str]) -> dict[str, str]:
    """One a trace: saved against capacity; what knows the future is dashed."""
    drawn = {}
    for file in FILES:
        lines = []
        for policy in policies:
            points = tuple(
                (float(capacity.rstrip("%")), saved(grid, file.name, policy, capacity)) for capacity in CAPACITIES
            )
            lines.append(Curve(policy, points, dashed=policy == BEST))
        highest = max(y for line in lines for _, y in line.points)
        across = Axis("capacity, % of the trace's different blocks", ticks=(1, 2, 5, 10, 20))
        up = Axis("share of prefill-seconds saved", ticks=ticks(highest), linear=True)
        drawn[file.name] = curves(lines, f"{file.name}, {file.block_tokens:,}-token blocks", across, up)
    return drawn


def ticks(highest: float) -> tuple[float, ...]:
    """From 0, five or so."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if highest / step <= 6 or step == 0.2)
    return tuple(round(step * number, 2) for number in range(int(highest / step) + 2))
