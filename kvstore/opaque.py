"""Opaque objects: bytes that an engine knows by a key of its own, stored like everything else and never looked into.

An object is a document of one extent, named `namespace/key in hex`, whose "tokens" are its bytes. Its spec is one layer
with one plane of a size class: sizes are rounded up to a few classes, lest every size has a model and slabs of its own.
No formula about prefills may take the bytes for tokens; `worth_tokens` says what computing an object again takes.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

from .document import PROMPT, Document, DocumentId, checked_name
from .errors import DocumentTooLarge, EmptyDocument, InvalidName
from .extent import Extent, ExtentId
from .geometry import PLANE_ALIGN_BYTES
from .keys import KEY_BYTES
from .spec import GroupKind, KVSpec, LayerGroup

OBJECT_KEY_MAX: Final = 128  # bytes
OBJECT_BYTES_MAX: Final = 1 << 30
OBJECTS_AT_ONCE: Final = 256  # of one message: some milliseconds of the daemon's time
LISTED_AT_ONCE: Final = 4096
CLASSES_PER_OCTAVE: Final = 4  # so at most a fifth of a slot is padding
TOKEN_BYTES: Final = 131_072  # of a model that nothing is known of: that of the prior prefill curve


def rounded(count: int, per_octave: int = CLASSES_PER_OCTAVE) -> int:
    """The next number of at most `per_octave` steps (a power of two) between powers of two: itself where it is one."""
    assert count > 0, count
    step = 1 << max(0, (count - 1).bit_length() - per_octave.bit_length())
    return -(-count // step) * step


def class_bytes(size_bytes: int) -> int:
    """The slot that so many bytes take: whole pages. Raises EmptyDocument or DocumentTooLarge."""
    if size_bytes < 1:
        raise EmptyDocument("an object has at least one byte")
    if size_bytes > OBJECT_BYTES_MAX:
        raise DocumentTooLarge(f"an object has at most {OBJECT_BYTES_MAX} B, not {size_bytes}: store it in parts")
    return rounded(-(-size_bytes // PLANE_ALIGN_BYTES)) * PLANE_ALIGN_BYTES


def opaque_spec(namespace: str, size_bytes: int, tokens_each: int) -> tuple[KVSpec, bytes]:
    """The spec of a namespace's objects of that size, and its fingerprint.

    `tokens_each` is what one is worth; 0: by its bytes. Raises EmptyDocument or DocumentTooLarge.
    """
    return _spec(namespace, class_bytes(size_bytes), rounded(max(1, tokens_each)))


@lru_cache(maxsize=1024)
def _spec(namespace: str, slot_bytes: int, tokens: int) -> tuple[KVSpec, bytes]:
    spec = KVSpec(
        groups=(LayerGroup(kind=GroupKind.OPAQUE, layers=(0,), kv_heads=1, key_dim=1, value_dim=0),),
        dtype="float8_e4m3fn",
        model=namespace,
        vocabulary_size=tokens,
        block_tokens=slot_bytes,
        extent_blocks=1,
    )
    return spec, spec.fingerprint()


def is_opaque(spec: KVSpec) -> bool:
    """Whether it is of objects, not of a model's KV."""
    return spec.groups[0].kind is GroupKind.OPAQUE


def worth_tokens(spec: KVSpec, size_bytes: int) -> int:
    """How many tokens of an unknown model have to be computed again when an object of so many bytes is lost.

    What its writer said, else as many as would make that much KV of the model that the prior prefill curve is of.
    """
    assert is_opaque(spec), spec
    return spec.vocabulary_size if spec.vocabulary_size > 1 else max(1, size_bytes // TOKEN_BYTES)


def prefilled(spec: KVSpec, start: int, stop: int) -> tuple[int, int]:
    """What a prefill computes where positions [start, stop) of a document are lost: tokens [start, stop)."""
    return (0, worth_tokens(spec, stop - start)) if is_opaque(spec) else (start, stop)


def checked_namespace(namespace: str) -> str:
    """The namespace, if it may be one. Raises InvalidName."""
    if namespace == PROMPT:
        raise InvalidName(f"the namespace {PROMPT!r} is that of unnamed prefixes")
    return checked_name(namespace, "namespace")


def object_id(tenant: str, namespace: str, key: bytes) -> DocumentId:
    """The document that an object is. Raises InvalidName for a key that is none."""
    if not 1 <= len(key) <= OBJECT_KEY_MAX:
        raise InvalidName(f"an object's key has 1 to {OBJECT_KEY_MAX} bytes, not {len(key)}")
    return DocumentId(tenant, f"{namespace}/{key.hex()}")


def object_key(document: DocumentId) -> bytes:
    """The key of an object's document."""
    return bytes.fromhex(document.name.rpartition("/")[2])


def object_extent_id(document: DocumentId, previous: ExtentId | None, secret: bytes, life: int = 0) -> ExtentId:
    """Keyed by the tenant's secret, and chained: equal ids mean equal keys behind equal keys, so no chain has a ring.

    `life` tells an object from one of the same key whose copies have not gone yet.
    """
    made = hashlib.blake2b(digest_size=KEY_BYTES, key=secret, person=b"holdfast-object")
    for part in (document.name.encode(), (previous or "").encode(), str(life).encode()):
        made.update(len(part).to_bytes(4, "little") + part)
    return f"{made.hexdigest()}:0"


def object_extent(document: Document, spec: KVSpec, previous: ExtentId | None) -> Extent:
    """The one extent of an object."""
    name = document.extents[0]
    return Extent(
        id=name,
        tenant=document.id.tenant,
        fingerprint=document.fingerprint,
        group=0,
        start=0,
        valid_tokens=document.token_count,
        previous=previous,
        block_keys=bytes.fromhex(name.partition(":")[0]),
        slot_bytes=spec.block_tokens,
    )
