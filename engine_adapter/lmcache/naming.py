"""Names of LMCache's objects: a namespace for each shard of a model's KV in one form, in it a key for each chunk.

lmcache-<model, "/" as "@">-<kv_rank, 8 hex digits>-<object group, hex>-<form, 16 hex digits>, and in it
<cache_salt>@<chunk hash>. Both can be read back: LMCache allows no "@" in model names and salts. What is stored for one
salt has one key prefix, `salt_prefix`, and what is stored for one model one prefix of namespaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple, Protocol

SALT_MAX: Final = 64  # of 128 bytes of a key; longer ones are digested, and cannot be read back
DIGESTED: Final = b"\0"  # not allowed in a salt
NAMESPACE: Final = re.compile(
    r"lmcache-(?P<model>.+)-(?P<rank>[0-9a-f]{8})-(?P<group>[0-9a-f]+)-(?P<form>[0-9a-f]{16})"
)


class ObjectKey(Protocol):
    """LMCache's name of an object."""

    chunk_hash: bytes
    model_name: str
    kv_rank: int
    object_group_id: int
    cache_salt: str


class Shard(NamedTuple):
    """Which part of which model's KV a namespace holds."""

    model: str
    kv_rank: int
    group: int


def shard_of(key: ObjectKey) -> Shard:
    """Where LMCache's object belongs."""
    return Shard(key.model_name, key.kv_rank, key.object_group_id)


def form_of(shapes: Iterable[Sequence[int]], dtypes: Iterable[object]) -> str:
    """What the bytes of an object are, as LMCache lays them out."""
    return ";".join(f"{dtype}{tuple(shape)}" for shape, dtype in zip(shapes, dtypes, strict=True))


def is_packed(form: str) -> bool:
    """Whether it is a row of bytes that a codec of LMCache made: it says nothing of what is in it."""
    return re.fullmatch(r"torch\.uint8\(\d+,\)", form) is not None


def namespace_of(shard: Shard, form: str, qualifier: str = "") -> str:
    """The namespace of a shard's objects of this form. `qualifier`: what else changes what the bytes mean."""
    digest = blake2b(digest_size=8)
    for part in (form, qualifier, weights_of(shard.model)):
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return f"{_front(shard.model)}{shard.kv_rank:08x}-{shard.group:x}-{digest.hexdigest()}"


def _front(model: str) -> str:
    """What the namespaces of a model begin with."""
    return f"lmcache-{model.replace('/', '@')}-"


def shard_in(namespace: str) -> Shard | None:
    """Which shard a namespace holds; None for a namespace that is not LMCache's."""
    found = NAMESPACE.fullmatch(namespace)
    if found is None:
        return None
    return Shard(found["model"].replace("@", "/"), int(found["rank"], 16), int(found["group"], 16))


@cache
def weights_of(model: str) -> str:
    """What changes when the weights of a local model do; "" for a name of a hub.

    LMCache's keys have only the model's name, and what it keeps ends with it; ours stays. By names, sizes and times, as
    reading the weights would keep the first lookup waiting. Asked once: while LMCache's server lives its own copies mix
    with ours.
    """
    directory = Path(model)
    if not directory.is_dir():
        return ""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return "\n".join(f"{path.name} {(seen := path.stat()).st_size} {seen.st_mtime_ns}" for path in files)


def salt_prefix(salt: str) -> bytes:
    """What all keys of one salt begin with, in every namespace."""
    raw = salt.encode()
    if len(raw) > SALT_MAX:
        raw = DIGESTED + blake2b(raw, digest_size=16).digest()
        return raw + b"@"
    return raw + b"@"


def key_of(key: ObjectKey) -> bytes:
    """The key of an object within its namespace."""
    return salt_prefix(key.cache_salt) + key.chunk_hash


def salt_and_hash(key: bytes) -> tuple[str, bytes] | None:
    """What a key was made of; None where its salt was digested."""
    if key.startswith(DIGESTED):
        return None
    salt, _, chunk_hash = key.partition(b"@")
    return salt.decode(), chunk_hash
