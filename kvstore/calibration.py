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
class RingSpeed:
    """What the ranks of a group do to each other's attention, measured by all of them together.

    Rates are one rank's while all do the same. `flops_per_second` is attention's where queries are many;
    `key_bytes_per_second` is how fast a call reads KV where they are few. A shift is one hop of the ring, an exchange
    one all-to-all (its bytes are those that a rank sends), a copy packs a message. `overlap` is the part of the shorter
    of a shift and the computing beside it that really goes on at once: 0 where transfers cost the same cores, 1 where
    hardware moves the bytes. `spread` is the widest (slowest - fastest) / median of these over the rounds.
    """

    flops_per_second: float
    key_bytes_per_second: float
    bytes_per_second: float
    latency_ns: float
    exchange_bytes_per_second: float
    exchange_latency_ns: float
    copy_bytes_per_second: float
    overlap: float
    spread: float = 0.0

    def shift_seconds(self, size_bytes: float) -> float:
        """One hop; 0 for no bytes, because an empty message is not sent."""
        return self.latency_ns / 1e9 + size_bytes / self.bytes_per_second if size_bytes else 0.0

    def exposed_seconds(self, size_bytes: float, compute_seconds: float) -> float:
        """What is left of a hop beside that much computing."""
        shift_seconds = self.shift_seconds(size_bytes)
        return shift_seconds - self.overlap * min(shift_seconds, compute_seconds)


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
