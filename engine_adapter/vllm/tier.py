"""HoldfastTier: Holdfast as a secondary tier of vLLM's own offloading (0.32's TieringOffloadingSpec), without a fork.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 10737418240,
            "secondary_tiers": [{"type": "HoldfastTier", "module_path": "holdfast.engine_adapter.vllm.tier"}]}}'

Beside `type` and `module_path` an entry may say `socket` or `data_dir` (where the daemon is), `tenant`, `model` (names
the weights where the model is no local directory; say its revision), `layout` (anything else that changes what pages
mean, such as quantisation), `write_policy`, `lookup_seconds`, `load_seconds`, `store_seconds`, `load_threads`,
`store_threads`, `load_queue` and `store_queue` (in chunks), `pin_ttl_max_seconds`, `backpressure` (vLLM's).

It shows Holdfast only hashes: use HoldfastConnector for documents, names and other layouts. A request says
`kv_transfer_params={"store": false}` or `{"load": false}`, and pins by `kv_hints` (see hints).

vLLM's hashes name a LoRA adapter by its path, and leave out how the engine was told to prepare pictures: give `layout`
another text when either changes. Without prefix caching and with --mm-processor-cache-gb 0 it numbers pictures instead
of hashing them: store none then.

It runs in vLLM's scheduler process, whose thread never waits here. A daemon that is away, slow or full means misses and
dropped stores, which are counted (vllm:kv_offload_holdfast_*).
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.version import __version__ as vllm_version

from ...kvstore.document import WritePolicy
from ...kvstore.errors import DeadlineExceeded
from ..link import link_to
from ..namespaces import Origin, model_identity
from ..shelf import Patience, Shelf
from .errands import Errands
from .hints import Answer, PinHint, read
from .transfers import Kind, Transfer, Transfers
from .verdicts import Verdicts

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec

OBJECTS: Final = "vllm:kv_offload_holdfast_objects"
HINTS: Final = "vllm:kv_offload_holdfast_hints"
CONNECTED: Final = "vllm:kv_offload_holdfast_connected"
WAITING: Final = "vllm:kv_offload_holdfast_waiting"
LATE, DROPPED = "late", "dropped"  # beside shelf.Event
TOUCHED_MAX: Final = 4096
PINNED_MAX: Final = 65_536  # keys of one request


@dataclass(slots=True)
class _Asked:
    """What we remember of one request."""

    stores: bool = True
    loads: bool = True
    pin: PinHint | None = None
    waits_since: float | None = None
    lost: set[bytes] = field(default_factory=set)  # were found and could not be loaded: not tried again
    found: dict[bytes, None] = field(default_factory=dict)  # of a request that pins, in order
    last: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # by group: the furthest chunk we have, and where

    def reached(self, key: bytes, position: int | None) -> None:
        """Take it that we have this chunk, or will have it."""
        group = get_offload_group_idx(key)
        if position is not None and position > self.last.get(group, (0, b""))[0]:
            self.last[group] = (position, key)


class HoldfastTier(SecondaryTierManager):
    """See the module. Constructed by vLLM from the tier's entry; unknown keys there are an error at start."""

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        *,
        socket: str | None = None,
        data_dir: str | None = None,
        tenant: str = "default",
        model: str | None = None,
        layout: str = "",
        write_policy: str = "auto",
        lookup_seconds: float = 0.5,
        load_seconds: float = 10.0,
        store_seconds: float = 10.0,
        load_threads: int = 2,
        store_threads: int = 1,
        load_queue: int = 1024,
        store_queue: int = 256,
        pin_ttl_max_seconds: float = 86_400.0,
        locality: str = "LOCAL",
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality(locality)
        self._lookup_seconds = lookup_seconds
        self._pin_ttl_max_seconds = pin_ttl_max_seconds
        self._rows: np.ndarray[Any, Any] | None = np.asarray(primary_kv_view).view(np.uint8)
        self._jobs: dict[int, TransferJob] = {}
        self._ended: list[JobResult] = []  # without a transfer: refused at once
        self._touched: dict[bytes, None] = {}
        self._counts: Counter[str] = Counter()
        self._hints: Counter[Answer] = Counter()
        self._told: Counter[tuple[str, str]] = Counter()
        config = offloading_spec.config
        self._link = link_to(socket, data_dir, tenant)
        self._shelf = Shelf(
            self._link,
            Origin(
                engine="vllm",
                model=config.model.name,
                facts=facts_of(offloading_spec, self.block_size_bytes, model, layout),
            ),
            tokens_each=offloading_spec.blocks_per_chunk * max(offloading_spec.tokens_per_block),
            write_policy=WritePolicy(write_policy),
            patience=Patience(load_seconds=load_seconds, store_seconds=store_seconds),
        )
        self._errands = Errands()
        self._lookups = Verdicts(self._shelf.find, self._errands.run, lookup_seconds)
        self._transfers = Transfers(
            self._carry_out,
            threads={Kind.LOAD: load_threads, Kind.STORE: store_threads},
            objects_max={Kind.LOAD: load_queue, Kind.STORE: store_queue},
        )

    # Requests ----------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Remember what it says of storing, loading and pinning."""
        params = req_context.kv_transfer_params or {}
        asked = _Asked(stores=params.get("store", True) is True, loads=params.get("load", True) is True)
        if req_context.kv_hints is not None:
            asked.pin, answers = read(req_context.kv_hints.actions, self._pin_ttl_max_seconds)
            self._hints.update(answers)
        req_context.set_state(asked)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Pin what it found, if it asked for that; what it stored was pinned with the storing."""
        asked = self._asked(req_context)
        if asked.pin is not None and asked.found:
            self._errands.run(partial(self._pin, asked.pin, list(asked.found)))
        asked.found.clear()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """HIT or MISS by what is known; RETRY until it is, for a request at most `lookup_seconds` long."""
        asked = self._asked(req_context)
        if not asked.loads or key in asked.lost:
            return LookupResult.MISS
        if not self._link.is_up:
            self._counts[LATE] += 1
            return LookupResult.MISS
        verdict = self._lookups.verdict(key)
        if verdict is None:
            now = time.monotonic()
            if asked.waits_since is None:
                asked.waits_since = now
            if now - asked.waits_since < self._lookup_seconds:
                return LookupResult.RETRY
            self._counts[LATE] += 1
            return LookupResult.MISS
        if verdict:
            asked.reached(key, req_context.get_offload_key_position(key))
            if asked.pin is not None and len(asked.found) < PINNED_MAX:
                asked.found[key] = None
        return LookupResult.HIT if verdict else LookupResult.MISS

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Say with the end of the step that they were used."""
        for key in keys:
            if len(self._touched) < TOUCHED_MAX:
                self._touched[key] = None

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Hand over what this step asked for."""
        self._lookups.hand_over()
        if self._touched:
            self._errands.run(partial(self._shelf.touch, list(self._touched)))
            self._touched = {}

    # Transfers ---------------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Queue it; dropped while the daemon is away or the queue is full."""
        asked = self._asked(job_metadata.req_context)
        if not asked.stores:
            self._ended.append(JobResult(job_id=job_metadata.job_id, success=True, transfer_bytes=0))
        elif not self._link.is_up or not self._submit(Kind.STORE, job_metadata):
            self._counts[DROPPED] += len(job_metadata.keys)
            self._ended.append(JobResult(job_id=job_metadata.job_id, success=False))

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Queue it; what cannot be loaded is a miss for this request."""
        asked = self._asked(job_metadata.req_context)
        asked.waits_since = None
        if not self._submit(Kind.LOAD, job_metadata):
            asked.lost.update(job_metadata.keys)
            self._ended.append(JobResult(job_id=job_metadata.job_id, success=False))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Everything that ended since the last call, and what we learn from it."""
        results, self._ended = self._ended, []
        for outcome in self._transfers.ended():
            transfer = outcome.transfer
            job = self._jobs.pop(transfer.number)
            done = [key for key, good in zip(transfer.keys, outcome.done, strict=True) if good]
            if transfer.kind is Kind.LOAD:
                missing = set(transfer.keys).difference(done)
                self._asked(job.req_context).lost.update(missing)
                self._lookups.missed(missing)
            else:
                self._lookups.found(done)
            success = len(done) == len(transfer.keys)
            results.append(
                JobResult(
                    job_id=transfer.number,
                    success=success,
                    successful_keys=tuple(done) if done and not success and transfer.kind is Kind.LOAD else None,
                    transfer_time=outcome.seconds,
                    transfer_bytes=len(done) * self.block_size_bytes,
                )
            )
        return results

    def drain_jobs(self) -> None:
        """Give up what waits, and wait for what has begun: at most as long as the daemon may take for it.

        Raises DeadlineExceeded when that is not enough: going on could put other KV under a key.
        """
        if not self._transfers.drain():
            raise DeadlineExceeded("a transfer still uses the engine's memory; look at Holdfast's daemon, or restart")

    def shutdown(self) -> None:
        """End all threads. Raises DeadlineExceeded when one still uses the engine's memory."""
        ended = self._transfers.close()
        self._errands.close()
        self._link.close()
        if not ended:
            raise DeadlineExceeded("a transfer still uses the engine's memory; it is kept")
        self._rows = None  # vLLM releases the view

    def _submit(self, kind: Kind, job: TransferJob) -> bool:
        """In prefix order, group by group, as far as the request knows it."""
        asked = self._asked(job.req_context)
        position = job.req_context.get_offload_key_position
        order = sorted(
            zip(job.keys, job.chunk_ids, strict=True),
            key=lambda pair: (get_offload_group_idx(pair[0]), position(pair[0]) or 0),
        )
        transfer = Transfer(
            number=job.job_id,
            kind=kind,
            keys=tuple(bytes(key) for key, _ in order),
            rows=tuple(int(row) for _, row in order),
            behind={group: key for group, (_, key) in asked.last.items()},
        )
        self._jobs[job.job_id] = job
        if not self._transfers.submit(transfer):
            del self._jobs[job.job_id]
            return False
        if kind is Kind.STORE:
            for key in transfer.keys:
                asked.reached(key, position(key))
        return True

    def _carry_out(self, transfer: Transfer) -> list[bool]:
        """On a thread of the transfers'."""
        rows = self._rows
        assert rows is not None, "a transfer after the shutdown"
        buffers = [memoryview(rows[row]) for row in transfer.rows]
        if transfer.kind is Kind.LOAD:
            return self._shelf.load_into(transfer.keys, buffers)
        kept: list[bool] = []
        items = zip(transfer.keys, buffers, strict=True)
        for group, chain in groupby(items, key=lambda item: get_offload_group_idx(item[0])):
            kept += self._shelf.put(list(chain), transfer.behind.get(group))
        asked = self._asked(self._jobs[transfer.number].req_context)
        if asked.pin is not None:
            self._pin(asked.pin, [key for key, good in zip(transfer.keys, kept, strict=True) if good])
        return kept

    def _pin(self, pin: PinHint, keys: list[bytes]) -> None:
        self._shelf.pin(keys, pin.ttl_seconds, pin.owner, pin.reason)

    def _asked(self, req_context: ReqContext) -> _Asked:
        found: _Asked | None = req_context.get_state(_Asked)
        if found is None:
            found = _Asked()
            req_context.set_state(found)
        return found

    # Numbers -----------------------------------------------------------------------------------

    @classmethod
    def build_metric_definitions(
        cls,
        extra_config: dict[str, Any],  # noqa: ARG003 - theirs
    ) -> dict[str, OffloadingMetricMetadata]:
        """What `get_stats` reports."""
        return {
            OBJECTS: OffloadingCounterMetadata(
                "Chunks by what happened to them between vLLM and Holdfast.", labelnames=("event",)
            ),
            HINTS: OffloadingCounterMetadata("Actions of kv_hints by what became of them.", labelnames=("answer",)),
            CONNECTED: OffloadingGaugeMetadata("Whether Holdfast's daemon can be used: 1 or 0."),
            WAITING: OffloadingGaugeMetadata("Chunks on their way to or from Holdfast.", labelnames=("kind",)),
        }

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What was counted since the last call."""
        stats = OffloadingConnectorStats()
        counts = {(OBJECTS, str(event)): count for event, count in (self._shelf.counts + self._counts).items()}
        counts |= {(HINTS, str(answer)): count for answer, count in self._hints.items()}
        for (name, label), count in counts.items():
            if new := count - self._told[name, label]:
                stats.increase_counter(name, new, (label,))
                self._told[name, label] = count
        stats.set_gauge(CONNECTED, int(self._link.is_up))
        for kind, objects in self._transfers.objects_waiting.items():
            stats.set_gauge(WAITING, objects, (str(kind),))
        return stats


def facts_of(spec: OffloadingSpec, row_bytes: int, model: str | None, layout: str) -> dict[str, Any]:
    """Everything that decides what the bytes of a chunk mean."""
    config = spec.config
    parallel = config.parallel
    return {
        "vllm": vllm_version,
        "weights": model or model_identity(config.model.name),
        "layout": layout,
        "dtype": config.model.dtype,
        "device": current_platform.device_type,
        # On CPUs the kernel packs a block for its instructions.
        "machine": _instructions() if current_platform.is_cpu() else "",
        "page layout": config.kv_cache_layout,
        "canonical": config.canonical_layout,
        "replicated": spec.replicated_layout,
        "row bytes": row_bytes,
        "worker bytes per block": config.worker_kv_bytes_per_block,
        "blocks per chunk": config.cache.blocks_per_chunk,
        "tokens per hash": config.cache.tokens_per_hash,
        "groups": [[group.tokens_per_block, list(group.layer_names)] for group in config.groups],
        "parallel": [
            parallel.world_size,
            parallel.tp_size,
            parallel.pp_size,
            parallel.pcp_size,
            parallel.dcp_size,
        ],
    }


def _instructions() -> str:
    """The machine and those of its extensions that kernels choose by."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return " ".join([platform.machine(), *sorted(flags & {"amx_tile", "amx_bf16", "avx512f", "avx2"})])
