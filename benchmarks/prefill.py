"""Recompute against reattach: the demo model's prefill of a document, and the same document's way back from NVMe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from holdfast.engine_adapter.engine import PrefillPoint
from holdfast.engine_adapter.group import GroupOptions, RankGroup
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.client import Client

from holdfast.demo_stage import Stage


class TimedGroup(RankGroup):
    """Keeps the times of its last prefill."""

    seconds = 0.0

    def prefill(self, *args: Any) -> list[PrefillPoint]:
        points = super().prefill(*args)
        self.seconds = sum(point.elapsed_ns for point in points) / 1e9
        return points


def recompute(client: Client, directory: Path, sock: Path, token_count: int, rounds: int) -> dict[str, list[float]]:
    """The demo model: prefill, evict to NVMe, reattach (cp=1) until the last layer is in HBM; answers must agree."""
    stage = Stage(directory, sock)
    model = directory / "model"
    options = GroupOptions(name="bench", model=model, cp=1, rows=token_count + 64, daemon_socket=sock)
    times: dict[str, list[float]] = {"prefill": [], "reattach": []}
    rng = np.random.default_rng(1)
    with TimedGroup(options, stage.spec) as group:
        session = Session(client, group)
        for _ in range(rounds):
            session.ingest("long", rng.integers(0, 256, token_count).tolist())
            times["prefill"].append(group.seconds)
            before = session.ask("long", [1, 2, 3], 4)
            client.free("long", "nvme")
            started = time.perf_counter()
            with session.attached("long") as attached:
                client.wait_layers(attached.lease, len(stage.spec.groups[0].layers))
                times["reattach"].append(time.perf_counter() - started)
            after = session.ask("long", [1, 2, 3], 4)
            assert np.abs(after.answer.logits - before.answer.logits).max() <= 1e-4, "reattached KV answers differently"
            client.free("long", "nvme")
            client.delete("long")
    return times
