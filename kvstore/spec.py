"""KVSpec: what KV a model makes, and of which model.

Its fingerprint roots every key, so two fine-tunes of one shape never share KV. It knows nothing of
documents, tiers or files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Final

from .errors import InvalidSpec

BLOCK_TOKENS: Final = 64  # the unit of hashing and prefix matching
EXTENT_TARGET_BYTES: Final = 8 << 20  # large enough for raw disk speed, small enough to evict finely
PAGE_FORMAT_LIMIT: Final = 128  # characters
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float64": 8}


class GroupKind(StrEnum):
    """How the layers of a group keep KV."""

    GQA = "gqa"  # covers MHA (kv_heads = heads) and MQA (kv_heads = 1)
    MLA = "mla"  # one latent plane, no value plane
    SLIDING = "sliding"
    OPAQUE = "opaque"  # no KV that anybody could look into: bytes (see opaque)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers that keep KV in the same shape.

    `layers` are the model's layer indices, ascending. `value_dim` is 0 for MLA, whose latent is the key plane.
    """

    kind: GroupKind = GroupKind.GQA
    layers: tuple[int, ...]
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def elements_per_token(self) -> int:
        """Cache elements that one token takes in all layers of the group."""
        return len(self.layers) * self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """Shape and identity of a model's KV, and the form in which it is kept.

    `model` names weights and revision (or a digest of them); `rope` the rotary parameters; `adapter` a LoRA;
    `quantisation` how KV values were scaled. `extent_blocks` is how many blocks one extent holds at most.

    `page_format` is "" for canonical planes. A native spec keeps an engine's pages as they are: it names their format
    (engine_adapter.pages knows it), one page is one block, and only whole pages are stored.
    """

    groups: tuple[LayerGroup, ...]
    dtype: str
    model: str
    vocabulary_size: int
    rope: str = ""
    adapter: str = ""
    quantisation: str = ""
    page_format: str = ""
    block_tokens: int = BLOCK_TOKENS
    extent_blocks: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise InvalidSpec(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPE_BYTES)}")
        if not self.groups:
            raise InvalidSpec("a spec needs at least one layer group")
        if not self.model:
            raise InvalidSpec("a spec needs `model`: a revision or digest of the weights")
        if len(self.page_format) > PAGE_FORMAT_LIMIT or not (self.page_format or "-").isprintable():
            raise InvalidSpec(f"a page format is named in at most {PAGE_FORMAT_LIMIT} printable characters")
        numbers = [self.vocabulary_size, self.block_tokens, self.extent_blocks]
        for group in self.groups:
            numbers += [group.kv_heads, group.key_dim, len(group.layers)]
            numbers += [group.window] if group.window is not None else []
            if group.value_dim < (0 if group.kind in (GroupKind.MLA, GroupKind.OPAQUE) else 1):
                raise InvalidSpec(f"value_dim {group.value_dim} is too small for a {group.kind} group")
            if (group.window is None) == (group.kind is GroupKind.SLIDING):
                raise InvalidSpec("exactly the sliding-window groups have a window")
        if min(numbers) < 1:
            raise InvalidSpec("layers, heads, dims, windows, block and vocabulary sizes must be positive")
        layers = [layer for group in self.groups for layer in group.layers]
        is_opaque = any(group.kind is GroupKind.OPAQUE for group in self.groups)
        if is_opaque and (len(self.groups) > 1 or self.page_format):
            raise InvalidSpec("opaque bytes have no other layer group beside them, and no pages")
        if len(set(layers)) != len(layers):
            raise InvalidSpec("a layer belongs to exactly one group")
        if self.extent_blocks & (self.extent_blocks - 1):
            raise InvalidSpec(f"extent_blocks must be a power of two, not {self.extent_blocks}")

    @property
    def element_bytes(self) -> int:
        """Bytes of one cache element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def extent_tokens(self) -> int:
        """Capacity of an extent in tokens."""
        return self.block_tokens * self.extent_blocks

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all groups, padding not counted (MODEL.md section 4, formula 1)."""
        return sum(group.elements_per_token() for group in self.groups) * self.element_bytes

    def canonical(self) -> KVSpec:
        """The spec of the same model's KV in canonical form, as the sizing function makes it."""
        return sized(replace(self, page_format="", block_tokens=BLOCK_TOKENS))

    def page_bytes(self, group: int = 0) -> int:
        """Bytes of one layer's page of a layer group: keys and values of `block_tokens` tokens."""
        shape = self.groups[group]
        return self.block_tokens * shape.kv_heads * (shape.key_dim + shape.value_dim) * self.element_bytes

    def fingerprint(self) -> bytes:
        """16 bytes that change with anything that changes the KV's meaning or its stored bytes."""
        fields = asdict(self)
        if not self.page_format:  # so that canonical KV keeps the keys that it always had
            del fields["page_format"]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"holdfast-spec").digest()


def sized(spec: KVSpec, target_bytes: int = EXTENT_TARGET_BYTES) -> KVSpec:
    """The one sizing function: as many blocks (a power of two, at least one) as fit the target in the largest group."""
    largest = max(group.elements_per_token() for group in spec.groups)
    block_bytes = largest * spec.element_bytes * spec.block_tokens
    blocks = 1
    while 2 * blocks * block_bytes <= target_bytes:
        blocks *= 2
    return replace(spec, extent_blocks=blocks)
