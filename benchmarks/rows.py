"""Rows of a benchmark's report: statistics, goals, JSON, table. Pure, but for printing."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    name: str
    value: float
    goal: float
    better: str
    met: bool
    raw: dict[str, float]


def percentile(samples: Sequence[float], percent: float) -> float:
    """Nearest rank: always one of the samples."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def is_met(value: float, goal: float, better: str) -> bool:
    assert better in ("lower", "higher"), better
    return value <= goal if better == "lower" else value >= goal


def row(name: str, value: float, goal: float, better: str, raw: dict[str, float], *, also: bool = True) -> Row:
    """A row; `also`: whether the goals are met that stand only in `raw`."""
    rounded = {key: round(number, 4) for key, number in raw.items()}
    value, goal = round(value, 4), round(goal, 4)
    return Row(name, value, goal, better, is_met(value, goal, better) and also, rounded)


def ratio_row(name: str, goal: float, times: dict[str, list[float]], ours: str, bare: str, *beside: str) -> Row:
    """Median over pairs of bare / ours: the share of the limit that we reach. `times` in seconds; shown in ms.

    Where CPU times were taken, their ratio stands beside it.
    """
    ratios = _ratios(times[bare], times[ours])
    raw = {
        "ours_ms": 1e3 * statistics.median(times[ours]),
        "bare_ms": 1e3 * statistics.median(times[bare]),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "samples": float(len(ratios)),
    }
    if f"{ours}_cpu" in times:
        raw["cpu_ratio"] = statistics.median(_ratios(times[f"{bare}_cpu"], times[f"{ours}_cpu"]))
    raw |= {f"{key}_ms": 1e3 * statistics.median(times[key]) for key in beside}
    return row(name, statistics.median(ratios), goal, "higher", raw)


def over_row(name: str, goal: float, times: dict[str, list[float]], ours: str, bare: str) -> Row:
    """Ratio of medians, ours / bare: how many times as long as the bare side we take. `times` in seconds; shown in ms.

    The spread is that of pairs of one round, and of each side by itself: (slowest - fastest) / median.
    """
    ratios = _ratios(times[ours], times[bare])
    middle = {side: statistics.median(times[side]) for side in (ours, bare)}
    raw = {
        "ours_ms": 1e3 * middle[ours],
        "bare_ms": 1e3 * middle[bare],
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "cpu_ratio": statistics.median(times[f"{ours}_cpu"]) / statistics.median(times[f"{bare}_cpu"]),
        "spread_ours": (max(times[ours]) - min(times[ours])) / middle[ours],
        "spread_bare": (max(times[bare]) - min(times[bare])) / middle[bare],
        "rounds": float(len(ratios)),
    }
    return row(name, middle[ours] / middle[bare], goal, "lower", raw)


def _ratios(bare: Sequence[float], ours: Sequence[float]) -> list[float]:
    return [b / o for b, o in zip(bare, ours, strict=True)]


def report(rows: Sequence[Row], commit: str, date: str, machine: dict[str, Any]) -> dict[str, Any]:
    return {"commit": commit, "date": date, "machine": machine, "rows": [asdict(one) for one in rows]}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def show(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title)
    for heading in ("what", "value", "goal", "met", "ours", "bare", "spread of rounds"):
        table.add_column(heading, justify="left" if heading in ("what", "met") else "right")
    for one in rows:
        sign = "<=" if one.better == "lower" else ">="
        ours, bare = one.raw.get("ours_ms"), one.raw.get("bare_ms")
        table.add_row(
            one.name,
            f"{one.value:.3g}",
            f"{sign} {one.goal:.3g}",
            "[green]yes[/]" if one.met else "[red]no[/]",
            "" if ours is None else f"{ours:.4g} ms",
            "" if bare is None else f"{bare:.4g} ms",
            f"{one.raw['ratio_min']:.2f}-{one.raw['ratio_max']:.2f}" if "ratio_min" in one.raw else "",
        )
    Console(width=120).print(table)
