"""Bypass: an operator's switch that makes every engine go on without the cache, until it is turned back."""

from __future__ import annotations

import msgspec

from .errors import Bypassed


class Bypass(msgspec.Struct, frozen=True, kw_only=True):
    """The switch is on. It survives restarts: whoever turned it had a reason."""

    reason: str
    since_wall_ns: int

    def refusal(self) -> Bypassed:
        """What whoever asks for KV is told."""
        why = f": {self.reason}" if self.reason else ""
        return Bypassed(f"the cache is bypassed{why}; go on without it. `holdfast bypass off` ends that")
