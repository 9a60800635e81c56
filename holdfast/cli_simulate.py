"""What `holdfast policy simulate` does: replays one after the other, and what is shown of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .cli_session import Session
from .kvstore.errors import InvalidRequest
from .replay_events import EventsFile, events_path
from .simulation import Capacity, Progress, heading, simulate
from .tiered_simulation import TierPlan, simulate_tiers
from .traces import Trace, read_trace, stem

if TYPE_CHECKING:
    from rich.table import Table

Found = dict[str, Any]  # one line of --json


class Job(Protocol):
    """One replay of every trace."""

    def run(self, trace: Trace, progress: Progress) -> Found:
        """Raises InvalidRequest."""
        ...

    def shown(self, found: Sequence[Found]) -> Table:
        """Results of such jobs, for people."""
        ...


@dataclass(frozen=True, slots=True)
class SingleJob:
    """A policy at a capacity, with its events where they are wanted."""

    policy: str
    capacity: Capacity
    events: Path | None
    is_one_of_several: bool

    def run(self, trace: Trace, progress: Progress) -> Found:
        """See Job."""
        if self.events is None:
            return simulate(trace, self.policy, self.capacity, progress=progress)
        path = self.events
        if self.is_one_of_several:
            path = events_path(path, stem(trace.path), self.policy, self.capacity.text)
        about = heading(trace, self.policy, self.capacity, self.capacity.units(trace))
        with EventsFile(path, about) as file:
            return simulate(trace, self.policy, self.capacity, file.saw, progress) | {"events_file": str(path)}

    def shown(self, found: Sequence[Found]) -> Table:
        """See Job."""
        from .cli_tables import table

        columns = ("POLICY", "CAPACITY", "BLOCKS", "SAVED", "TOKEN HITS", "CPU/BLOCK")
        rows = [
            (
                one["policy"],
                one["capacity"],
                f"{one['capacity_blocks']:,}",
                f"{one['prefill_seconds_saved']:.4f}",
                f"{one['token_hit_ratio']:.4f}",
                f"{one['cpu_us_per_block']:.1f} us",
            )
            for one in found
        ]
        return table(columns, rows, numbers=columns[1:])


@dataclass(frozen=True, slots=True)
class TieredJob:
    """A policy over tiers."""

    policy: str
    plan: TierPlan

    def run(self, trace: Trace, progress: Progress) -> Found:
        """See Job."""
        return simulate_tiers(trace, self.policy, self.plan, progress)

    def shown(self, found: Sequence[Found]) -> Table:
        """See Job."""
        from .cli_tables import table

        tiers, hops = tuple(found[0]["tier_blocks"]), tuple(found[0]["moved_bytes"])
        shares, moved = (f"{tier.upper()} HITS" for tier in tiers), (f"{hop} TB" for hop in hops)
        columns = ("POLICY", "SAVED", "NET", *shares, *moved, "SWAPS", "MEAN", "P95")
        rows = [
            (
                one["policy"],
                f"{one['prefill_seconds_saved']:.4f}",
                f"{one['net_seconds_saved']:.4f}",
                *(f"{one['hit_shares'][tier]:.3f}" for tier in tiers),
                *(f"{one['moved_bytes'][hop] / 1e12:.2f}" for hop in hops),
                f"{one['swaps']:,}",
                f"{one['swap_seconds_mean']:.3f} s",
                f"{one['swap_seconds_p95']:.3f} s",
            )
            for one in found
        ]
        made = table(columns, rows, numbers=columns[1:])
        speeds = ", ".join(f"{tier} {self.plan.bytes_per_second[tier] / 1e9:g} GB/s" for tier in tiers[1:])
        made.caption, made.caption_justify = f"{self.plan.text}; assumed, not measured: {speeds} into hbm", "left"
        return made


def check_outputs(traces: Sequence[Path], events: Path | None, plot: Path | None) -> None:
    """Before long work: whether its results will have a place. Raises InvalidRequest or MissingExtra."""
    if events is not None and len({stem(path) for path in traces}) < len(traces):
        raise InvalidRequest("two traces of one name would write the same --events file; replay one after the other")
    if plot is not None:
        from .plot_curves import check_plots

        check_plots(plot)


def run_jobs(
    session: Session, traces: Sequence[Path], block_tokens: int, hold_seconds_per_token: float, jobs: Sequence[Job]
) -> list[Found]:
    """Every job on every trace; what is found is shown as soon as it is."""
    everything: list[Found] = []
    for path in traces:
        with session.patience(f"reading {path}"):
            trace = read_trace(path, block_tokens, hold_seconds_per_token)
        found: list[Found] = []
        with _progress(session, len(jobs) * len(trace.requests)) as progress:
            for job in jobs:
                found.append(job.run(trace, progress))
                if session.as_json:
                    print(json.dumps(found[-1], ensure_ascii=False), flush=True)
        everything += found
        if not session.as_json:
            _show(session, trace, jobs[0].shown(found))
    return everything


def _show(session: Session, trace: Trace, shown: Table) -> None:
    from .cli_tables import console

    screen = console(color=session.color)
    screen.print(
        f"{trace.path}: {len(trace.requests):,} requests, {trace.unit_count:,} different blocks "
        f"of {trace.block_tokens:,} tokens"
    )
    screen.print(shown)


@contextmanager
def _progress(session: Session, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr, told of requests as they are replayed; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f} requests"), TimeRemainingColumn())
    console = Console(stderr=True, no_color=not session.color)
    with Progress("replaying", *columns, console=console, transient=True) as bar:
        task = bar.add_task("replaying", total=total)
        yield lambda replayed: bar.advance(task, replayed)
