"""Ages: how long something has been idle, in bins of half an octave.

Bin 0 ends at half a second, the last begins at 36 hours: what a session, a tool call or a night leave idle.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

import numpy as np

FIRST_NS: Final = 500_000_000
BINS: Final = 37
STOPS_NS: Final = tuple(round(FIRST_NS * 2 ** (bin_index / 2)) for bin_index in range(BINS - 1))  # the last has none
STARTS_SECONDS: Final = np.array((0, *STOPS_NS)) / 1e9
WIDTHS_SECONDS: Final = np.diff(np.append(STARTS_SECONDS, FIRST_NS * 2 ** ((BINS - 1) / 2) / 1e9))
NEVER_NS: Final = int(np.iinfo(np.int64).max)


def age_bin(age_ns: int) -> int:
    """The bin of an age; what is not idle yet is in the first."""
    return bisect_right(STOPS_NS, age_ns)


def leaves_bin_ns(used_ns: int, bin_index: int) -> int:
    """When something last used at `used_ns` will have been idle for longer than this bin."""
    return used_ns + STOPS_NS[bin_index] if bin_index < BINS - 1 else NEVER_NS
