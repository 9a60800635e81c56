"""Calibrating: what a group decides by: found with the daemon, else measured once and kept there. One in every rank."""

from __future__ import annotations

from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from ..kvstore.calibration import RingRate, RingSetting
from ..kvstore.client import Client
from ..kvstore.clock import Clock
from ..kvstore.errors import HoldfastError
from ..kvstore.machine import Machine
from ..ring_attention.group_measure import choose_by, measure_prefills, measure_rate, setting_of
from ..ring_attention.runner import ContextParallelRunner
from .control import Measured

STEADY: Final = 1.0  # a wider spread, and the machine was busy: the next group tries to do better
PREFILL_NS: Final = 5_000_000_000


class Calibrating:
    """A rank's part of it; all ranks call the same, and only rank 0 talks with the daemon."""

    def __init__(self, daemon_socket: Path, tenant: str, clock: Clock) -> None:
        self._daemon_socket = daemon_socket
        self._tenant = tenant
        self._clock = clock

    def choose(self, runner: ContextParallelRunner) -> None:
        """Let the runner decide by what groups in its setting did on a quiet machine; measure where that is not known.

        A daemon that does not answer costs a measurement and no more. Raises GroupFailed.
        """
        setting = setting_of(runner, Machine().hardware())
        known = self._found(setting) if runner.group.rank == 0 else None
        if choose_by(runner, known if known is not None and known.speed.spread <= STEADY else None):
            return
        rate = measure_rate(runner, setting, self._clock)
        if known is not None and known.speed.spread <= rate.speed.spread:
            rate = known
        elif runner.group.rank == 0:
            self._keep(rate)
        choose_by(runner, rate)

    def measure(self, runner: ContextParallelRunner) -> Measured:
        """Measure, whatever is known, and keep nothing. Raises GroupFailed."""
        rate = None
        if runner.choice.shape.cp > 1:
            rate = measure_rate(runner, setting_of(runner, Machine().hardware()), self._clock)
            choose_by(runner, rate)
        points = measure_prefills(runner, self._clock, PREFILL_NS)
        return Measured(rate, [(p.cached_tokens, p.new_tokens, p.seconds) for p in points])

    def _found(self, setting: RingSetting) -> RingRate | None:
        with suppress(HoldfastError), closing(Client(self._daemon_socket, self._tenant)) as client:
            return client.ring(setting)
        return None

    def _keep(self, rate: RingRate) -> None:
        with suppress(HoldfastError), closing(Client(self._daemon_socket, self._tenant)) as client:
            client.keep_ring(rate)
