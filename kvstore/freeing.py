"""Freeing by name: a document goes down to a tier, and so out of all nearer ones; to "none" out of the cache."""

from __future__ import annotations

from typing import Final, Literal

from .errors import InvalidRequest
from .residency import Tier

To = Literal["ddr", "nvme", "none"]
EMPTIED: Final[dict[str, Tier]] = {"ddr": Tier.HBM, "nvme": Tier.DDR, "none": Tier.NVME}


def emptied(to: str) -> Tier:
    """The lowest tier that nothing stays in. Raises InvalidRequest."""
    tier = EMPTIED.get(to)
    if tier is None:
        raise InvalidRequest(f"nothing is freed to {to!r}; use one of {', '.join(EMPTIED)}")
    return tier
