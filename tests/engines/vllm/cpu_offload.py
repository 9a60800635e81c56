"""vLLM's tiering offload on its CPU backend, for tests: the stock spec refuses CPUs, where nobody would offload to RAM.

Only what moves pages between "device" and primary tier is ours; manager, primary tier and secondary tiers are vLLM's.
"""

from __future__ import annotations

import time

import torch
from holdfast.engine_adapter.vllm.tier import HoldfastTier
from holdfast.engine_adapter.vllm.transfers import Kind
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuTieringSpec(TieringOffloadingSpec):
    """TieringOffloadingSpec whose worker copies with memcpy."""

    def get_worker(self, kv_caches):
        if not self._worker:
            self._worker = MemcpyWorker(self, kv_caches)
        return self._worker


class MemcpyWorker(OffloadingWorker):
    """Copies in the calling thread; a transfer has ended when its submit returns."""

    def __init__(self, spec, kv_caches):
        self._region = SharedOffloadRegion(
            engine_id=spec.config.engine_id,
            num_chunks=spec.num_chunks,
            rank=spec.config.parallel.rank,
            kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
            cpu_page_size=spec.cpu_page_size_per_worker,
        )
        self._per_chunk = spec.blocks_per_chunk
        self._groups = kv_caches.group_data_refs
        self._pages = [one.tensor.view(torch.int8).view(-1, one.page_size_bytes) for one in kv_caches.tensors]
        self._chunks = [
            self._region.create_next_worker_view(one.page_size_bytes * self._per_chunk).unflatten(
                1, (self._per_chunk, one.page_size_bytes)
            )
            for one in kv_caches.tensors
        ]
        self._ended = []

    def _pairs(self, device, chunks):
        """(group, block of the device, chunk, block within it), in order."""
        blocks, chunk_ids = list(device.block_ids), list(chunks.block_ids)
        for group, (size, first) in enumerate(zip(device.group_sizes, device.block_indices, strict=True)):
            skip = first % self._per_chunk
            for number in range(size):
                yield (
                    group,
                    int(blocks.pop(0)),
                    int(chunk_ids[(skip + number) // self._per_chunk]),
                    (skip + number) % self._per_chunk,
                )
            del chunk_ids[: -(-(skip + size) // self._per_chunk) if size else 0]
        assert not blocks
        assert not chunk_ids

    def _copied(self, job_id, pairs, copy):
        began = time.monotonic()
        size = 0
        for group, block, chunk, part in pairs:
            for ref in self._groups[group]:
                copy(self._pages[ref.tensor_idx][block], self._chunks[ref.tensor_idx][chunk, part])
                size += ref.page_size_bytes
        self._ended.append(TransferResult(job_id, True, size, time.monotonic() - began))
        return True

    def submit_store(self, job_id, src_spec, dst_spec):
        return self._copied(job_id, self._pairs(src_spec, dst_spec), lambda page, kept: kept.copy_(page))

    def submit_load(self, job_id, src_spec, dst_spec):
        return self._copied(job_id, self._pairs(dst_spec, src_spec), lambda page, kept: page.copy_(kept))

    def get_finished(self):
        ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids):
        pass

    def shutdown(self):
        self._chunks.clear()
        self._region.cleanup()


class ScrambledTier(HoldfastTier):
    """A control: loads give every row the first one's content. Equal tokens would prove nothing, were these equal.

    Not another order of rows: keys carry their positions, so attention does not see in what order they lie.
    """

    def _carry_out(self, transfer):
        done = super()._carry_out(transfer)
        if transfer.kind is Kind.LOAD:
            self._rows[list(transfer.rows)] = self._rows[transfer.rows[0]]
        return done
