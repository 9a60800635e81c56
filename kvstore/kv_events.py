"""KV events: where the blocks of documents are, in the messages that vLLM publishes, for routers that read those.

A batch is [time, [event, ...], rank]; an event is a map whose "type" is BlockStored, BlockRemoved or AllBlocksCleared
(vllm/distributed/kv_events.py, 0.32). Block hashes are our keys: a router takes them as names, and learns from
`token_ids` and `parent_block_hash` what they stand for. A move from one tier to another is a BlockStored in the one and
a BlockRemoved in the other. The medium is GPU for HBM, CPU for DDR and STORAGE for NVMe.

Coalesced: what came and went between two looks is not told. Part-filled last blocks and opaque objects are not blocks,
and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Final

import msgspec

from .changes import Changes
from .extent import Extent, ExtentId
from .keys import KEY_BYTES, Tokens
from .residency import Tier
from .spec import GroupKind, KVSpec
from .state import State

MEDIA: Final = {Tier.HBM: "GPU", Tier.DDR: "CPU", Tier.NVME: "STORAGE"}
KINDS: Final = {
    GroupKind.GQA: "full_attention",
    GroupKind.MLA: "mla_attention",
    GroupKind.SLIDING: "sliding_window",
}
OWNER: Final = "holdfast"
CANDIDATES_MAX: Final = 64  # extents with one beginning that are compared


class _Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    pass


class BlockStored(_Event, frozen=True, kw_only=True, tag="BlockStored"):
    """Blocks, one after another, can be read in a medium. `token_ids` is empty where they are not known any more."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None


class BlockRemoved(_Event, frozen=True, kw_only=True, tag="BlockRemoved"):
    """They cannot be read there any more."""

    block_hashes: list[bytes]
    medium: str
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(_Event, frozen=True, kw_only=True, tag="AllBlocksCleared"):
    """Whatever was told before is void: the publisher has begun anew."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What changed between two looks. `ts` is in seconds since the epoch."""

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = 0


@dataclass(frozen=True, slots=True)
class _Told:
    """Where the readers of events believe an extent's blocks to be."""

    extent: Extent
    tiers: frozenset[Tier]


NOWHERE: Final[frozenset[Tier]] = frozenset()


class Announcer:
    """Turns changes into events. It remembers what it told of each extent, as long as that is anywhere."""

    def __init__(self, state: State) -> None:
        """From now on changes are kept; what is there already counts as changed."""
        self._state = state
        self._told: dict[ExtentId, _Told] = {}
        state.changes.follow()
        for extent in state.extents:
            state.changes.note(extent)

    @property
    def _changes(self) -> Changes:
        return self._state.changes

    def events(self, most: int) -> list[Event]:
        """What the next changes, at most so many extents, amount to; in order."""
        events: list[Event] = []
        for name, tokens in self._changes.take(most):
            told = self._told.get(name)
            record = self._state.extents.get(name)
            extent = told.extent if told is not None else record.extent if record is not None else None
            if extent is None or extent.fingerprint not in self._state.specs:
                continue
            before = told.tiers if told is not None else NOWHERE
            events += self._difference(extent, before, self._tiers(name), tokens)
        return events

    def _difference(
        self, extent: Extent, before: frozenset[Tier], now: frozenset[Tier], tokens: Tokens | None
    ) -> list[Event]:
        spec = self._state.specs[extent.fingerprint]
        hashes = _whole_blocks(extent, spec)
        if not hashes:
            return []
        if now:
            self._told[extent.id] = _Told(extent, now)
        else:
            self._told.pop(extent.id, None)
        ids = [] if tokens is None else tokens[: len(hashes) * spec.block_tokens].tolist()
        events: list[Event] = []
        for tier in sorted(now - before):
            shared = self._shared(extent, hashes, tier)
            if shared < len(hashes):
                events.append(self._stored(extent, spec, hashes, ids, tier, shared))
        for tier in sorted(before - now):  # behind them, so that nobody who follows takes a move for a loss
            gone = hashes[self._shared(extent, hashes, tier) :]
            if gone:
                medium = MEDIA[tier]
                events.append(
                    BlockRemoved(
                        block_hashes=gone, medium=medium, group_idx=extent.group, locality="LOCAL", ownership=OWNER
                    )
                )
        return events

    def _shared(self, extent: Extent, hashes: list[bytes], tier: Tier) -> int:
        """Leading blocks that others have there, too: a longer document has those of a shorter one's last extent."""
        shared, spec = 0, self._state.specs[extent.fingerprint]
        alone = f"{hashes[0].hex()}:{extent.group}"  # an extent of one block
        for name in [alone, *islice(self._state.fronts.of(hashes[0]), CANDIDATES_MAX)]:
            told = self._told.get(name)
            if name == extent.id or told is None or tier not in told.tiers or told.extent.group != extent.group:
                continue
            pairs = zip(hashes, _whole_blocks(told.extent, spec), strict=False)
            shared = max(shared, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return shared

    def _stored(
        self, extent: Extent, spec: KVSpec, hashes: list[bytes], ids: list[int], tier: Tier, first: int
    ) -> BlockStored:
        """From block `first` of the extent on."""
        group = spec.groups[extent.group]
        parent = None if extent.previous is None else bytes.fromhex(extent.previous.partition(":")[0])
        return BlockStored(
            block_hashes=hashes[first:],
            parent_block_hash=hashes[first - 1] if first else parent,
            token_ids=ids[first * spec.block_tokens :],
            block_size=spec.block_tokens,
            lora_id=None,
            medium=MEDIA[tier],
            lora_name=spec.adapter or None,
            group_idx=extent.group,
            kv_cache_spec_kind=KINDS[group.kind],
            kv_cache_spec_sliding_window=group.window,
            locality="LOCAL",
            ownership=OWNER,
        )

    def _tiers(self, name: ExtentId) -> frozenset[Tier]:
        """Where it can be read now."""
        record = self._state.extents.get(name)
        copies = [] if record is None else record.placements()
        found = {copy.tier for copy in copies if copy.readable}
        for shard in self._state.shards():
            copy = shard.copies.get(name)
            if copy is not None and copy.readable:
                found.add(Tier.HBM)
                break
        return frozenset(found)


def _whole_blocks(extent: Extent, spec: KVSpec) -> list[bytes]:
    """The keys of its full blocks; none where a restart has left it without, and none for what has no blocks."""
    if spec.groups[extent.group].kind not in KINDS:
        return []
    count = min(extent.valid_tokens // spec.block_tokens, len(extent.block_keys) // KEY_BYTES)
    return [extent.block_keys[start : start + KEY_BYTES] for start in range(0, count * KEY_BYTES, KEY_BYTES)]
