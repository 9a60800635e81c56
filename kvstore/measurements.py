"""Measurements: what the machine and its groups were measured to do; predictions and choices are made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from .calibration import Calibration, RingRate, RingSetting
from .errors import HoldfastError, InvalidRequest, SpecMismatch
from .orders import PutCalibration, PutPrefills, PutRings, Record, Write
from .prefills import Prefill
from .store import Store

MAX_SECONDS: Final = 1e7
RINGS_KEPT: Final = 64  # settings that groups were measured in

Done = Callable[[HoldfastError | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a catalog keeps of them."""

    prefills: tuple[PutPrefills, ...] = ()
    calibration: Calibration | None = None
    rings: tuple[RingRate, ...] = ()


NOTHING: Final = Measured()


class Measurements:
    """Takes them in, keeps them over a restart, and hands them out."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._planner = store.planner
        self._rings: dict[RingSetting, RingRate] = {}  # measured last stands last

    def restore(self, measured: Measured) -> None:
        """Take over what the catalog holds."""
        if measured.calibration is not None:
            self._planner.calibrate(measured.calibration)
        for row in measured.prefills:
            self._planner.prefills.observe(row.fingerprint, row.points)
        self._rings = {rate.setting: rate for rate in measured.rings}

    def observe_prefill(self, fingerprint: bytes, points: Sequence[Prefill]) -> None:
        """Measured prefills of a model: from here on recompute is priced by them. Raises SpecMismatch."""
        if fingerprint not in self._store.records.specs:
            raise SpecMismatch("this model is not registered; send its KVSpec first")
        least = min((min(p.cached_tokens, p.new_tokens - 1, p.ranks - 1) for p in points), default=0)
        if least < 0 or any(not 0 < p.seconds < MAX_SECONDS for p in points):
            raise InvalidRequest("a measured prefill has new tokens, ranks, and took a positive, finite time")
        self._planner.prefills.observe(fingerprint, points)
        self._write(PutPrefills(fingerprint, self._planner.prefills.points(fingerprint)), lambda _: None)

    def calibrate(self, calibration: Calibration, done: Done) -> None:
        """Predict by these measurements from now on; `done` hears that they will survive a restart.

        Raises InvalidRequest and changes nothing.
        """
        if any(rate.bytes_per_second < 1 or rate.latency_ns < 0 for rate in calibration.rates):
            raise InvalidRequest("a rate is at least one byte per second, a latency not negative")
        self._planner.calibrate(calibration)
        self._write(PutCalibration(calibration), done)

    def ring(self, setting: RingSetting) -> RingRate | None:
        """What a group in exactly that setting was measured to do."""
        return self._rings.get(setting)

    def rings(self) -> list[RingRate]:
        """Every group's, measured last first."""
        return list(reversed(self._rings.values()))

    def keep_ring(self, rate: RingRate, done: Done) -> None:
        """Groups in that setting choose by it from their next start on; `done` hears that it will survive a restart."""
        self._rings.pop(rate.setting, None)
        self._rings[rate.setting] = rate
        while len(self._rings) > RINGS_KEPT:
            del self._rings[next(iter(self._rings))]
        self._write(PutRings(tuple(self._rings.values())), done)

    def _write(self, record: Record, done: Done) -> None:
        write = Write(id=self._store.new_id(), records=(record,))
        self._store.submit(write, lambda outcome: done(outcome.error))
