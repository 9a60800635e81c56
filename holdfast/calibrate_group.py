"""Calibrate a group: starts a model's ranks for as long as they measure themselves, and tells the daemon."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from os import getpid
from pathlib import Path

from .engine_adapter.control import Measured
from .engine_adapter.group import GroupOptions, RankGroup
from .kvstore.client import Client
from .kvstore.config import Config
from .runner_plan import RunnerOptions, RunnerPlan

ROWS = 1  # what is measured lies in memory of its own


def calibrate_group(options: RunnerOptions, config: Config, say: Callable[[str], None]) -> Measured:
    """Measure a group, and have the daemon keep it for all groups in the same setting.

    Raises DaemonUnavailable when no daemon runs, and what the start of a group raises.
    """
    with closing(Client(config.daemon.socket, options.tenant)) as client:
        plan = RunnerPlan.of(replace(options, rows=ROWS), say)
        facts = plan.facts
        say(f"starting {facts.cp * facts.tp} ranks")
        group = GroupOptions(
            name=f"calibrate-{getpid()}",
            model=Path(facts.model),
            cp=facts.cp,
            tp=facts.tp,
            rows=facts.rows,
            daemon_socket=config.daemon.socket,
            tenant=facts.tenant,
            device=facts.device,
            threads=facts.threads,
            communicator=facts.communicator,
            kernel=facts.kernel,
            strategy="pass_kv",  # a group that chooses would measure at its start
        )
        with RankGroup(group, plan.spec) as ranks:
            say("measuring")
            measured = ranks.measure()
        fingerprint = client.register_spec(plan.spec)
        client.observe_prefill(fingerprint, measured.prefills, facts.cp * facts.tp)
        if measured.rate is not None:
            client.keep_ring(measured.rate)
    return measured
