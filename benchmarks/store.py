"""The store against the machine: every data path beside the bare operation on the same bytes, in turns, in one run.

A document is 1 GiB of Llama-3-8B's KV (32 layers, 8 kv heads of 128, bfloat16: 128 KiB a token) unless a row says
otherwise. The daemon is a real process, here with room for 6 GiB of DDR; what returns is compared byte by byte after
every round. What each row must move, and what that takes at this machine's limits, stands in LOG.md.

    make bench-store          the whole run; with LMCache's rows where `make engines` was run before
    store.py --quick          small sizes and two rounds: shows that every row can be measured, not what it is
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import store_lmcache
from documents import FULL, MIB, QUICK, Sizes, stage
from plot import picture
from rows import Row, machine, report, show
from store_disk import THREADS, Reads, Storm, Writes
from store_memory import Memory
from store_service import Lag, Lookup, Many

HERE: Final = Path(__file__).resolve().parent


class Run:
    """Sections one after the other, each on a daemon of its own."""

    def __init__(self, directory: Path, sizes: Sizes) -> None:
        self.directory, self.sizes = directory, sizes
        self.facts: dict[str, Any] = {}
        self.rows: list[Row] = []

    def memory(self) -> None:
        with stage(self.directory / "memory", self.sizes) as one:
            self.facts |= one.facts
            section = Memory(one, self.sizes)
            section.run()
        self.facts["noise"] = round(section.samples.spread("put_bare"), 3)
        self.rows += section.rows()

    def disk(self) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for kind in (Reads, Writes):
                with stage(self.directory / kind.__name__.lower(), self.sizes) as one:
                    section = kind(one, self.sizes, pool)
                    section.run()
                self.rows += section.rows()
        with stage(self.directory / "storm", self.sizes) as one:
            storm = Storm(one, self.sizes)
            storm.run()
        self.rows += storm.rows()

    def service(self) -> None:
        for kind in (Lookup, Lag):
            with stage(self.directory / kind.__name__.lower(), self.sizes) as one:
                section = kind(one, self.sizes)
                section.run()
            self.rows += section.rows()
        many = Many(self.directory / "many", self.sizes)
        many.run()
        self.rows += many.rows()

    def lmcache(self) -> None:
        ddr = f"{2 * self.sizes.document_bytes // MIB}MiB"
        with (
            stage(self.directory / "beside", self.sizes, ddr__capacity_bytes=ddr) as one,
            store_lmcache.peer(self.directory / "lmcache", self.sizes) as worker,
        ):
            self.facts |= one.facts
            versus = store_lmcache.Versus(one, self.sizes, worker)
            versus.run()
        self.rows += versus.rows()


def main() -> None:
    parser = argparse.ArgumentParser(description="The store's data paths, as ratios to the bare operations.")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds, no LMCache")
    parser.add_argument("--only", choices=("memory", "disk", "service", "lmcache"), help="one section")
    parser.add_argument("--dir", type=Path, help="where daemons keep their files (default: a temporary directory)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "store.json")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    here = machine()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=options.dir) as scratch:
        run = Run(Path(scratch), sizes)
        sections: dict[str, Callable[[], None]] = {"memory": run.memory, "disk": run.disk, "service": run.service}
        if not options.quick and store_lmcache.PYTHON.exists():
            sections["lmcache"] = run.lmcache
        chosen = {name: work for name, work in sections.items() if options.only in (None, name)}
        for name, work in chosen.items():
            started = time.perf_counter()
            work()
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    here |= run.facts | {"load_after": round(os.getloadavg()[0], 2)}
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    result = report(run.rows, commit, dt.datetime.now(dt.UTC).date().isoformat(), here)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = f"The store against the machine, {here['cpu']}, {result['date']}, {commit}"
    options.out.with_suffix(".svg").write_text(picture(run.rows, title), encoding="utf-8")
    copies = f"; bare copies vary by {here['noise']:.0%}" if "noise" in here else ""
    show(run.rows, f"The store, {sizes.document_bytes // MIB} MiB a document, {sizes.rounds} rounds{copies}")
    if "lmcache" not in chosen:
        print("LMCache's rows are left out: run `make engines` and the whole benchmark for them.")


if __name__ == "__main__":
    main()
