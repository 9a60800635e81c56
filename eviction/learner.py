"""Learner: watches strands go idle and come back, and teaches the hazards what it saw.

All strands are watched, resident or ghost. A record is taken of each that is used, and of each that stayed idle until
it left a bin of age. Two things would give the answer away with the question:

* Features that move while a strand is idle are taken as it *entered* the bin. At the end of a bin that it survived they
  have moved further than at a use, and would tell the two apart.
* The record of a use is taken *before* the use splits the strand. Else being short would predict being used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from .ages import age_bin, leaves_bin_ns
from .features import levels_at_use, levels_now
from .hazard import Hazards, Records
from .strands import Strand, Strands

USES_PER_STEP: Final = 4  # records are learned from in batches


class Learner:
    """`saw_use` comes before the strands count a use, `idle` after."""

    def __init__(self, strands: Strands) -> None:
        self.hazards = Hazards()
        self._strands = strands
        self._records = Records()
        self._uses = 0

    def saw_use(self, strands: Sequence[Strand], now_ns: int) -> None:
        """These are about to be used: how long have they been idle? Now and then, look at all others, and learn."""
        self._uses += 1
        if self._uses % USES_PER_STEP == 0:
            self._look(now_ns)
            self.hazards.learn(self._records)
            self._records = Records()
        for strand in strands:
            reached = max(strand.age_bin, age_bin(now_ns - strand.used_ns))
            self._records.add(strand.levels, strand.age_bin, reached, used=1)
            strand.age_bin = reached

    def idle(self, strands: Sequence[Strand]) -> None:
        """These are idle from now on."""
        look_ns = self._strands.look_ns
        for strand in strands:
            strand.age_bin = 0
            strand.levels = levels_at_use(strand, self._strands.before(strand))
            look_ns[strand.slot] = leaves_bin_ns(strand.used_ns, 0)

    def _look(self, now_ns: int) -> None:
        """Record what survived: strands that have left the bin they were last seen in."""
        look_ns, by_slot = self._strands.look_ns, self._strands.by_slot
        for slot in np.flatnonzero(look_ns[: len(by_slot)] <= now_ns).tolist():
            strand = by_slot[slot]
            assert strand is not None, slot
            reached = age_bin(now_ns - strand.used_ns)
            if reached > strand.age_bin:
                self._records.add(strand.levels, strand.age_bin, reached - 1, used=0)
                strand.age_bin = reached
                strand.levels = levels_now(strand, self._strands.before(strand))
            look_ns[slot] = leaves_bin_ns(strand.used_ns, strand.age_bin)
