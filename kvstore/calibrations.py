"""Calibrations: what the machine was measured to do, and how well that predicts, over REST."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from aiohttp import web

from .calibration import Calibration, RingRate
from .errors import HoldfastError
from .problems import body, reply
from .service import Service

COMMIT_SECONDS: Final = 30.0


class LinkView(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner predicts a hop with now: calibrated, then corrected by every load. 0 moves is a prior."""

    hop: str
    bytes_per_second: float
    latency_ns: float
    moves: int


class PredictionView(msgspec.Struct, frozen=True, kw_only=True):
    """How far predictions of remembered swaps were off: |predicted - taken| / taken. Null when there were none."""

    swaps: int
    median_error: float | None
    p90_error: float | None


class CalibrationView(msgspec.Struct, frozen=True, kw_only=True):
    """The newest calibration, null before the first, and what is made of it; what groups were measured to do."""

    calibration: Calibration | None
    rings: list[RingRate]
    links: list[LinkView]
    prediction: PredictionView


class Calibrations:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        return [web.get("/v1/calibration", self.show), web.post("/v1/calibration", self.take)]

    async def show(self, request: web.Request) -> web.Response:
        """See CalibrationView."""
        return reply(self._view())

    async def take(self, request: web.Request) -> web.Response:
        """Predict by this calibration from now on, and after a restart."""
        kept: asyncio.Future[HoldfastError | None] = asyncio.get_running_loop().create_future()

        def done(error: HoldfastError | None) -> None:
            if not kept.done():  # the handler may have been cancelled
                kept.set_result(error)

        self.service.measurements.calibrate(await body(request, Calibration), done)
        error = await asyncio.wait_for(kept, COMMIT_SECONDS)
        if error is not None:
            raise error
        return reply(self._view(), status=201)

    def _view(self) -> CalibrationView:
        planner = self.service.planner
        ledger = self.service.state.ledger
        errors = ledger.prediction_quantiles()
        return CalibrationView(
            calibration=planner.calibration,
            rings=self.service.measurements.rings(),
            links=[
                LinkView(
                    hop=str(hop),
                    bytes_per_second=link.bytes_per_second,
                    latency_ns=link.latency_ns,
                    moves=link.move_count,
                )
                for hop, link in planner.links.items()
            ],
            prediction=PredictionView(
                swaps=len(ledger.prediction_errors()), median_error=errors.get(0.5), p90_error=errors.get(0.9)
            ),
        )
