"""Message: the base of everything that travels between the daemon and engines, and what its fields may claim."""

from __future__ import annotations

from typing import Annotated

import msgspec

# What a peer may claim. No machine has more, and sums of these still fit the 64 bits that a message can carry.
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=10**6)]
Line = Annotated[str, msgspec.Meta(max_length=1000)]  # what people are shown


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all bodies; the class name is the tag."""
