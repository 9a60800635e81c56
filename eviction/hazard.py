"""Hazards: the chance that something idle is used in the age bin it is in, given that it was not until then.

    logit hazard(x, j) = sum over features i of w[i][x_i][j] + c[i][x_i]
                       + sum over relative features k of d[k][j - x_k]

x_i is the level of feature i, j the bin of age: a discrete-time hazard regression whose terms are table look-ups. It
is learned online by AdaGrad on the log-loss of what happened: bins survived unused, and bins in which the use came.
`w` is how a feature bends the curve of age, `c` how it lifts all of it, learned from every bin and so much faster. `d`
knows by how many bins the age is beyond one that was expected, whatever that is.

Scores use a running average of the tables: learning never ends, so that the tables themselves always shake a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .ages import BINS
from .features import FEATURES, LEVELS, RELATIVE, TERMS

RATE: Final = 0.1
CAUTION: Final = 8.0  # where AdaGrad's sums of squares start: the first records move little
CAUTION_OF_AGE: Final = 0.5
AVERAGE_SHARE: Final = 0.1  # of a step, in the average; more while there were few steps
MEMORY: Final = 50_000  # records
PRIOR_LOGIT: Final = -3.0  # in every bin: the hazard falls as one over age

CELLS: Final = len(FEATURES) * LEVELS
AGE: Final = [feature.name for feature in FEATURES].index("age")
ROWS: Final = CELLS + len(RELATIVE) * (BINS + 1)  # a relative feature has one for each bin, and one of zeros
_FIRST_ROWS: Final[NDArray[np.int64]] = np.array([*range(0, CELLS, LEVELS), *range(CELLS, ROWS, BINS + 1)])
_BEYOND: Final = BINS + np.arange(BINS) - np.arange(BINS)[:, None]  # by bins of expected age and of age


def cells(levels: Sequence[bytes]) -> NDArray[np.int64]:
    """Rows of the tables that these levels look up: one line for each, one column a term."""
    found = np.frombuffer(b"".join(levels), np.uint8).reshape(len(levels), len(TERMS))
    return _FIRST_ROWS + found


class Records:
    """What was seen: bins `first` to `last` were entered, all survived but the last if it was `used` there."""

    def __init__(self) -> None:
        self.levels: list[bytes] = []
        self.first: list[int] = []
        self.last: list[int] = []
        self.used: list[int] = []

    def __len__(self) -> int:
        return len(self.levels)

    def add(self, levels: bytes, first: int, last: int, *, used: int) -> None:
        """One more."""
        self.levels.append(levels)
        self.first.append(first)
        self.last.append(last)
        self.used.append(used)

    def lines(self) -> NDArray[np.uint8]:
        """One line each: levels, first, last, used."""
        levels = np.frombuffer(b"".join(self.levels), np.uint8).reshape(len(self.levels), len(TERMS))
        return np.column_stack((levels, np.array([self.first, self.last, self.used], np.uint8).T))


class Memory:
    """The last MEMORY records, of which as many as are new are learned again: chance decides which, by a fixed seed."""

    def __init__(self) -> None:
        self._lines = np.zeros((MEMORY, len(TERMS) + 3), np.uint8)
        self._count = 0
        self._random = np.random.default_rng(0)

    def recall(self, lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """These and as many old ones; these are remembered from now on."""
        found = lines
        if self._count:
            old = self._random.integers(0, min(self._count, MEMORY), len(lines))
            found = np.concatenate((lines, self._lines[old]))
        self._lines[(self._count + np.arange(len(lines))) % MEMORY] = lines
        self._count += len(lines)
        return found


class Hazards:
    """The tables, learned record by record, and their average."""

    def __init__(self) -> None:
        self._curves = np.zeros((ROWS, BINS))
        self._curves[AGE * LEVELS] = PRIOR_LOGIT
        self._curve_squares = np.full((ROWS, BINS), CAUTION)
        self._diagonals = np.zeros((len(RELATIVE), 2 * BINS))  # which the rows of relative features are made of
        self._diagonal_squares = np.full((len(RELATIVE), 2 * BINS), CAUTION)
        self._curve_squares[AGE * LEVELS : (AGE + 1) * LEVELS] = CAUTION_OF_AGE
        priors = np.array([feature.prior for feature in FEATURES])[:, None]
        self._lifts = np.zeros(ROWS)
        self._lifts[:CELLS] = (priors * np.maximum(0, np.arange(LEVELS) - 1)).ravel()
        self._lift_squares = np.full(ROWS, CAUTION)
        self._memory = Memory()
        self._steps = 0
        self._average = self._curves + self._lifts[:, None]

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log-odds of a use in every bin, by the averaged tables; a line for each line of `cells`."""
        found: NDArray[np.float64] = np.einsum("ifj->ij", self._average.take(rows, axis=0))
        return found

    def parts(self, levels: bytes, bin_index: int) -> list[float]:
        """What each of TERMS adds to the log-odds of a use in one bin."""
        parts: list[float] = self._average[cells([levels])[0], bin_index].tolist()
        return parts

    def learn(self, records: Records) -> None:
        """One step of AdaGrad on a batch, and one of the average."""
        if records:
            self._step(self._memory.recall(records.lines()))
        share = max(AVERAGE_SHARE, 1 / (1 + self._steps))
        self._steps += 1
        self._average += share * (self._curves + self._lifts[:, None] - self._average)

    def _step(self, lines: NDArray[np.uint8]) -> None:
        first, last, used = lines[:, len(TERMS) :].T.astype(np.int64)
        counts = last - first + 1
        stops = counts.cumsum()
        record = np.repeat(np.arange(len(counts)), counts)
        bins = np.arange(stops[-1]) - np.repeat(stops - counts - first, counts)
        levels = lines[record, : len(TERMS)]
        rows = levels + _FIRST_ROWS
        spots = rows * BINS + bins[:, None]
        fixed = rows[:, : len(FEATURES)]
        logits = np.einsum("if->i", self._curves.take(spots)) + np.einsum("if->i", self._lifts.take(fixed))
        gradients = 1 / (1 + np.exp(np.minimum(-logits, 500.0)))
        gradients[stops - 1] -= used
        repeated = np.repeat(gradients, len(FEATURES))
        _descend(self._curves.ravel(), self._curve_squares.ravel(), spots[:, : len(FEATURES)].ravel(), repeated)
        _descend(self._lifts, self._lift_squares, fixed.ravel(), repeated)
        self._lifts[AGE * LEVELS] = 0.0  # its curve says it all
        for number, expected in enumerate(levels[:, len(FEATURES) :].T.astype(np.int64)):
            known = expected < BINS
            diagonal = self._diagonals[number]
            beyond = BINS + bins[known] - expected[known]
            _descend(diagonal, self._diagonal_squares[number], beyond, gradients[known])
            start = CELLS + number * (BINS + 1)
            self._curves[start : start + BINS] = diagonal[_BEYOND]


def _descend(
    table: NDArray[np.float64], squares: NDArray[np.float64], cell: NDArray[np.int64], gradients: NDArray[np.float64]
) -> None:
    """AdaGrad's step, in place, for all gradients of a batch at the cells they belong to: a cell's sum is one."""
    sums = np.bincount(cell, gradients, len(table))
    squares += sums * sums
    table -= RATE * sums / np.sqrt(squares)
