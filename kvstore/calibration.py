"""Calibration: what this machine's memories and the ways between them were measured to do, and when.

A rate carries its spread, because a median alone hides a noisy machine. What could not be measured is named with the
reason: unknown is not zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from .costs import LinkSpeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """One tier ("ddr") or one hop ("nvme->ddr"): medians of `rounds` rounds of `size_bytes` each.

    `slowest` and `fastest` are the bytes per second of single rounds; `latency_ns` is one move of 4 KiB.
    """

    name: str
    size_bytes: int
    rounds: int
    bytes_per_second: float
    slowest: float
    fastest: float
    latency_ns: int

    def link(self) -> LinkSpeed:
        """What the planner predicts a hop with."""
        return LinkSpeed(
            bytes_per_second=self.bytes_per_second, latency_ns=float(self.latency_ns), move_count=self.rounds
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What a GPU's driver says of it; None is unknown. `nvlinks` counts the links that are up."""

    index: int
    name: str
    hbm_bytes: int | None = None
    hbm_free_bytes: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    nvlinks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """One run of `holdfast calibrate`. `machine` describes the hardware: another machine needs another run."""

    measured_wall_ns: int
    machine: str
    rates: tuple[Rate, ...]
    gpus: tuple[Gpu, ...] = ()
    unknown: tuple[str, ...] = ()

    def links(self) -> dict[str, LinkSpeed]:
        """The measured hops by name, "nvme->ddr" and so on."""
        return {rate.name: rate.link() for rate in self.rates if "->" in rate.name}
