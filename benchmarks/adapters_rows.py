"""What bench-adapters found: times to first token by place, CPU time of misses, bare copies and reads; their rows."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from adapters_sides import Answer
from bare import fresh_shared, open_direct, read_all
from rich.console import Console
from rich.table import Table
from rows import Row, row
from samples import Samples

THREADS: Final = 4  # nvme.threads of the default configuration
CHUNK_BYTES: Final = 4 << 20
BARE: Final = "own_hit"
PLACES: Final = {
    "recompute": "no cache",
    "own_hit": "vLLM's own pages",
    "lmcache_ram": "LMCache, RAM",
    "lmcache_disk": "LMCache, files",
    "holdfast_ddr": "Holdfast, DDR",
    "holdfast_nvme": "Holdfast, NVMe after a restart",
}
DURABLE: Final = {
    "lmcache_disk": "not synced, no checksum",
    "holdfast_nvme": "synced, checked when read",
}


class Hits:
    """Seconds to first token by place, round by round, and what bare copies and reads of the same bytes take."""

    def __init__(self, size_bytes: int, directory: Path) -> None:
        self.size_bytes = size_bytes
        self.samples = Samples()
        self._cpus = len(os.sched_getaffinity(0))
        self._shared = fresh_shared(size_bytes)
        self._source = np.frombuffer(self._shared, np.uint8)
        self._source[:] = 1
        self._target = np.ones(size_bytes, np.uint8)
        self._path = directory / "roof"
        with self._path.open("wb") as file:
            file.write(np.random.default_rng(0).bytes(size_bytes))
            os.fsync(file.fileno())

    def add(self, place: str, answer: Answer) -> None:
        self.samples.add(place, answer.first_seconds)

    def roof(self) -> None:
        """Copy from shared memory with as many threads as there are cores; read a file past the page cache."""
        step = -(-self.size_bytes // self._cpus)
        parts = [slice(start, start + step) for start in range(0, self.size_bytes, step)]
        starts = range(0, self.size_bytes, CHUNK_BYTES)
        descriptor = open_direct(self._path, os.O_RDONLY)
        pieces = [(descriptor, at, at, min(CHUNK_BYTES, self.size_bytes - at)) for at in starts]
        with ThreadPoolExecutor(THREADS) as pool:
            copy = lambda part: np.copyto(self._target[part], self._source[part])  # noqa: E731
            self.samples.timed("copy", lambda: list(pool.map(copy, parts)))
            self.samples.timed("read", lambda: read_all(pool, pieces, memoryview(self._shared)))
        os.close(descriptor)

    def extra(self, place: str) -> list[float]:
        """Seconds that it takes longer than a hit in the engine's own pages, round by round."""
        times = self.samples.times
        return [place - bare for place, bare in zip(times[place], times[BARE], strict=True)]

    def extra_ms(self, place: str) -> float:
        """Of the medians."""
        return self.samples.ms(place) - self.samples.ms(BARE)

    def has(self, *places: str) -> bool:
        return all(place in self.samples.times for place in places)

    def rows(self) -> list[Row]:
        made = []
        if self.has("holdfast_ddr", "lmcache_ram"):
            made.append(self._against("ttft_ddr_vs_lmcache_ram", 1.1, "holdfast_ddr", "lmcache_ram", "copy"))
            made.append(self._against("ttft_nvme_vs_lmcache_disk", 0.8, "holdfast_nvme", "lmcache_disk", "read"))
        if self.has("holdfast_ddr"):
            ours, bare = (self.samples.times[place] for place in ("holdfast_ddr", "recompute"))
            value = statistics.median(ours) / statistics.median(bare)
            made.append(row("ttft_ddr_vs_recompute", value, 0.2, "lower", self._raw("holdfast_ddr", ours, bare)))
        return made

    def _against(self, name: str, goal: float, ours: str, theirs: str, roof: str) -> Row:
        """Ratio of medians, each less the median of the engine's own hit; the spread is that of rounds."""
        raw = self._raw(ours, self.extra(ours), self.extra(theirs))
        raw |= {"ours_ms": self.extra_ms(ours), "bare_ms": self.extra_ms(theirs)}
        raw |= {f"{place}_ms": self.samples.ms(place) for place in (ours, theirs, BARE, roof)}
        raw["roof_gb_per_s"] = self.size_bytes / self.samples.ms(roof) / 1e6
        raw |= {"share_of_roof_ours": self.share(ours, roof), "share_of_roof_bare": self.share(theirs, roof)}
        return row(name, raw["ours_ms"] / raw["bare_ms"], goal, "lower", raw)

    def _raw(self, ours: str, mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
        ratios = [one / other for one, other in zip(mine, others, strict=True)]
        return {
            "ours_ms": 1e3 * statistics.median(mine),
            "bare_ms": 1e3 * statistics.median(others),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "rounds": float(len(ratios)),
            "mib": self.size_bytes / 2**20,
            "spread_ours": self.samples.spread(ours),
        }

    def share(self, place: str, roof: str) -> float:
        """Part of the bare operation's speed that a place reaches."""
        return self.samples.ms(roof) / self.extra_ms(place)


class Misses:
    """CPU seconds of each side's process tree, prompt by prompt."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.samples = Samples()

    def add(self, side: str, seconds: float) -> None:
        self.samples.add(side, seconds)

    def rows(self) -> list[Row]:
        if "Holdfast" not in self.samples.times:
            return []
        beside = {}
        if "LMCache" in self.samples.times:
            beside = {"lmcache_ratio": self.samples.relation("LMCache", "vLLM")}
        return [
            self._row("miss_overhead", "Holdfast", beside),
            self._row("miss_overhead_no_store", "Holdfast, no store", {}),
        ]

    def _row(self, name: str, side: str, beside: dict[str, float]) -> Row:
        times = self.samples.times
        ratios = [ours / bare for ours, bare in zip(times[side], times["vLLM"], strict=True)]
        raw = {
            "ours_ms": self.samples.ms(side),
            "bare_ms": self.samples.ms("vLLM"),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "spread_ours": self.samples.spread(side),
            "spread_bare": self.samples.spread("vLLM"),
            "rounds": float(len(ratios)),
            "mib": self.size_bytes / 2**20,
        }
        return row(name, statistics.median(ratios), 1.02, "lower", raw | beside)


def show_hits(hits: Hits) -> None:
    """Every place: its time, what of it is not the engine's own, and the speed of the bytes."""
    copy, read = (hits.size_bytes / hits.samples.ms(roof) / 1e6 for roof in ("copy", "read"))
    table = Table(title=f"Time to first token; bare copy {copy:.3g} GB/s, bare read {read:.3g} GB/s")
    for heading in ("KV comes from", "first token", "spread", "above own hit", "GB/s", "of bare", "durability"):
        table.add_column(heading, justify="left" if heading in ("KV comes from", "durability") else "right")
    for place, words in PLACES.items():
        if not hits.has(place):
            continue
        moved = place not in ("recompute", BARE)
        extra = hits.extra_ms(place)
        roof = "read" if place in DURABLE else "copy"
        table.add_row(
            words,
            f"{hits.samples.ms(place):.4g} ms",
            f"{hits.samples.spread(place):.0%}",
            "" if place == BARE else f"{extra:.4g} ms",
            f"{hits.size_bytes / extra / 1e6:.3g}" if moved else "",
            f"{hits.share(place, roof):.0%}" if moved else "",
            DURABLE.get(place, ""),
        )
    Console(width=120).print(table)
