"""Prefix messages: keys of token sequences, and how much of them is in the cache (wire has the others)."""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

import msgspec

from .errors import InvalidRequest
from .keys import Extras
from .message import Count, Message
from .views import PrefixView

EXTRAS_MAX: Final = 65_536
EXTRA_BYTES_MAX: Final = 256

ExtraPart = Annotated[bytes, msgspec.Meta(max_length=EXTRA_BYTES_MAX)]
ExtraParts = Annotated[list[tuple[Count, ExtraPart]], msgspec.Meta(max_length=EXTRAS_MAX)]  # (block index, part)


class KeysOf(Message, frozen=True):
    """The keys of a token sequence (little-endian uint32), to look it up with."""

    fingerprint: bytes
    tokens: bytes
    extras: ExtraParts = msgspec.field(default_factory=list)


class Lookup(Message, frozen=True):
    """How much of a prefix is in the cache, by the keys of its blocks, one after another."""

    fingerprint: bytes
    keys: bytes


class LookupTokens(Message, frozen=True):
    """The same by its tokens, little-endian uint32."""

    fingerprint: bytes
    tokens: bytes
    extras: ExtraParts = msgspec.field(default_factory=list)


class AttachPrefix(Message, frozen=True):
    """Lease the longest prefix of these tokens that is in the cache, and begin to bring it to DDR.

    Answered as AttachDocument is; `Attached.document` and `token_count` say what was found.
    """

    fingerprint: bytes
    tokens: bytes
    deadline_seconds: float
    extras: ExtraParts = msgspec.field(default_factory=list)


class Keys(Message, frozen=True):
    """Keys of blocks, 16 bytes each, one after another."""

    keys: bytes


class Found(Message, frozen=True):
    """What is in the cache of a prefix."""

    prefix: PrefixView


def extra_parts(extras: Extras | None) -> list[tuple[int, bytes]]:
    """Extra key parts as messages carry them: of a part that is too long its digest. Raises InvalidRequest."""
    if not extras:
        return []
    if len(extras) > EXTRAS_MAX:
        raise InvalidRequest(
            f"{len(extras)} blocks have extra key parts; at most {EXTRAS_MAX}: say a part once, where "
            "it begins, because keys chain"
        )
    return [
        (index, part if len(part) <= EXTRA_BYTES_MAX else hashlib.blake2b(part).digest())
        for index, part in sorted(extras.items())
    ]
