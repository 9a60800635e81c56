"""Eviction policies on recorded traces: what each would have saved, what the default is worth, what deciding costs.

    make bench-eviction      every policy at four capacities of four traces: about 20 minutes on two cores
    eviction.py --quick      the front of each trace and three policies: shows that every row can be measured

Replays are deterministic, so a row needs one round; CPU is that of the replaying thread. The traces are the developer
halves, in ../shared/traces unless --traces says where.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from eviction_daemon import attach_decisions
from eviction_memory import daemon_bytes, replay_bytes
from eviction_rows import (
    AGENT,
    BASE,
    BEST,
    CAPACITIES,
    FILES,
    HBM_GOALS,
    OURS,
    Key,
    daemon_rows,
    gap_row,
    hbm_row,
    hindsight_row,
    pictures,
    speed_rows,
    table,
    worst_row,
)
from holdfast.eviction.guard import Shadow
from holdfast.eviction.policy import POLICIES
from plot import picture
from rich.console import Console
from rows import Row, machine, report, show

from holdfast.simulation import KV_BYTES_PER_TOKEN, OFFLINE, Capacity, Tally, simulate
from holdfast.tiered_simulation import BYTES_PER_SECOND
from holdfast.traces import Trace, read_trace

HERE: Final = Path(__file__).resolve().parent
TRACES: Final = HERE.parent.parent / "shared" / "traces"
PROCESSES: Final = 2
QUICK_REQUESTS: Final = 300
QUICK_POLICIES: Final = (BASE, "arc", OURS, BEST)
HBM_CAPACITY: Final = "1%"
BYTES: Final = "bytes"  # stands where a grid has the capacity: HBM above tiers that hold all, so a hit saves its bytes

traces: dict[str, Trace] = {}  # read before the processes are forked, so that they share it


def load_ns(token_count: int) -> float:
    """What finding n tokens in HBM is worth when DDR has everything."""
    return token_count * KV_BYTES_PER_TOKEN / BYTES_PER_SECOND["ddr"] * 1e9


def replayed(key: Key) -> tuple[Key, dict[str, Any]]:
    """One replay, in a process of the pool."""
    name, policy, capacity = key
    if capacity == BYTES:
        return key, simulate(traces[name], policy, Capacity.parse(HBM_CAPACITY), worth=load_ns)
    found = simulate(traces[name], policy, Capacity.parse(capacity))
    return key, found | (exactly_lru(traces[name], found["capacity_blocks"]) if policy == BASE else {})


def exactly_lru(trace: Trace, units: int) -> dict[str, Any]:
    """What all is measured against. Of many leaves `choose` looks at a sample only, so our own LRU is not quite one."""
    shadow, tally = Shadow(units), Tally()
    shadow.came("", 1)
    for one in trace.requests:
        chain = one.request.use.chain
        front = next((number for number, unit in enumerate(chain) if unit not in shadow.order), len(chain))
        tally.add(min(front * trace.block_tokens, one.input_tokens), one.input_tokens)
        shadow.used(chain)
    return {"prefill_seconds_saved": tally.saved_flops / tally.asked_flops, "hit_tokens": tally.hit_tokens}


def endless_hit_tokens(trace: Trace) -> int:
    """Hit tokens of a cache that keeps everything."""
    seen: set[object] = set()
    hit_tokens = 0
    for one in trace.requests:
        chain = one.request.use.chain
        front = next((number for number, unit in enumerate(chain) if unit not in seen), len(chain))
        hit_tokens += min(front * trace.block_tokens, one.input_tokens)
        seen.update(chain)
    return hit_tokens


def fronts(trace: Trace, count: int) -> Trace:
    """The first requests of it."""
    requests = trace.requests[:count]
    units = {unit for one in requests for unit in one.request.use.chain}
    return replace(trace, requests=requests, unit_count=len(units))


def measured(policies: Sequence[str]) -> dict[Key, dict[str, Any]]:
    """Every replay that a row or the table needs, the longest first."""
    keys = [(file.name, policy, capacity) for file in FILES for policy in policies for capacity in CAPACITIES]
    keys += [(name, OURS, BYTES) for name in HBM_GOALS]
    keys.sort(key=lambda key: (-traces[key[0]].touched_units, key[1] not in (OURS, BEST)))
    found: dict[Key, dict[str, Any]] = {}
    started = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        for key, one in pool.imap_unordered(replayed, keys):
            found[key] = one
            said = f"{one['prefill_seconds_saved']:.4f} saved, {one['cpu_us_per_block']:.1f} us a block"
            print(f"{time.perf_counter() - started:6.0f} s  {' '.join(key)}: {said}", flush=True)
    return found


def rows_of(grid: dict[Key, dict[str, Any]], policies: Sequence[str]) -> list[Row]:
    classical = [policy for policy in policies if policy not in (OURS, BEST)]
    found = [gap_row(grid), worst_row(grid), hindsight_row(grid, classical)]
    for name in HBM_GOALS:
        lru, best = grid[name, BASE, HBM_CAPACITY], grid[name, BEST, HBM_CAPACITY]
        found.append(hbm_row(name, lru, grid[name, OURS, BYTES], best, endless_hit_tokens(traces[name])))
    return found + speed_rows(grid)


def daemons(*, quick: bool) -> list[Row]:
    """Of daemons with 100,000 extents. Memory is told from one with fewer: every allocation is traced."""
    sizes = {"documents": 40, "extents": 50} if quick else {"documents": 500, "extents": 250}
    decisions = attach_decisions(**sizes, attaches=20 if quick else 400, policy=OURS)
    memory = daemon_bytes(documents=20 if quick else 150, extents=50 if quick else 250, policy=OURS)
    return daemon_rows(decisions, memory | replay_bytes(traces[AGENT], OURS, Capacity.parse(HBM_CAPACITY)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Eviction policies on recorded traces.")
    parser.add_argument("--quick", action="store_true", help="the front of each trace, and few policies")
    parser.add_argument("--traces", type=Path, default=TRACES, help="where the traces are")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "eviction.json")
    options = parser.parse_args()
    missing = [file.file for file in FILES if not (options.traces / file.file).exists()]
    if missing:
        sys.exit(f"there is no {', '.join(missing)} in {options.traces}; say where the traces are with --traces")
    here = machine()
    policies = [*POLICIES, *OFFLINE]
    for file in FILES:
        traces[file.name] = read_trace(options.traces / file.file, file.block_tokens)
        if options.quick:
            traces[file.name] = fronts(traces[file.name], QUICK_REQUESTS)
    if options.quick:
        policies = [policy for policy in policies if policy in QUICK_POLICIES]
    grid = measured(policies)
    rows = rows_of(grid, policies) + daemons(quick=options.quick)
    here |= {"requests": {name: len(trace.requests) for name, trace in traces.items()}}
    here |= {"load_after": round(os.getloadavg()[0], 2)}
    write(options.out, rows, here, grid, policies)
    Console(width=180).print(table(grid, policies))
    show(rows, f"Eviction: {OURS} against LRU and what knows the future")


def write(
    out: Path, rows: Sequence[Row], here: dict[str, Any], grid: dict[Key, dict[str, Any]], policies: Sequence[str]
) -> None:
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    result = report(rows, commit, dt.datetime.now(dt.UTC).date().isoformat(), here)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [{**one, "trace": key[0], "capacity": key[2]} for key, one in sorted(grid.items())]
    dumped = "\n".join(json.dumps(line) for line in lines)
    out.with_name(f"{out.stem}_table.jsonl").write_text(dumped + "\n", encoding="utf-8")
    title = f"Eviction, {here['cpu']}, {result['date']}, {commit}"
    drawn = [one for one in rows if one.goal > 0 and one.value > 0]  # a bar is a ratio to the goal
    out.with_suffix(".svg").write_text(picture(drawn, title), encoding="utf-8")
    for name, curve in pictures(grid, policies).items():
        out.with_name(f"{out.stem}_{name}.svg").write_text(curve, encoding="utf-8")


if __name__ == "__main__":
    main()
