"""Calibration: what this machine's memories and the ways between them were measured to do, and when.

A rate carries its spread, because a median alone hides a noisy machine. What could not be measured is named with the
reason: unknown is not zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

from .costs import LinkSpeed

# What a group may tell: everything else is malformed.
PerSecond = Annotated[float, msgspec.Meta(gt=0, le=1e21)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Nanoseconds = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Spread = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Word = Annotated[str, msgspec.Meta(max_length=255)]
Threshold = tuple[Tokens, Tokens | None]


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
    `key_bytes_per_second` is how fast a call with one query gets through KV. A shift is one hop of the ring, an
    exchange one all-to-all (its bytes are those that a rank sends), a copy packs a message. `overlap` is the part of
    the shorter of a shift and the computing beside it that really goes on at once: 0 where transfers cost the same
    cores, 1 where hardware moves the bytes. `spread`: by what share the median round was slower than these at worst;
    much of it, and the machine had something else to do.
    """

    flops_per_second: PerSecond
    key_bytes_per_second: PerSecond
    bytes_per_second: PerSecond
    latency_ns: Nanoseconds
    exchange_bytes_per_second: PerSecond
    exchange_latency_ns: Nanoseconds
    copy_bytes_per_second: PerSecond
    overlap: Share
    spread: Spread = 0.0

    def shift_seconds(self, size_bytes: float) -> float:
        """One hop; 0 for no bytes, because an empty message is not sent."""
        return self.latency_ns / 1e9 + size_bytes / self.bytes_per_second if size_bytes else 0.0

    def exchange_seconds(self, size_bytes: float) -> float:
        """One all-to-all in which a rank sends that many bytes; 0 for none."""
        return self.exchange_latency_ns / 1e9 + size_bytes / self.exchange_bytes_per_second if size_bytes else 0.0

    def exposed_seconds(self, size_bytes: float, compute_seconds: float) -> float:
        """What is left of a hop beside that much computing."""
        shift_seconds = self.shift_seconds(size_bytes)
        return shift_seconds - self.overlap * min(shift_seconds, compute_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class RingSetting:
    """What a group's speed depends on: measured in another setting it says nothing of this one.

    `machine` and `device` describe the hardware of rank 0; heads are one rank's own, dims those of one head.
    """

    machine: Word
    device: Word
    communicator: Word
    kernel: Word
    cp: Count
    tp: Count
    dtype: Word
    heads: Count
    kv_heads: Count
    head_dim: Count
    value_dim: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class RingRate:
    """One measurement in a group.

    `pass_kv_from`: (cached tokens, from how many new ones on `auto` takes pass-KV there); None where it does not up to
    as many new tokens as cached ones.
    """

    setting: RingSetting
    speed: RingSpeed
    measured_wall_ns: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
    pass_kv_from: Annotated[tuple[Threshold, ...], msgspec.Meta(max_length=16)] = ()


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
