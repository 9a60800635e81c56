"""Prefix: how much of a token sequence is in the cache, by the keys of its blocks. Looking changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np

from .keys import KEY_BYTES
from .residency import State as Residency
from .residency import Tier
from .spec import KVSpec
from .state import ExtentRecord, State

CANDIDATES_MAX: Final = 1024  # extents with one first block that are compared: bounds what a lookup may take


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
        self.tenant = tenant
        self.spec = spec
        self.fingerprint = spec.fingerprint()
        self.keys = keys
        step = spec.extent_blocks
        blocks = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
        self.lasts = blocks[step - 1 :: step].tobytes()  # keys of the extents' last blocks
        if len(blocks) % step:
            self.lasts += blocks[-1].tobytes()
        shards = [shard for shard in state.shards() if shard.document.tenant == tenant]
        self.in_hbm = {name for shard in shards for name, copy in shard.copies.items() if copy.readable}

    def nearest(self, record: ExtentRecord | None) -> Tier | None:
        """Where the nearest readable copy of the tenant's extent is."""
        if record is None:
            return None
        extent = record.extent
        if extent.tenant != self.tenant or extent.fingerprint != self.fingerprint:
            return None
        if self.in_hbm and extent.id in self.in_hbm:
            return Tier.HBM
        copy = record.ddr
        if copy is not None and (copy.state is Residency.RESIDENT or copy.readable):
            return Tier.DDR
        copy = record.nvme
        if copy is not None and copy.readable:
            return Tier.NVME
        return None

    def whole(self, suffix: str) -> list[ExtentRecord | None]:
        """The extents of one layer group that hold these very blocks, as far as they are known, in order.

        Without a loop of our own: there may be thousands.
        """
        # An extent's id is the key of its last block and its layer group.
        ids = (self.lasts.hex(",", KEY_BYTES).replace(",", suffix + ",") + suffix).split(",")
        return list(map(self.extents.get, ids))

    def part(self, first: int, suffix: str) -> tuple[int, Tier]:
        """Tokens of the longest match among the extents that begin with block `first`, and their tier."""
        best = 0, Tier.HBM
        key = self._key(first, 0)
        names = [f"{key.hex()}{suffix}", *islice(self.fronts.of(key), CANDIDATES_MAX)]
        for name in names:
            record = self.extents.get(name)
            tier = self.nearest(record) if name.endswith(suffix) else None
            if record is None or tier is None:
                continue
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
        columns = [self.tiers(self.whole(suffix)) if self.keys else [] for suffix in suffixes]
        whole = min(len(column) for column in columns)
        farthest = list(map(max, *(column[:whole] for column in columns))) if len(columns) > 1 else columns[0][:whole]
        step, capacity = self.spec.extent_blocks, self.spec.extent_tokens
        counts = {tier: farthest.count(int(tier)) * capacity for tier in Tier}
        if whole * step * KEY_BYTES < len(self.keys):
            parts = [self.part(whole * step, suffix) for suffix in suffixes]
            counts[max(tier for _, tier in parts)] += min(tokens for tokens, _ in parts)
        elif whole:  # the last one may be shorter than the others
            last = self.extents[f"{self.lasts[-KEY_BYTES:].hex()}{suffixes[0]}"].extent
            counts[Tier(farthest[-1])] += last.valid_tokens - capacity
        return Prefix(sum(counts.values()), counts)

    def tiers(self, records: Iterable[ExtentRecord | None]) -> list[int]:
        """The tier of each extent, as a plain number, up to the first that is not there. Quick where all is in DDR."""
        tenant, fingerprint, in_hbm = self.tenant, self.fingerprint, self.in_hbm
        found: list[int] = []
        add, resident, in_ddr = found.append, Residency.RESIDENT, int(Tier.DDR)
        for record in records:
            if record is None:
                break
            extent, copy = record.extent, record.ddr
            if (
                copy is not None
                and copy.state is resident
                and not in_hbm
                and extent.tenant == tenant
                and extent.fingerprint == fingerprint
            ):
                add(in_ddr)
                continue
            tier = self.nearest(record)
            if tier is None:
                break
            add(int(tier))
        return found


def longest(state: State, tenant: str, fingerprint: bytes, keys: bytes) -> Prefix:
    """The longest prefix of which the tenant has all KV, in any tier.

    `keys` are those of its blocks (see keys), one after another. Work grows with the extents that match, not with
    the blocks. A prompt that leaves a document inside an extent still finds the blocks in front of that.
    """
    assert len(keys) % KEY_BYTES == 0, "whole keys"
    return _Search(state, tenant, state.specs[fingerprint], keys).run()
