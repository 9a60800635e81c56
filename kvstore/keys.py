"""Keys: one 128-bit keyed BLAKE2b per block, chained, so equal keys mean equal prefixes under one model and tenant.

The tenant's secret keys the hash: keys cannot be forged across tenants, nor guessed from public text. A last,
part-filled block has a key too (over fewer tokens); it equals no key of a full block. What KV depends on besides
tokens (an adapter, a picture behind placeholder tokens, a salt) goes into the key of the block where it begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from .errors import EmptyDocument, PartialPage, TokenOutOfRange
from .spec import KVSpec

KEY_BYTES: Final = 16
SECRET_BYTES: Final = 32
ROOT: Final = bytes(KEY_BYTES)
PLAIN, EXTENDED = b"", b"extra"  # apart, so that no extra part reads as tokens
LENGTH_BYTES: Final = 4

Extras = Mapping[int, bytes]  # by block index; empty bytes are none
NO_EXTRAS: Final[Extras] = MappingProxyType({})

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


def document_tokens(ids: Sequence[int] | npt.NDArray[np.integer], spec: KVSpec) -> Tokens:
    """The tokens of a document: as `as_tokens`; native KV in whole pages. Raises PartialPage as well."""
    tokens = as_tokens(ids, spec)
    rest = len(tokens) % spec.block_tokens
    if spec.page_format and rest:
        raise PartialPage(
            f"{len(tokens)} tokens end within a page of {spec.block_tokens}; store the first {len(tokens) - rest}"
        )
    return tokens


def token_list(data: bytes) -> list[int]:
    """Token ids from little-endian uint32, as messages carry them."""
    return [int(token) for token in np.frombuffer(data, dtype="<u4")]


def block_keys(
    tokens: Tokens,
    spec: KVSpec,
    secret: bytes,
    previous: bytes = ROOT,
    extras: Extras = NO_EXTRAS,
    first: int = 0,
) -> list[bytes]:
    """One key per block of `spec.block_tokens` tokens, the last block possibly part-filled.

    `first` is the index of the first block, `previous` the key of the block in front of it. Keys chain, so an extra
    part of one block changes the keys of all that follow.
    """
    assert len(secret) == SECRET_BYTES, "a tenant secret has 32 bytes"
    data = memoryview(tokens.astype("<u4", copy=False).tobytes())
    plain, extended = (
        hashlib.blake2b(spec.fingerprint(), digest_size=KEY_BYTES, key=secret, person=person)
        for person in (PLAIN, EXTENDED)
    )
    step = spec.block_tokens * 4
    keys = []
    key = previous
    for index, start in enumerate(range(0, len(data), step), first):
        extra = extras.get(index)
        block = extended.copy() if extra else plain.copy()
        block.update(key)
        block.update(data[start : start + step])
        if extra:
            block.update(extra)
            block.update(len(extra).to_bytes(LENGTH_BYTES, "little"))  # tokens of a part-filled block end somewhere
        key = block.digest()
        keys.append(key)
    return keys
