"""Ring attention against dense attention of the same kernel, in turns, in one run.

One process with 2 threads attends alone; 2 processes with 1 thread each are the ring: 8 query heads, 2 kv heads,
dim 64, float32, causal. The driver asks one side, then the other, sample by sample. Outputs are compared once a row.
What each path must move, and what that takes at this machine's limits, stands in LOG.md.

    make bench-ring          the whole run: rows, pictures; GPU rows where there is a GPU
    ring.py --quick          small sizes and two rounds: shows that every row can be measured, not what it is
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import ring_gpu
from curves import Axis, curves, relative
from plot import picture
from ring_choice import Choice
from ring_group import Group, Neighbours, dense_group, ranks_group
from ring_rows import FULL, QUICK, Sizes, Versus
from ring_scaling import MEMORY_NEW, Scaling
from rows import Row, machine, report, show

HERE: Final = Path(__file__).resolve().parent
RANKS: Final = 2
AXIS_MOST: Final = 2.0
SECTIONS: Final = ("rows", "choice", "scaling", "gpu")


class Run:
    """Sections one after the other, on the same processes."""

    def __init__(self, dense: Group, ranks: Group, scratch: Path, sizes: Sizes) -> None:
        self.dense, self.ranks, self.scratch, self.sizes = dense, ranks, scratch, sizes
        [told, *_] = ranks.ask("describe")
        self.kind = str(told["communicator"])
        self.facts: dict[str, Any] = told
        self.rows: list[Row] = []
        self.pictures: dict[str, str] = {}

    def versus(self) -> None:
        section = Versus(self.dense, self.ranks, self.kind, self.scratch, self.sizes)
        section.run()
        self.facts |= section.facts
        self.rows += section.rows

    def choice(self) -> None:
        section = Choice(self.ranks, self.sizes)
        section.run()
        self.facts |= section.facts
        self.rows += section.rows
        title = f"Attention of one layer, {RANKS} ranks over {self.kind}, {self.sizes.miss_tokens:,} tokens in all"
        up = Axis("ms to the first token, of this layer", ticks=(20, 50, 100, 200, 500, 1000, 2000))
        across = Axis("tokens that are new, % (cache miss rate)", ticks=(1, 2, 5, 10, 20, 50, 100))
        self.pictures["ttft"] = curves(section.curves, title, across, up)
        times = Axis("times as long as the best of them", ticks=(1.0, 1.02, 1.05, 1.1, 1.2))
        self.pictures["choice"] = curves(relative(section.curves), title, across, times)

    def scaling(self) -> None:
        section = Scaling(self.ranks, self.scratch, self.sizes)
        section.run()
        ranks = Axis("ranks", ticks=tuple(map(float, self.sizes.ranks)))
        up = Axis("CPU-seconds of all ranks over those of one", ticks=(0.9, 1.0, 1.1, 1.2, 1.5, 2.0))
        self.pictures["scaling"] = curves(
            section.speed, f"The same attention by more ranks, over {self.kind}", ranks, up
        )
        title = f"Memory of a rank: {self.sizes.memory_layers} layers of KV, {MEMORY_NEW} new tokens, over {self.kind}"
        self.pictures["memory"] = curves(section.memory, title, Axis("document, tokens", 2), Axis("MiB of a rank", 4))

    def gpu(self) -> None:
        rows, fact = ring_gpu.measured()
        self.rows += rows
        self.facts["gpu"] = fact


def main() -> None:
    parser = argparse.ArgumentParser(description="Ring attention, as ratios to dense attention of the same kernel.")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--dir", type=Path, help="where processes meet (default: a temporary directory)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ring.json")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    here = machine()
    with (
        tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=options.dir) as scratch,
        dense_group(RANKS) as dense,
        ranks_group(RANKS, Path(scratch) / "pair") as ranks,
    ):
        run = Run(dense, ranks, Path(scratch), sizes)
        work: tuple[Callable[[], None], ...] = (run.versus, run.choice, run.scaling, run.gpu)
        for name, section in zip(SECTIONS, work, strict=True):
            if options.only in (None, name):
                started, neighbours = time.perf_counter(), Neighbours([*dense.workers, *ranks.workers])
                section()
                others = neighbours.cores()
                run.facts[f"others_cores_{name}"] = round(others, 3)
                print(f"{name}: {time.perf_counter() - started:.0f} s, others used {others:.2f} cores", flush=True)
    here |= run.facts | {"load_after": round(os.getloadavg()[0], 2)}
    write(options.out, run, here)
    show(run.rows, f"Ring attention, {RANKS} ranks x 1 thread over {run.kind}, against 1 process x {RANKS} threads")


def write(out: Path, run: Run, here: dict[str, Any]) -> None:
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    result = report(run.rows, commit, dt.datetime.now(dt.UTC).date().isoformat(), here)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = f"Ring attention against dense, {here['cpu']}, {result['date']}, {commit}"
    out.with_suffix(".svg").write_text(picture(run.rows, title, AXIS_MOST), encoding="utf-8")
    for name, drawn in run.pictures.items():
        out.with_name(f"{out.stem}_{name}.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
