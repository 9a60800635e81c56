"""Pauses: keeps Python's garbage collector from stopping the daemon for long.

A full collection looks at every object there is: 0.2 s with 100,000 extents, in the middle of whatever is going on.
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 700  # new objects are looked at together
MIDDLE: Final = 3  # after more such looks than this, what they left is looked at again: often, so that it is little
FULL: Final = 300  # after more of those, all that there is: a third as often as with the 10 times 10 of Python


def shorten_pauses() -> None:
    """What is here by now stays, and is never looked at again; of what comes, garbage is looked for in small steps."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, FULL)
