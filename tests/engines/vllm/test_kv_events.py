"""KV events as vLLM itself reads them."""

from __future__ import annotations

import msgspec
import pytest
from holdfast.kvstore.kv_events import AllBlocksCleared, Batch, BlockRemoved, BlockStored
from vllm.distributed import kv_events as theirs

STORED = BlockStored(
    block_hashes=[b"1" * 16, b"2" * 16],
    parent_block_hash=b"0" * 16,
    token_ids=[1, 2, 3, 4],
    block_size=2,
    lora_id=None,
    medium="CPU",
    lora_name=None,
    group_idx=0,
    kv_cache_spec_kind="full_attention",
    locality="LOCAL",
    ownership="holdfast",
)
REMOVED = BlockRemoved(block_hashes=[b"1" * 16], medium="CPU", group_idx=0, locality="LOCAL", ownership="holdfast")


def test_vllm_reads_what_we_publish():
    batch = Batch(12.5, [AllBlocksCleared(), STORED, REMOVED])
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=theirs.KVEventBatch)
    assert (read.ts, read.data_parallel_rank) == (12.5, 0)
    cleared, stored, removed = read.events
    assert isinstance(cleared, theirs.AllBlocksCleared)
    assert isinstance(stored, theirs.BlockStored)
    assert isinstance(removed, theirs.BlockRemoved)
    for ours, event in ((STORED, stored), (REMOVED, removed)):
        assert {name: getattr(event, name) for name in ours.__struct_fields__} == {
            name: getattr(ours, name) for name in ours.__struct_fields__
        }


@pytest.mark.parametrize("medium", [theirs.MEDIUM_GPU, theirs.MEDIUM_CPU, theirs.MEDIUM_STORAGE])
def test_media_are_called_as_vllm_calls_them(medium):
    from holdfast.kvstore.kv_events import MEDIA

    assert medium in MEDIA.values()
