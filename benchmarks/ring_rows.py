"""Rows of bench-ring: the ring beside dense attention of the same kernel, sample by sample, and two rows beside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Final

from ring_case import CHOSEN, GLOO, Case
from ring_group import Group, Neighbours, Side, interleave, load
from rows import Row, over_row, row
from samples import Samples

SAMPLE_SECONDS: Final = 0.12  # shorter calls are repeated within a sample
APART: Final = 1e-5  # float32 against float32: each is within 5e-6 of float64
OVERS: Final = (CHOSEN, GLOO)
TEMPLATES: Final = ("template_allgather", "template_alltoall")
BOTH_WAYS_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Sizes:
    """`full`: document lengths of full prefills. `new` over `cached`: partial ones. `decode`: cached tokens."""

    full: tuple[int, int] = (8192, 16384)
    new: tuple[int, int, int] = (64, 320, 1024)
    cached: int = 32768
    decode: int = 65536
    grid_new: tuple[int, ...] = (32, 128, 512, 2048)
    grid_cached: tuple[int, ...] = (2048, 8192, 32768)
    miss_tokens: int = 16384
    miss_percents: tuple[float, ...] = (1, 2.5, 5, 10, 20, 40, 60, 80, 100)
    ranks: tuple[int, ...] = (1, 2, 4)
    memory_tokens: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)
    memory_layers: int = 8
    transfer_bytes: int = BOTH_WAYS_BYTES
    merge_keys: int = 4096
    rounds: int = 11
    few_rounds: int = 5  # of what takes long, and of plots
    sample_seconds: float = SAMPLE_SECONDS


FULL: Final = Sizes()
QUICK: Final = Sizes(
    full=(256, 512),
    new=(16, 33, 64),
    cached=512,
    decode=1024,
    grid_new=(8, 64),
    grid_cached=(128, 512),
    miss_tokens=256,
    miss_percents=(5, 100),
    ranks=(1, 2),
    memory_tokens=(512, 1024),
    memory_layers=2,
    transfer_bytes=1 << 20,
    merge_keys=512,
    rounds=2,
    few_rounds=2,
    sample_seconds=0.0,
)


@dataclass(frozen=True)
class Wanted:
    """A row: how the ring computes it, and its goal. `bare`: what it is divided by."""

    name: str
    goal: float
    how: str
    bare: str = "dense"


def plan(sizes: Sizes) -> list[tuple[Case, int, list[Wanted]]]:
    """Cases, rounds, rows."""
    new, cached = sizes.new, sizes.cached
    few, many = sizes.few_rounds, sizes.rounds
    peer = Wanted("full_prefill_8k_vs_torch_template", 1.00, "pass_kv", "template")
    return [
        (Case("full_8k", sizes.full[0]), many, [Wanted("full_prefill_8k", 1.03, "pass_kv"), peer]),
        (Case("full_16k", sizes.full[1]), few, [Wanted("full_prefill_16k", 1.03, "pass_kv")]),
        (Case("t64", new[0], cached), many, [Wanted("pass_q_t64", 1.15, "pass_q")]),
        (
            Case("t320", new[1], cached),
            many,
            [Wanted("pass_q_t320", 1.10, "pass_q"), Wanted("pass_kv_t320", 1.15, "pass_kv")],
        ),
        (Case("t1024", new[2], cached), many, [Wanted("pass_q_t1024", 1.03, "pass_q")]),
        (Case("decode_b1", 0, sizes.decode), many, [Wanted("decode_64k_b1", 1.15, "decode")]),
        (Case("decode_b4", 0, sizes.decode, 4), many, [Wanted("decode_64k_b4", 1.05, "decode")]),
    ]


class Versus:
    """On the communicator that the product chooses, named `kind`; gloo's figures stand beside its own."""

    def __init__(self, dense: Group, ranks: Group, kind: str, scratch: Path, sizes: Sizes) -> None:
        self.dense, self.ranks, self.kind, self.scratch, self.sizes = dense, ranks, kind, scratch, sizes
        self.facts: dict[str, Any] = {}
        self.rows: list[Row] = []

    def run(self) -> None:
        for case, rounds, wanted in plan(self.sizes):
            self.measure(case, rounds, wanted)
        self.rows += [self.merge_error(), *self.transport()]

    def measure(self, case: Case, rounds: int, wanted: list[Wanted]) -> None:
        load([self.dense, self.ranks], [case])
        [best] = self.dense.ask("best", name=case.name)
        assert best["apart"] <= APART, f"{case}: variants of dense attention are {best['apart']} apart"
        variant, seconds = best["best"], best["seconds"]
        self.facts[f"dense_{case.name}"] = variant
        times = max(1, ceil(self.sizes.sample_seconds / seconds[variant]))
        hows = {one.how: OVERS for one in wanted}
        if any(one.bare == "template" for one in wanted):
            hows |= dict.fromkeys(TEMPLATES, (GLOO,))
        apart = self.check(case, variant, hows)
        sides: dict[str, Side] = {"dense": partial(self.dense.sample, times, "run", name=case.name, variant=variant)}
        for how, overs in hows.items():
            for over in overs:
                sides[f"{how}@{over}"] = partial(self.ranks.sample, times, "run", name=case.name, how=how, over=over)
        samples, neighbours = Samples(), Neighbours([*self.dense.workers, *self.ranks.workers])
        interleave(samples, rounds, sides)
        others = neighbours.cores()
        for one in wanted:
            made = self.row(one, samples)
            made.raw["others_cores"], made.raw["calls_a_sample"] = round(others, 3), float(times)
            made.raw["apart"], made.raw[f"on_{self.kind}"] = apart, 1.0
            if one.bare == "dense":
                made.raw.update({f"dense_{name}_ms": round(1e3 * value, 4) for name, value in seconds.items()})
            self.rows.append(made)
        for group in (self.dense, self.ranks):
            group.ask("forget")

    def check(self, case: Case, variant: str, hows: dict[str, tuple[str, ...]]) -> float:
        """Every side computes the same: the worst difference from the dense output."""
        path = str(self.scratch / f"{case.name}.pt")
        self.dense.ask("keep", name=case.name, variant=variant, path=path)
        worst = 0.0
        for how, overs in hows.items():
            for over in overs:
                answers = self.ranks.ask("check", name=case.name, how=how, over=over, path=path)
                apart = max(answer["apart"] for answer in answers)
                assert apart <= APART, f"{case}: {how} over {over} is {apart} from dense"
                worst = max(worst, apart)
        Path(path).unlink()
        return worst

    def row(self, one: Wanted, samples: Samples) -> Row:
        bare = one.bare
        if bare == "template":  # the quicker of its two ways to rotate KV
            bare = min((f"{how}@{GLOO}" for how in TEMPLATES), key=samples.ms)
        made = over_row(one.name, one.goal, samples.times, f"{one.how}@{CHOSEN}", bare)
        on_gloo = over_row(one.name, one.goal, samples.times, f"{one.how}@{GLOO}", bare)
        made.raw.update(
            gloo_ms=on_gloo.raw["ours_ms"], gloo_ratio=on_gloo.value, gloo_cpu_ratio=on_gloo.raw["cpu_ratio"]
        )
        if one.bare == "template":
            made.raw.update({f"{how}_ms": round(samples.ms(f"{how}@{GLOO}"), 4) for how in TEMPLATES})
        return made

    def merge_error(self) -> Row:
        """Relative error (norm of the difference from float64 over the norm of float64's) of attention over 64 parts.

        Over that of one call of the same kernel over all keys.
        """
        [found] = self.dense.ask("merge_error", keys=self.sizes.merge_keys, parts=64)
        names = ("kernel", "merged", "kernel_max", "merged_max")
        raw = {f"{name}_e7": 1e7 * found[name] for name in names} | {"rounds": float(found["rounds"])}
        return row("merge_error_f32_64parts", found["merged"] / found["kernel"], 2.0, "lower", raw)

    def transport(self) -> list[Row]:
        """Speed-up of the same transfer over gloo; no row where there is no shared memory."""
        if self.kind != "shm":
            return []
        samples, size = Samples(), self.sizes.transfer_bytes
        sides = {over: partial(self.ranks.sample, 8, "transfer", over=over, size_bytes=size) for over in OVERS}
        interleave(samples, self.sizes.rounds, sides)
        speed = over_row("shm_vs_gloo_16mib", 3.0, samples.times, GLOO, CHOSEN)
        raw = speed.raw | {"ours_ms": speed.raw["bare_ms"], "bare_ms": speed.raw["ours_ms"]}
        for name, over in (("shm", CHOSEN), ("gloo", GLOO)):
            raw[f"{name}_gb_per_s"] = size / samples.ms(over) / 1e6
        return [row("shm_vs_gloo_16mib", speed.value, 3.0, "higher", raw)]
