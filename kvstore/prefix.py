"""Prefix: how much of a token sequence is in the cache, by the keys of its blocks, and in which document.

Looking changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np

from .document import DocumentId
from .errors import InvalidRequest
from .extent import Extent, ExtentId
from .keys import KEY_BYTES
from .owners import asked
from .residency import State as Residency
from .residency import Tier
from .spec import KVSpec
from .state import ExtentRecord, State

CANDIDATES_MAX: Final = 1024  # extents with one first block that are compared: bounds what a lookup may take


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `token_count` tokens are complete in the cache; `tiers` says how many of them are nearest in which.

    Of several layer groups the farthest counts. `document` holds all of them; None where there are none.
    """

    token_count: int
    tiers: dict[Tier, int]
    document: DocumentId | None


class _Search:
    """One lookup: `keys` are those of consecutive blocks from the first on."""

    def __init__(self, state: State, tenant: str, spec: KVSpec, keys: bytes, wall_ns: int) -> None:
        self.extents = state.extents
        self.documents = state.documents
        self.wall_ns = wall_ns
        self.fronts = state.fronts
        self.tenant = tenant
        if len(keys) % KEY_BYTES:
            raise InvalidRequest(f"keys have {KEY_BYTES} bytes each, so {len(keys)} B are no keys")
        self.spec = spec
        self.fingerprint = spec.fingerprint()
        self.keys = keys
        step = spec.extent_blocks
        blocks = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
        self.lasts = blocks[step - 1 :: step].tobytes()  # keys of the extents' last blocks
        if len(blocks) % step:
            self.lasts += blocks[-1].tobytes()
        self.suffixes = [f":{group}" for group in range(len(spec.groups))]
        self.in_hbm = self.hbm(state)

    def hbm(self, state: State) -> set[ExtentId]:
        """What any group's HBM has."""
        shards = [shard for shard in state.shards() if shard.document.tenant == self.tenant]
        return {name for shard in shards for name, copy in shard.copies.items() if copy.readable}

    def nearest(self, record: ExtentRecord | None) -> Tier | None:
        """Where the nearest copy of the tenant's extent is that counts."""
        if record is None or record.extent.tenant != self.tenant or record.extent.fingerprint != self.fingerprint:
            return None
        return self.tier_of(record)

    def tier_of(self, record: ExtentRecord) -> Tier | None:
        """Of what can be read now."""
        if self.in_hbm and record.extent.id in self.in_hbm:
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

    def part(self, first: int) -> tuple[int, Tier, ExtentRecord | None]:
        """Tokens of the longest match among the extents that begin with block `first`, their tier, and one of them.

        What one document has of that range of tokens has one key in all layer groups.
        """
        best: tuple[int, Tier, ExtentRecord | None] = 0, Tier.HBM, None
        key, suffix = self._key(first, 0), self.suffixes[0]
        for name in [f"{key.hex()}{suffix}", *islice(self.fronts.of(key), CANDIDATES_MAX)]:
            record = self.extents.get(name)
            if record is None or not name.endswith(suffix):
                continue
            made = name.removesuffix(suffix)
            tiers = [tier for s in self.suffixes if (tier := self.nearest(self.extents.get(f"{made}{s}"))) is not None]
            tokens = self._shared(record.extent, first)
            is_there = len(tiers) == len(self.suffixes) and self.owner(record) is not None
            if is_there and (tokens, -max(tiers)) > (best[0], -best[1]):
                best = tokens, max(tiers), record
        return best

    def _shared(self, extent: Extent, first: int) -> int:
        """Leading tokens of an extent that are those behind block `first`."""
        theirs, shared = extent.block_keys, 0
        while shared < len(theirs) and theirs[shared : shared + KEY_BYTES] == self._key(first, shared):
            shared += KEY_BYTES
        return extent.valid_tokens if shared == len(theirs) else shared // KEY_BYTES * self.spec.block_tokens

    def _key(self, first: int, offset: int) -> bytes:
        start = first * KEY_BYTES + offset
        return self.keys[start : start + KEY_BYTES]

    def run(self) -> Prefix:
        """Extent by extent, until one is not whole in every layer group, or in no document."""
        columns = [self.tiers(self.whole(suffix)) if self.keys else [] for suffix in self.suffixes]
        whole = min(len(column) for column in columns)
        while whole and self.owner(self._last(whole)) is None:  # its readers still hold what was deleted
            whole -= 1
        farthest = list(map(max, *(column[:whole] for column in columns))) if len(columns) > 1 else columns[0][:whole]
        step, capacity = self.spec.extent_blocks, self.spec.extent_tokens
        counts = {tier: farthest.count(int(tier)) * capacity for tier in Tier}
        last = self._last(whole) if whole else None
        if whole * step * KEY_BYTES < len(self.keys):
            tokens, tier, found = self.part(whole * step)
            counts[tier] += tokens
            last = found or last
        elif last is not None:  # it may be shorter than the others
            counts[Tier(farthest[-1])] += last.extent.valid_tokens - capacity
        return Prefix(sum(counts.values()), counts, None if last is None else self.owner(last))

    def _last(self, whole: int) -> ExtentRecord:
        """The last of so many extents, of the first layer group."""
        end = self.lasts[(whole - 1) * KEY_BYTES : whole * KEY_BYTES]
        return self.extents[f"{end.hex()}{self.suffixes[0]}"]

    def owner(self, record: ExtentRecord) -> DocumentId | None:
        """A document that holds an extent, and so all in front of it; not what has grown beyond it or has expired."""
        index = record.extent.start // self.spec.extent_tokens  # of the first layer group
        for document in asked(record.documents):
            made = self.documents[document].document
            if made.extents[index] == record.extent.id and not made.expired(self.wall_ns):
                return document
        return None

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


class _Sources(_Search):
    """Counts what an attach to DDR can have, or wait for: what is on its way too, but not what a group alone has."""

    def hbm(self, state: State) -> set[ExtentId]:
        """None of it."""
        return set()

    def tier_of(self, record: ExtentRecord) -> Tier | None:
        """Of what an attach reads from."""
        source = record.source()
        return source.tier if source is not None else None


def longest(state: State, tenant: str, fingerprint: bytes, keys: bytes, wall_ns: int) -> Prefix:
    """The longest prefix of which the tenant has all KV, in any tier.

    `keys` are those of its blocks (see keys), one after another. Work grows with the extents that match, not with
    the blocks. A prompt that leaves a document inside an extent still finds the blocks in front of that. Raises
    InvalidRequest for what is no sequence of keys.
    """
    return _Search(state, tenant, state.specs[fingerprint], keys, wall_ns).run()


def attachable(state: State, tenant: str, fingerprint: bytes, keys: bytes, wall_ns: int) -> Prefix:
    """The same of what an attach to DDR finds."""
    return _Sources(state, tenant, state.specs[fingerprint], keys, wall_ns).run()
