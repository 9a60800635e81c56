"""HoldfastConnector: vLLM's side of it. It translates between vLLM's calls and the two sides, and decides nothing.

--kv-transfer-config '{"kv_connector": "HoldfastConnector", "kv_role": "kv_both",
    "kv_connector_module_path": "holdfast.engine_adapter.vllm.connector"}'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Final, Literal, TypeVar

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from ...kvstore.errors import HoldfastError
from ...kvstore.keys import Extras
from ..api import Store, connect
from ..link import Link
from .adapters import Adapters
from .caches import Caches
from .describe import describe
from .identity import ready
from .lookups import Lookups
from .plans import Heard, Plan, Ready
from .scheduling import SchedulerSide
from .settings import Settings
from .worker import Ended, WorkerSide

LOG: Final = init_logger("vllm.holdfast")
R = TypeVar("R")
# What the engine is told when there is nothing to say.
NO_MATCH: Final[tuple[int | None, bool]] = (0, False)
NO_TIERS: Final[dict[str, int]] = {}
NOT_HELD: Final[tuple[bool, dict[str, Any] | None]] = (False, None)
IDLE_SECONDS: Final = 0.005  # a request that arrives while others load is scheduled so much later at most
SOURCES: Final = {"ddr": CacheHitSource.HOST, "nvme": CacheHitSource.DISK}


@dataclass
class HoldfastMetadata(KVConnectorMetadata):
    """One step's plan."""

    plan: Plan = field(default_factory=Plan)


@dataclass
class HoldfastHandshake(KVConnectorHandshakeMetadata):
    """What a worker keeps."""

    ready: Ready


@dataclass
class HoldfastWorkerMetadata(KVConnectorWorkerMetadata):
    """What workers have to tell."""

    heard: list[Heard]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> HoldfastWorkerMetadata:
        assert isinstance(other, HoldfastWorkerMetadata)
        return HoldfastWorkerMetadata([*self.heard, *other.heard])


class HoldfastStats(KVConnectorStats):
    """Counters since the last step; see SchedulerSide."""

    data: dict[str, float]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> HoldfastStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 3) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


COUNTERS: Final = {
    "unserved": "Requests of an engine whose KV is not cached; its log says why.",
    "lookups": "Prompts looked up in the store.",
    "lookup_failures": "Lookups that nobody answered in time; their requests were computed.",
    "loads": "Requests that loaded KV.",
    "load_tokens": "Tokens whose KV was loaded.",
    "load_bytes": "Bytes of KV that were loaded.",
    "load_seconds": "Seconds that loads took, one after the other.",
    "load_failures": "Loads that brought less than was promised; the rest was computed.",
    "load_failed_tokens": "Tokens promised and not loaded.",
    "saves": "Saves that were ordered.",
    "save_tokens": "Tokens of the prompts that were saved.",
    "save_bytes": "Bytes of the prompts that were saved, what was stored already included.",
    "save_seconds": "Seconds that saves took, one after the other.",
    "save_drops": "Saves that were given up.",
    "saves_refused": "Prompts that this model's sliding window does not let us store.",
}


class HoldfastMetrics(KVConnectorPromMetrics):
    """The counters on vLLM's metrics page."""

    def __init__(self, vllm_config: Any, metric_types: Any, labels: list[str], values: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, metric_types, labels, values)
        made = {
            name: self._counter_cls(name=f"vllm:holdfast_{name}", documentation=text, labelnames=labels)
            for name, text in COUNTERS.items()
        }
        self._counters = {
            name: {engine: counter.labels(*given) for engine, given in values.items()} for name, counter in made.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(value)


class HoldfastConnector(KVConnectorBase_V1, SupportsHMA):
    """Made twice, for the scheduler and for each worker, in processes of their own mostly.

    It never fails an engine: what it cannot do is a miss, a save less, and a line in the log. Only a configuration that
    says nothing meaningful is refused, with ConfigError, when the engine starts.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        self._settings = Settings.of(transfer.kv_connector_extra_config or {})
        # A cache that fails requests would be worse than none. vLLM reads this after it has made its connector.
        transfer.kv_load_failure_policy = "recompute"
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._ready = Ready(reason="the KV caches are not registered yet")
        self._ended = Ended()
        self._broken = False
        if role == KVConnectorRole.SCHEDULER:
            settings = self._settings
            no_loads = "" if settings.load and transfer.is_kv_consumer else "this engine does not load"
            no_saves = "" if settings.store and transfer.is_kv_producer else "this engine does not store"
            self._scheduler = SchedulerSide(settings, partial(extras_of, Adapters()), loads=no_loads, saves=no_saves)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is lost is a miss later, nothing else."""
        return False

    # Scheduler ---------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], HoldfastHandshake]) -> None:
        """Hear what the workers keep."""
        assert self._scheduler is not None
        ranks = [metadata[place].ready for place in sorted(metadata)]
        self._scheduler.open(ranks, self._lookups)

    def _lookups(self, ranks: Sequence[Ready]) -> Lookups:
        link = Link(partial(_connect, self._settings), on_change=_say)
        return Lookups(link, ranks, self._settings.lookup_seconds)

    def _asked(self, what: Callable[[SchedulerSide], R], otherwise: R) -> R:
        """Ask the scheduler side; after a bug of ours the engine goes on without it."""
        assert self._scheduler is not None
        if self._broken:
            return otherwise
        try:
            return what(self._scheduler)
        except Exception:
            LOG.exception("holdfast: the engine goes on without the cache, because of a bug")
            self._broken = True
            return otherwise

    def on_new_request(self, request: Any) -> None:
        self._asked(lambda side: side.arrived(request), None)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._asked(lambda side: side.matched(request, num_computed_tokens), NO_MATCH)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        # Not guarded: the engine now waits for what we promised, and would wait for ever.
        if num_external_tokens:
            assert self._scheduler is not None
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        tiers = self._asked(lambda side: side.tiers(request, num_external_tokens), NO_TIERS)
        return {SOURCES[tier]: count for tier, count in tiers.items()}

    def build_connector_meta(self, scheduler_output: Any) -> HoldfastMetadata:
        blocks_of = scheduler_output.kv_connector_block_state.get_block_ids
        scheduled, preempted = scheduler_output.num_scheduled_tokens, scheduler_output.preempted_req_ids or ()
        plan = self._asked(lambda side: side.plan(scheduled, preempted, blocks_of), None)
        if plan is None:
            assert self._scheduler is not None
            plan = self._scheduler.abandon()
        return HoldfastMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        told = connector_output.kv_connector_worker_meta
        heard = told.heard if isinstance(told, HoldfastWorkerMetadata) else []
        self._asked(lambda side: side.heard(heard, connector_output.finished_sending or ()), None)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._asked(lambda side: side.ended(request, block_ids), NOT_HELD)

    def has_pending_push_work(self) -> bool:
        """The engine goes on stepping while blocks of ended requests are held."""
        return self._asked(lambda side: side.holds, otherwise=False)

    def has_pending_block_frees(self) -> bool:
        """The engine lacks blocks: rather lose a save than preempt a request."""
        return self._asked(lambda side: side.give_way(), otherwise=False)

    def get_kv_connector_stats(self) -> HoldfastStats | None:
        counts = self._scheduler.take_counts() if self._scheduler is not None else None
        return HoldfastStats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HoldfastStats:
        return HoldfastStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> HoldfastMetrics:
        return HoldfastMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def reset_cache(self) -> bool:
        """Clear what this tenant has stored in this model's pages, except what is pinned.

        It always succeeds: where the daemon does not answer, this engine reads nothing until it was cleared. Else vLLM
        could not be paused or put to sleep without a daemon.
        """
        self._asked(lambda side: side.clear(), None)
        return True

    # Worker ------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Look at what this rank keeps, and where; then the store can be used."""
        try:
            self._ready = self._opened(kv_caches)
        except HoldfastError as error:
            self._ready = Ready(reason=error.message)
        except Exception as error:  # a model of a kind that we have never seen
            LOG.exception("holdfast: a bug keeps this engine from its cache")
            self._ready = Ready(reason=f"{type(error).__name__}: {error}")

    def _opened(self, kv_caches: dict[str, torch.Tensor]) -> Ready:
        accept: Literal["verified", "any"] = "any" if self._settings.unverified_formats else "verified"
        engine, tensors = describe(self._vllm_config, self._kv_cache_config, kv_caches)
        found = ready(engine, model=self._settings.model, accept=accept)
        if found.spec is not None:
            caches = Caches(found.spec, tensors)
            part = f"#{engine.rank + 1}of{engine.ranks}" if engine.ranks > 1 else ""
            # With several groups vLLM cannot tell from a block's number whose it is.
            whole = len(self._kv_cache_config.kv_cache_groups) > 1 or found.window is not None
            self._worker = WorkerSide(self._settings, caches, partial(_connect, self._settings), part, whole=whole)
        return found

    def get_handshake_metadata(self) -> HoldfastHandshake:
        return HoldfastHandshake(self._ready)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None:
            self._worker.take_back(_plan(kv_connector_metadata))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start_loads(_plan(self._get_connector_metadata()))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are done before their request is scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole prompts are saved, behind the forward pass that ends them."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.start_saves(_plan(self._get_connector_metadata()))

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        idle = _plan(self._get_connector_metadata()).idle
        self._ended = self._worker.ended(IDLE_SECONDS if idle else 0.0)
        return KVConnectorTransferResults(self._ended.sent, self._ended.received, self._ended.failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return {block for blocks in self._ended.missing.values() for block in blocks}

    def build_connector_worker_meta(self) -> HoldfastWorkerMetadata | None:
        heard = self._worker.heard() if self._worker is not None else None
        return HoldfastWorkerMetadata([heard]) if heard is not None else None

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()


def extras_of(adapters: Adapters, request: Any, page_tokens: int, token_count: int) -> Extras | None:
    """The extra key parts of vLLM (LoRA, media, salt, embeddings) by page, in a form that is the same everywhere.

    A LoRA's weights are in the first. None: they cannot be told from others.
    """
    lora = request.lora_request
    if not (lora or request.mm_features or request.cache_salt or request.prompt_embeds is not None):
        return {}
    weights = adapters.digest(lora.lora_path) if lora else b""
    if weights is None:
        return None
    found: dict[int, bytes] = {}
    media = 0
    for page, (start, stop) in enumerate(pairwise(range(0, token_count + 1, page_tokens))):
        parts, media = generate_block_hash_extra_keys(request, start, stop, media)
        if parts:
            found[page] = msgspec.msgpack.encode(parts) + (weights if page == 0 else b"")
    return found


def _connect(settings: Settings) -> Store:
    return connect(settings.socket, data_dir=settings.directory, tenant=settings.tenant)


def _say(problem: HoldfastError | None) -> None:
    if problem is None:
        LOG.info("holdfast: connected")
    else:
        LOG.warning("holdfast: the engine goes on without the cache: %s", problem.message)


def _plan(metadata: KVConnectorMetadata) -> Plan:
    assert isinstance(metadata, HoldfastMetadata)
    return metadata.plan
