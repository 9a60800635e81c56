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
_STOPS_SECONDS: Final = STARTS_SECONDS + WIDTHS_SECONDS
_LEAST_SECONDS: Final = LEAST_SHARE * WIDTHS_SECONDS
_AFTER: Final = np.triu(np.tile(WIDTHS_SECONDS, (BINS, 1)), 1)  # by bin: the spans of those behind it


def spans_seconds(ages_ns: Sequence[int]) -> NDArray[np.float64]:
    """How long each bin still lasts for things of these ages: nothing if it is past. One line each."""
    bins = [age_bin(age_ns) for age_ns in ages_ns]
    spans = _AFTER[bins]
    left = _STOPS_SECONDS[bins] - np.array(ages_ns, np.float64) / 1e9
    spans[np.arange(len(bins)), bins] = np.maximum(left, _LEAST_SECONDS[bins])
    return spans


def _rates(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Uses per second that make these odds of a use within each bin."""
    within = np.minimum(np.maximum(logits, -LOGIT_MAX), LOGIT_MAX)
    found: NDArray[np.float64] = np.log1p(np.exp(within)) / WIDTHS_SECONDS
    return found


def indices(logits: NDArray[np.float64], spans: NDArray[np.float64]) -> NDArray[np.float64]:
    """Indices per second of things with these log-odds of use in each bin."""
    rates = _rates(logits)
    survivals = np.exp(-(rates * spans).cumsum(axis=1))
    used = 1.0 - survivals
    in_bin = used.copy()
    in_bin[:, 1:] -= used[:, :-1]
    # Those used in a bin and those who live on wait, taken together, as long as its uses divided by its rate.
    waits = (in_bin / rates).cumsum(axis=1)
    # Bins that are past have neither uses nor waits.
    found: NDArray[np.float64] = (used / np.maximum(waits, 1e-300)).max(axis=1)
    return found


def reuse_probability(logits: NDArray[np.float64], spans: NDArray[np.float64], horizon_seconds: float) -> float:
    """Chance that the one thing with these log-odds is used within a time from now on."""
    starts = np.cumsum(spans, axis=1) - spans
    return float(-np.expm1(-np.sum(_rates(logits) * np.minimum(np.maximum(horizon_seconds - starts, 0.0), spans))))
