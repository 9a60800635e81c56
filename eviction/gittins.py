"""Gittins index: the best rate of reuse per second of residence that something idle can still offer.

    index = max over stops k of P(used by k) / E[seconds until used or k]

from the hazards of its age bins on. It is the value of the right to keep it for as long as that pays: something likely
to come back soon or not at all scores by the soon, and sinks when that time has passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .ages import BINS, STARTS_SECONDS, WIDTHS_SECONDS, age_bin

LEAST_SHARE: Final = 0.02  # of a bin is always left: its end is no cliff
LOGIT_MAX: Final = 30.0  # beyond that it is as good as certain, and rates must not vanish
_BINS: Final = np.arange(BINS)
_STOPS_SECONDS: Final = STARTS_SECONDS + WIDTHS_SECONDS


def spans_seconds(ages_ns: Sequence[int]) -> NDArray[np.float64]:
    """How long each bin still lasts for things of these ages: nothing if it is past. One line each."""
    bins = np.array([age_bin(age_ns) for age_ns in ages_ns])
    left = np.maximum(_STOPS_SECONDS[bins] - np.array(ages_ns) / 1e9, LEAST_SHARE * WIDTHS_SECONDS[bins])
    spans = np.where(bins[:, None] < _BINS, WIDTHS_SECONDS, 0.0)
    spans[np.arange(len(bins)), bins] = left
    return spans


def _rates(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Uses per second that make these odds of a use within each bin."""
    return np.log1p(np.exp(np.clip(logits, -LOGIT_MAX, LOGIT_MAX))) / WIDTHS_SECONDS


def indices(logits: NDArray[np.float64], spans: NDArray[np.float64]) -> NDArray[np.float64]:
    """Indices per second of things with these log-odds of use in each bin."""
    rates = _rates(logits)
    survivals = np.exp(-np.cumsum(rates * spans, axis=1))
    deaths = -np.diff(survivals, axis=1, prepend=1.0)
    # Waiting in a bin takes deaths / rate on the mean: those who live on waited for all of it.
    waits = np.cumsum(deaths / rates, axis=1)
    ratios = np.divide(1.0 - survivals, waits, out=np.zeros_like(waits), where=waits > 0.0)
    found: NDArray[np.float64] = ratios.max(axis=1)
    return found


def reuse_probability(logits: NDArray[np.float64], spans: NDArray[np.float64], horizon_seconds: float) -> float:
    """Chance that the one thing with these log-odds is used within a time from now on."""
    rates = _rates(logits)
    starts = np.cumsum(spans, axis=1) - spans
    return float(-np.expm1(-np.sum(rates * np.clip(horizon_seconds - starts, 0.0, spans))))
