"""Hazards: the chance that something idle is used in the age bin it is in, given that it was not until then.

    logit hazard(x, j) = sum over features i of w[i][x_i][j] + c[i][x_i]

x_i is the level of feature i, j the bin of age: a discrete-time hazard regression whose terms are table look-ups. It is
learned online by AdaGrad on the log-loss of what happened: bins survived unused, and bins in which the use came. `w` is
how a feature bends the curve of age, `c` how it lifts all of it, learned from every bin and so much faster.

Scores use a running average of the tables: learning never ends, so that the tables themselves always shake a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .ages import BINS
from .features import FEATURES, LEVELS

RATE: Final = 0.2
CAUTION: Final = 8.0  # where AdaGrad's sums of squares start: the first records move little
CAUTION_OF_AGE: Final = 2.0
AVERAGE_SHARE: Final = 0.1  # of a step, in the average; more while there were few steps
PRIOR_LOGIT: Final = -2.0
PRIOR_LOGIT_PER_BIN: Final = -0.15

CELLS: Final = len(FEATURES) * LEVELS
AGE: Final = [feature.name for feature in FEATURES].index("age")
_FIRST_CELLS: Final = np.arange(len(FEATURES)) * LEVELS


def cells(levels: Sequence[bytes]) -> NDArray[np.int64]:
    """Rows of the tables that these levels look up: one line for each, one column a feature."""
    return np.frombuffer(b"".join(levels), np.uint8).reshape(len(levels), len(FEATURES)) + _FIRST_CELLS


@dataclass(slots=True)
class Records:
    """What was seen: bins `first` to `last` were entered, all survived but the last if it was `used` there."""

    levels: list[bytes] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)

    def add(self, levels: bytes, first: int, last: int, *, used: int) -> None:
        self.levels.append(levels)
        self.first.append(first)
        self.last.append(last)
        self.used.append(used)


class Hazards:
    """The tables, learned record by record, and their average."""

    def __init__(self) -> None:
        self._curves = np.zeros((CELLS, BINS))
        self._curves[AGE * LEVELS] = PRIOR_LOGIT + PRIOR_LOGIT_PER_BIN * np.arange(BINS)
        self._curve_squares = np.full((CELLS, BINS), CAUTION)
        self._curve_squares[AGE * LEVELS : (AGE + 1) * LEVELS] = CAUTION_OF_AGE
        priors = np.array([feature.prior for feature in FEATURES])[:, None]
        self._lifts = (priors * np.maximum(0, np.arange(LEVELS) - 1)).ravel()
        self._lift_squares = np.full(CELLS, CAUTION)
        self._steps = 0
        self._average = self._curves + self._lifts[:, None]

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log-odds of a use in every bin, by the averaged tables; a line for each line of `cells`."""
        found: NDArray[np.float64] = self._average[rows].sum(axis=1)
        return found

    def parts(self, levels: bytes, bin_index: int) -> list[float]:
        """What each of FEATURES adds to the log-odds of a use in one bin."""
        parts: list[float] = self._average[cells([levels])[0], bin_index].tolist()
        return parts

    def learn(self, records: Records) -> None:
        """One step of AdaGrad on a batch, and one of the average."""
        if records.levels:
            self._step(records)
        share = max(AVERAGE_SHARE, 1 / (1 + self._steps))
        self._steps += 1
        self._average += share * (self._curves + self._lifts[:, None] - self._average)

    def _step(self, records: Records) -> None:
        first = np.array(records.first)
        counts = np.array(records.last) - first + 1
        stops = counts.cumsum()
        record = np.repeat(np.arange(len(counts)), counts)
        bins = np.arange(stops[-1]) - np.repeat(stops - counts - first, counts)
        rows = cells(records.levels)[record]
        spots = rows * BINS + bins[:, None]
        logits = self._curves.ravel()[spots].sum(axis=1) + self._lifts[rows].sum(axis=1)
        gradients = 1 / (1 + np.exp(np.minimum(-logits, 500.0)))
        gradients[stops - 1] -= records.used
        repeated = np.repeat(gradients, len(FEATURES))
        _descend(self._curves.ravel(), self._curve_squares.ravel(), spots.ravel(), repeated)
        _descend(self._lifts, self._lift_squares, rows.ravel(), repeated)
        self._lifts[AGE * LEVELS] = 0.0  # its curve says it all


def _descend(
    table: NDArray[np.float64], squares: NDArray[np.float64], cell: NDArray[np.int64], gradients: NDArray[np.float64]
) -> None:
    """AdaGrad's step, in place, for all gradients of a batch at the cells they belong to: a cell's sum is one."""
    sums = np.bincount(cell, gradients, len(table))
    squares += sums * sums
    table -= RATE * sums / np.sqrt(squares)
