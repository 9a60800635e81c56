"""Keys: one 128-bit keyed BLAKE2b per block, chained, so equal keys mean equal prefixes under one model and tenant.

The tenant's secret keys the hash: keys cannot be forged across tenants, nor guessed from public text. A last,
part-filled block has a key too (over fewer tokens); it equals no key of a full block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from .errors import EmptyDocument, TokenOutOfRange
from .spec import KVSpec

KEY_BYTES: Final = 16
SECRET_BYTES: Final = 32
ROOT: Final = bytes(KEY_BYTES)

Tokens = npt.NDArray[np.uint32]


def as_tokens(ids: Sequence[int] | npt.NDArray[np.integer], spec: KVSpec) -> Tokens:
    """Token ids as uint32, checked against the vocabulary. Raises EmptyDocument or TokenOutOfRange."""
    array = np.asarray(ids)
    if array.size == 0:
        raise EmptyDocument("a document needs at least one token")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TokenOutOfRange("token ids are a flat sequence of integers")
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest >= spec.vocabulary_size:
        bad = lowest if lowest < 0 else highest
        raise TokenOutOfRange(f"token id {bad} is outside the vocabulary of {spec.vocabulary_size} tokens")
    return array.astype(np.uint32, copy=False)


def token_list(data: bytes) -> list[int]:
    """Token ids from little-endian uint32, as messages carry them."""
    return [int(token) for token in np.frombuffer(data, dtype="<u4")]


def block_keys(tokens: Tokens, spec: KVSpec, secret: bytes, previous: bytes = ROOT) -> list[bytes]:
    """One key per block of `spec.block_tokens` tokens, the last block possibly part-filled.

    `previous` is the key of the block in front of them.
    """
    assert len(secret) == SECRET_BYTES, "a tenant secret has 32 bytes"
    data = memoryview(tokens.astype("<u4", copy=False).tobytes())
    begun = hashlib.blake2b(spec.fingerprint(), digest_size=KEY_BYTES, key=secret)
    step = spec.block_tokens * 4
    keys = []
    key = previous
    for start in range(0, len(data), step):
        block = begun.copy()
        block.update(key)
        block.update(data[start : start + step])
        key = block.digest()
        keys.append(key)
    return keys
