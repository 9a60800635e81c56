"""Keying: the keys of long token sequences, made in steps between which the loop serves others."""

from __future__ import annotations

import asyncio
from typing import Final

import numpy as np

from .errors import InvalidRequest
from .keys import ROOT, Extras, Tokens, as_tokens, block_keys
from .service import Service

KEYS_AT_ONCE: Final = 512  # half a millisecond of work


def sent_tokens(data: bytes) -> Tokens:
    """Token ids as they travel: little-endian uint32. Raises InvalidRequest."""
    if len(data) % 4:
        raise InvalidRequest("tokens are little-endian uint32, four bytes each")
    return np.frombuffer(data, dtype="<u4")


async def keys_of(service: Service, tenant: str, fingerprint: bytes, tokens: Tokens, extras: Extras) -> list[bytes]:
    """One key per block. Raises SpecMismatch, EmptyDocument or TokenOutOfRange."""
    spec, secret = service.keying(tenant, fingerprint)
    checked = as_tokens(tokens, spec)
    keys = [ROOT]
    step = KEYS_AT_ONCE * spec.block_tokens
    for start in range(0, len(checked), step):
        keys += block_keys(checked[start : start + step], spec, secret, keys[-1], extras, len(keys) - 1)
        await asyncio.sleep(0)
    return keys[1:]
