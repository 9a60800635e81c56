"""Calibrate: measures this machine where the daemon keeps its tiers, and hands the result to the daemon.

It works on scratch memory and scratch files beside the real ones, through the daemon's own code, whether a daemon runs
or not. What it cannot measure it names.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .kvstore.arena import Arena
from .kvstore.calibration import Calibration, Gpu, Rate
from .kvstore.clock import Clock
from .kvstore.config import Config
from .kvstore.errors import StorageFailed, Unavailable
from .kvstore.gpus import gpus
from .kvstore.machine import Machine
from .kvstore.measure import EXTENT, SLAB_BYTES, Progress, measure, rate, scratch_slots
from .kvstore.spec import KVSpec, LayerGroup

SCRATCH_PREFIX = "calibrate-"
EXTENT_SPEC = KVSpec(  # whose extents have the geometry that the other tiers are measured with
    groups=(LayerGroup(layers=tuple(range(EXTENT.layers)), kv_heads=EXTENT.heads, key_dim=128, value_dim=128),),
    dtype="bfloat16",
    model="calibration",
    vocabulary_size=1,
    block_tokens=64,
    extent_blocks=EXTENT.rows // 64,
)


def calibrate(config: Config, arena_directory: Path, clock: Clock, rounds: int, progress: Progress) -> Calibration:
    """Measure. Raises StorageFailed when the tiers' directories cannot be used."""
    unknown: list[str] = []
    rates: list[Rate] = []
    with _scratch(config.nvme.directory) as files, _scratch(arena_directory) as memory:
        arena = Arena(memory, SLAB_BYTES)
        try:
            arena.keep(())
            rates += measure(arena, files, clock, config.nvme.threads, rounds, progress)
            rates += _hbm_rates(arena, clock, rounds, progress, unknown)
            hardware = machine(config.nvme.directory)
        finally:
            arena.close()
    return Calibration(
        measured_wall_ns=clock.wall_ns(),
        machine=hardware,
        rates=tuple(rates),
        gpus=_gpus(unknown),
        unknown=tuple(unknown),
    )


def machine(directory: Path) -> str:
    """The hardware in one line, with the disk: another line needs another calibration."""
    device = directory.stat().st_dev
    return f"{Machine().hardware()}, disk {os.major(device)}:{os.minor(device)}"


def _gpus(unknown: list[str]) -> tuple[Gpu, ...]:
    try:
        return gpus()
    except Unavailable as error:
        unknown.append(f"gpus: {error.message}")
        return ()


def _hbm_rates(arena: Arena, clock: Clock, rounds: int, progress: Progress, unknown: list[str]) -> list[Rate]:
    """DDR to a rank's arena and back; both directions in the same rounds."""
    try:
        from .ring_attention.measure import HbmMeasurement, best_device
    except ImportError:
        unknown.append("ddr->hbm, hbm->ddr: no torch here; install holdfast[runner]")
        return []
    device = best_device()
    if device == "cpu":
        unknown.append("hbm: no GPU here, so ranks keep their KV in CPU memory, and that was measured")
    buffers = [arena.view(slot) for slot in scratch_slots(0)]
    measurement = HbmMeasurement(EXTENT_SPEC, buffers, device, clock)
    loads, saves, few = [], [], []
    for number in range(rounds + 1):
        progress(f"HBM: round {number} of {rounds}" if number else "HBM: warming up")
        loads.append(measurement.load())
        saves.append(measurement.save())
        few.append(measurement.load_few())
    return [rate("ddr->hbm", SLAB_BYTES, loads[1:], few[1:]), rate("hbm->ddr", SLAB_BYTES, saves[1:], few[1:])]


@contextmanager
def _scratch(beside: Path) -> Iterator[Path]:
    """A directory of ours on the same device, removed at the end; `beside` too, where there was none."""
    is_ours = not beside.exists()
    try:
        beside.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=beside))
    except OSError as error:
        raise StorageFailed(f"{beside} cannot be measured: {error.strerror}") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if is_ours:
            with suppress(OSError):  # somebody uses it by now
                beside.rmdir()
