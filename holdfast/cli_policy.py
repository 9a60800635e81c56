"""`holdfast policy`: which policies there are, and what they would have saved of a trace."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from .cli_session import session_of
from .kvstore.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .cli_simulate import Job

SIMULATE_HELP = """What policies would have saved of recorded requests.

A trace is JSON lines (.jsonl or .jsonl.gz), one request each, sorted by time:

    {"ts": ms, "in": input tokens, "out": output tokens, "sid": session or -1, "runs": [start, length, ...]}

where runs are the ids of the prompt's 512-token blocks; equal id, equal whole prefix. A request hits the blocks that
are resident in front of it without a gap; then all its blocks come in, and those worth least leave, or never come
(bypass). Only leaves leave, and nothing is left out for warming up.

With --json one object a line, for each trace, policy and capacity in that order:

\b
  trace, policy, capacity    as they were given
  capacity_blocks            int(per cent x different blocks of the trace / 100)
  unique_blocks              different blocks in the trace
  block_tokens               as given; what remains at a request's end is a part-filled block, counted as a whole one
  requests                   in the trace, all of them
  token_hit_ratio            hit tokens / input tokens; hit tokens = min(hit blocks x block_tokens, input tokens)
  prefill_seconds_saved      a fraction: sum c(hit tokens) / sum c(input tokens), c(s) = 2 N s + 2 L d s^2
                             with N = 70e9, L = 80, d = 8192
  hit_tokens, input_tokens, blocks_touched     sums over all requests
  seconds, ops_per_second    wall time of the replay without reading the trace; blocks touched / seconds
  cpu_seconds, cpu_us_per_block, request_p99_ms     CPU of the replay, in all, a block, and of the 99th in 100 requests
  events_file                where --events went

With --tiers hbm=1%,ddr=5%,nvme=20% the tiers are kept as the daemon keeps them: a copy read up stays below, what leaves
a tier drops where a lower one has it and is written to the next otherwise; each tier has its own value of a hit (time
to load from the next tier; below the last, to compute again). Hits count in whatever tier. Instead of capacity:

\b
  tiers, tier_blocks         as given, and in blocks
  net_seconds_saved          as prefill_seconds_saved, less the seconds of loading into HBM
  hit_shares                 of the hit blocks, where they were found (nearest tier)
  moved_bytes                by hop: up to HBM by where blocks were found; down by where they were written
  swaps, swap_seconds_mean, swap_seconds_p95      requests that loaded something, and for how long
  assumed                    bandwidths into HBM, bytes of KV a token, the rate of prefill: not measured
"""

CAPACITIES: Final = "1%,5%,10%,20%"

policy_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Eviction policies.")


@policy_app.command("ls")
def policy_ls(ctx: typer.Context) -> None:
    """The policies there are."""
    from .simulation import described_policies

    found = described_policies()

    def human() -> list[RenderableType]:
        from .cli_tables import table

        return [table(("POLICY", "WHERE", "WHAT"), [(one["name"], one["where"], one["what"]) for one in found])]

    session_of(ctx).show({"policies": found}, human)


@policy_app.command("simulate", help=SIMULATE_HELP)
def policy_simulate(
    ctx: typer.Context,
    trace: Annotated[list[Path], typer.Option("--trace", metavar="FILE", help="A trace; may be given several times.")],
    policy: Annotated[str, typer.Option(metavar="NAME[,NAME...]", help="See `holdfast policy ls`.")],
    capacity: Annotated[
        str | None,
        typer.Option(
            metavar="C[,C...]", help=f"Per cent of a trace's different blocks, or a size of KV: 300GB. [{CAPACITIES}]"
        ),
    ] = None,
    block_tokens: Annotated[int, typer.Option(min=1, help="A multiple of 512.")] = 512,
    hold: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            help="Synthetic leases: a request's blocks stay for that long for each output token, and age from then.",
        ),
    ] = 0.0,
    tiers: Annotated[
        str | None, typer.Option(metavar="hbm=C,ddr=C,nvme=C", help="Simulate tiers, with capacities as above.")
    ] = None,
    ddr_speed: Annotated[float, typer.Option(min=0.001, metavar="GB/S", help="Assumed, from DDR into HBM.")] = 200.0,
    nvme_speed: Annotated[float, typer.Option(min=0.001, metavar="GB/S", help="Assumed, from NVMe into HBM.")] = 25.0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw what is saved against capacity; needs holdfast[plot].")
    ] = None,
    events: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every hit, eviction and insertion as JSON lines (.gz: compressed); "
            "several replays write FILE.TRACE.POLICY.CAPACITY. The format: `python -m pydoc holdfast.replay_events`.",
        ),
    ] = None,
) -> None:
    """See SIMULATE_HELP."""
    from .cli_simulate import SingleJob, TieredJob, check_outputs, run_jobs
    from .simulation import Capacity, check_policy
    from .tiered_simulation import TierPlan

    session, names = session_of(ctx), policy.split(",")
    for name in names:
        check_policy(name)
    if tiers is not None:
        if capacity or events or plot:
            raise InvalidRequest("--tiers has capacities of its own, and neither --events nor --plot; leave them out")
        plan = TierPlan.parse(tiers, {"ddr": ddr_speed * 1e9, "nvme": nvme_speed * 1e9})
        jobs: list[Job] = [TieredJob(name, plan) for name in names]
    else:
        capacities = [Capacity.parse(text) for text in (capacity or CAPACITIES).split(",")]
        wanted = list(itertools.product(names, capacities))
        check_outputs(trace, events, plot)
        several = len(trace) * len(wanted) > 1
        jobs = [SingleJob(name, size, events, several) for name, size in wanted]
    found = run_jobs(session, trace, block_tokens, hold, jobs)
    if plot is not None:
        from .plot_curves import draw

        draw(plot, found)
