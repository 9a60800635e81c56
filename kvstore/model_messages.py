"""Messages about a model's KV as a whole."""

from __future__ import annotations

import msgspec

from .message import Count, Line, Message


class ClearModel(Message, frozen=True):
    """Forget what this tenant has stored under these specs: all of it, or (`scope` "unnamed") what has no name."""

    fingerprints: list[bytes]
    scope: Line = "all"


class Cleared(Message, frozen=True):
    """How many documents went, and how many could not: they are leased, pinned or being written."""

    deleted: Count
    kept: Count = msgspec.field(default=0)
