"""Prefix: how much of a token sequence is in the cache, by the keys of its blocks. Looking changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Final

from .extent import ExtentId
from .keys import KEY_BYTES
from .residency import State as Residency
from .residency import Tier
from .spec import KVSpec
from .state import ExtentRecord, State

CANDIDATES_MAX: Final = 1024  # extents with one first block that are compared: bounds what a lookup may take
HEX: Final = 2 * KEY_BYTES


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `token_count` tokens are complete in the cache; `tiers` says how many of them are nearest in which.

    Of several layer groups the farthest counts.
    """

    token_count: int
    tiers: dict[Tier, int]


class _Search:
    """One lookup: `keys` are those of consecutive blocks from the first on."""

    def __init__(self, state: State, tenant: str, spec: KVSpec, keys: bytes) -> None:
        self.extents = state.extents
        self.fronts = state.fronts
        self.shards = [shard.copies for shard in state.shards() if shard.document.tenant == tenant]
        self.tenant = tenant
        self.spec = spec
        self.fingerprint = spec.fingerprint()
        self.keys = keys
        self.text = keys.hex()  # once for all: an extent's id begins with that of its last block's key

    def nearest(self, name: ExtentId) -> tuple[ExtentRecord, Tier] | None:
        """The tenant's extent of that id and its nearest readable copy."""
        record = self.extents.get(name)
        if record is None or record.extent.tenant != self.tenant or record.extent.fingerprint != self.fingerprint:
            return None
        for copies in self.shards:
            copy = copies.get(name)
            if copy is not None and copy.readable:
                return record, Tier.HBM
        copy = record.ddr
        if copy is not None and (copy.state is Residency.RESIDENT or copy.readable):
            return record, Tier.DDR
        copy = record.nvme
        if copy is not None and copy.readable:
            return record, Tier.NVME
        return None

    def whole(self, last: int, suffix: str) -> tuple[int, Tier] | None:
        """Tokens, and their tier, of the extent that ends with block `last`."""
        found = self.nearest(self.text[last * HEX : (last + 1) * HEX] + suffix)
        return (found[0].extent.valid_tokens, found[1]) if found is not None else None

    def part(self, first: int, suffix: str) -> tuple[int, Tier]:
        """Tokens of the longest match among the extents that begin with block `first`, and their tier."""
        best = 0, Tier.HBM
        key = self.keys[first * KEY_BYTES : (first + 1) * KEY_BYTES]
        names = [f"{key.hex()}{suffix}", *islice(self.fronts.of(key), CANDIDATES_MAX)]
        for name in names:
            found = self.nearest(name) if name.endswith(suffix) else None
            if found is None:
                continue
            record, tier = found
            theirs = record.extent.block_keys
            shared = 0
            while shared < len(theirs) and theirs[shared : shared + KEY_BYTES] == self._key(first, shared):
                shared += KEY_BYTES
            tokens = shared // KEY_BYTES * self.spec.block_tokens
            if shared == len(theirs):
                tokens = record.extent.valid_tokens
            if (tokens, -tier) > (best[0], -best[1]):
                best = tokens, tier
        return best

    def _key(self, first: int, offset: int) -> bytes:
        start = first * KEY_BYTES + offset
        return self.keys[start : start + KEY_BYTES]

    def run(self) -> Prefix:
        """Extent by extent, until one is not whole in every layer group."""
        suffixes = [f":{group}" for group in range(len(self.spec.groups))]
        counts = dict.fromkeys(Tier, 0)
        total = 0
        step, blocks = self.spec.extent_blocks, len(self.keys) // KEY_BYTES
        for first in range(0, blocks, step):
            last = min(first + step, blocks) - 1
            tokens, tier, is_whole = self.spec.extent_tokens, Tier.HBM, True
            for suffix in suffixes:
                found = self.whole(last, suffix)
                if found is None:
                    is_whole = False
                    found = self.part(first, suffix)
                tokens = min(tokens, found[0])
                tier = max(tier, found[1])
            counts[tier] += tokens
            total += tokens
            if not is_whole or tokens < self.spec.extent_tokens:
                break
        return Prefix(total, counts)


def longest(state: State, tenant: str, fingerprint: bytes, keys: bytes) -> Prefix:
    """The longest prefix of which the tenant has all KV, in any tier.

    `keys` are those of its blocks (see keys), one after another. Work grows with the extents that match, not with
    the blocks. A prompt that leaves a document inside an extent still finds the blocks in front of that.
    """
    assert len(keys) % KEY_BYTES == 0, "whole keys"
    return _Search(state, tenant, state.specs[fingerprint], keys).run()
