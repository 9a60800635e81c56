r"""HoldfastHiCacheStorage: Holdfast below SGLang's HiCache, by its "dynamic" storage backend (0.5.23), without a fork.

    python -m sglang.launch_server --model-path MODEL --enable-hierarchical-cache --hicache-mem-layout page_first \
        --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "holdfast",
            "module_path": "holdfast.engine_adapter.sglang.storage", "class_name": "HoldfastHiCacheStorage",
            "interface_v1": 1}'

The extra config may also say `holdfast.socket` or `holdfast.data_dir` (where the daemon is), `holdfast.tenant`,
`holdfast.model` (names the weights where the model is no local directory; say its revision), `holdfast.layout`
(anything else that changes what pages mean, such as quantisation), `holdfast.write_policy`, `holdfast.load_seconds`,
`holdfast.store_seconds`. With `interface_v1` pages of page-first layouts are read and written in place.

Every page is an object. Its namespace says model, layout and rank, so that a page of another form is a miss. Batches
go in prefix order, and whatever fails is a miss or is not stored: SGLang computes. Tested against the base class of the
published wheel, not with a running engine, which needs CUDA.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.version import __version__ as sglang_version

from ...kvstore.document import WritePolicy
from ...kvstore.errors import ConfigError, UnknownPageFormat
from ..link import link_to
from ..namespaces import Origin, model_identity
from ..shelf import Patience, Shelf
from .pools import HostPool, Pages, flat_bytes

if TYPE_CHECKING:
    from sglang.srt.mem_cache.pool_host import HostKVCache
    from sglang.srt.observability.metrics_collector import StorageMetrics

log = logging.getLogger(__name__)

PREFIX: Final = "holdfast."
SETTINGS: Final = {
    "socket": str,
    "data_dir": str,
    "tenant": str,
    "model": str,
    "layout": str,
    "write_policy": WritePolicy,
    "load_seconds": float,
    "store_seconds": float,
}
KEY_BYTES: Final = 128
CONNECT_SECONDS: Final = 2.0
SAMPLES_MAX: Final = 1024


class _Sample(NamedTuple):
    """One batch of KV pages."""

    pages: int
    size_bytes: int
    seconds: float


class _Pool(NamedTuple):
    """A host pool that SGLang registered, and where its pages are kept."""

    pages: Pages
    shelf: Shelf


class HoldfastHiCacheStorage(HiCacheStorage):
    """See the module. Methods may be called from any thread; none raises what is the daemon's."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None) -> None:
        self._config = storage_config
        self._settings = _settings(storage_config.extra_config or {})
        given = self._settings
        self._link = link_to(given.get("socket"), given.get("data_dir"), given.get("tenant", "default"))
        self._lock = threading.Lock()
        self._pools: dict[str, _Pool] = {}
        self._plain: Shelf | None = None  # of values without a pool
        self._loads: deque[_Sample] = deque(maxlen=SAMPLES_MAX)
        self._stores: deque[_Sample] = deque(maxlen=SAMPLES_MAX)
        self._weights = given.get("model") or model_identity(storage_config.model_name or "")
        self._link.wait(CONNECT_SECONDS)  # the first requests should find what there is

    # Pools -------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        """Take the pool of KV pages: it decides what a page's bytes mean."""
        super().register_mem_pool_host(mem_pool_host)
        self._register(str(PoolName.KV), mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: HostKVCache, host_pool_name: PoolName) -> None:
        """Take a pool beside it."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(str(host_pool_name), host_pool)

    def _register(self, name: str, pool: HostPool) -> None:
        try:
            pages = Pages(pool)
        except UnknownPageFormat as error:
            log.warning("SGLang's pool %s (%s) is not kept in Holdfast: %s", name, type(pool).__name__, error.message)
            return
        shelf = self._shelf(name, pages.facts, pages.tokens if name == PoolName.KV else 0)
        with self._lock:
            self._pools[name] = _Pool(pages, shelf)

    def _shelf(self, pool: str, facts: Mapping[str, Any], tokens_each: int) -> Shelf:
        ranks, sizes = rank_facts(self._config, pool)
        origin = Origin(
            engine="sglang",
            model=self._config.model_name or "",
            part=f"{pool} {ranks}",
            facts={
                "sglang": sglang_version,
                "weights": self._weights,
                "layout tag": self._settings.get("layout", ""),
                **sizes,
                **facts,
            },
        )
        patience = Patience()
        return Shelf(
            self._link,
            origin,
            tokens_each=tokens_each,
            write_policy=self._settings.get("write_policy", WritePolicy.AUTO),
            patience=Patience(
                load_seconds=self._settings.get("load_seconds", patience.load_seconds),
                store_seconds=self._settings.get("store_seconds", patience.store_seconds),
            ),
        )

    @property
    def _kv(self) -> Shelf:
        """Where KV pages are kept."""
        with self._lock:
            if (pool := self._pools.get(str(PoolName.KV))) is not None:
                return pool.shelf
            if self._plain is None:
                self._plain = self._shelf("", {"page first": self._config.is_page_first_layout}, 0)
            return self._plain

    # Single values -----------------------------------------------------------------------------

    def get(
        self,
        key: str,
        target_location: torch.Tensor | None = None,
        target_sizes: Any | None = None,
    ) -> torch.Tensor | None:
        """The flat page, in `target_location` if there is one (then only a page of its size); None: a miss."""
        return self.batch_get([key], None if target_location is None else [target_location], target_sizes)[0]

    def batch_get(
        self,
        keys: list[str],
        target_locations: Sequence[torch.Tensor] | None = None,
        target_sizes: Any | None = None,
    ) -> list[torch.Tensor | None]:
        """Flat pages, each as `get` does. Behind the first miss, some may be missing that are there."""
        began = time.monotonic()
        if target_locations is None:
            found = self._kv.copies([_name(key) for key in keys])
            return [None if content is None else torch.frombuffer(content, dtype=torch.uint8) for content in found]
        whole = [target.is_contiguous() for target in target_locations]
        if not all(whole):
            return [None] * len(keys)
        buffers = [flat_bytes(target) for target in target_locations]
        loaded = self._kv.load_into([_name(key) for key in keys], buffers)
        self._sample(self._loads, sum(buffer.nbytes for buffer in buffers[: loaded.count(True)]), loaded, began)
        return [target if good else None for target, good in zip(target_locations, loaded, strict=True)]

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: torch.Tensor | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Store a flat page; whether it is there now."""
        return self.batch_set(
            [key],
            None if value is None else [value],
            None if target_location is None else [target_location],
            target_sizes,
        )

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: Sequence[torch.Tensor] | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Store flat pages; whether all are there now."""
        began = time.monotonic()
        pages = values if values is not None else target_locations
        if pages is None or len(pages) != len(keys):
            return False
        contents = [flat_bytes(page.contiguous()) for page in pages]
        items = [(_name(key), content) for key, content in zip(keys, contents, strict=True)]
        kept = self._kv.put(items)
        self._sample(self._stores, sum(content.nbytes for content in contents), kept, began)
        return all(kept)

    def exists(self, key: str) -> bool:
        """Whether it is there, in any tier."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many of the first are there, one after the other."""
        return _leading(self._kv.find([_name(key) for key in keys]))

    # Pages of the KV pool ----------------------------------------------------------------------

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Write pages into the KV pool: which were."""
        return self._load(str(PoolName.KV), keys, host_indices)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Store pages of the KV pool: which are there now."""
        return self._store(str(PoolName.KV), keys, host_indices, extra_info)

    def _load(self, name: str, keys: Sequence[str], indices: torch.Tensor | None) -> list[bool]:
        began = time.monotonic()
        pool = self._pools.get(name)
        if pool is None or indices is None or not pool.pages.fits(len(keys), indices):
            return [False] * len(keys)
        try:
            writing = pool.pages.write(indices)
        except UnknownPageFormat:
            return [False] * len(keys)
        loaded = pool.shelf.visit([_name(key) for key in keys], pool.pages.size_bytes, writing.put)
        if name == PoolName.KV:
            self._sample(self._loads, loaded.count(True) * pool.pages.size_bytes, loaded, began)
        return loaded

    def _store(
        self,
        name: str,
        keys: Sequence[str],
        indices: torch.Tensor | None,
        extra_info: HiCacheStorageExtraInfo | None,
    ) -> list[bool]:
        began = time.monotonic()
        pool = self._pools.get(name)
        if pool is None or indices is None or not pool.pages.fits(len(keys), indices):
            return [False] * len(keys)
        try:
            contents = pool.pages.sources(indices)
        except UnknownPageFormat:
            return [False] * len(keys)
        before = extra_info.prefix_keys if extra_info is not None else None
        kept = pool.shelf.put(
            [(_name(key), content) for key, content in zip(keys, contents, strict=True)],
            _name(before[-1]) if before else None,
        )
        if name == PoolName.KV:
            self._sample(self._stores, kept.count(True) * pool.pages.size_bytes, kept, began)
        return kept

    # Several pools -----------------------------------------------------------------------------

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """The longest prefix that all pools can restore, and how far each of them reaches alone.

        A pool with a policy that is not known here says nothing, and does not shorten it.
        """
        pages = self.batch_exists(keys, extra_info)
        reach: dict[str, int] = {PoolName.KV: pages} if pages else {}
        restorable = list(range(1, pages + 1))
        for transfer in pool_transfers or []:
            if not restorable:
                break
            if transfer.hit_policy not in (PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES):
                continue
            pool = self._pools.get(str(transfer.name))
            there = pool.shelf.find([_name(key) for key in keys[:pages]]) if pool is not None else [False] * pages
            if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
                good = set(range(1, _leading(there) + 1))
            else:
                window = max(1, len(transfer.keys or ()))
                good = {stop for stop in range(1, pages + 1) if all(there[max(0, stop - window) : stop])}
            if good:
                reach[transfer.name] = max(good)
            restorable = [stop for stop in restorable if stop in good]
        return PoolTransferResult(restorable[-1] if restorable else 0, reach, restorable)

    def batch_get_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        """Write pages into each transfer's pool: which were, by pool."""
        return {one.name: self._load(str(one.name), one.keys or [], one.host_indices) for one in transfers}

    def batch_set_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        """Store pages of each transfer's pool: which are there now, by pool."""
        return {one.name: self._store(str(one.name), one.keys or [], one.host_indices, extra_info) for one in transfers}

    # Operating ---------------------------------------------------------------------------------

    def clear(self) -> bool:
        """Forget this rank's pages of this model and layout; False when the daemon could not be asked."""
        cleared = [shelf.clear() for shelf in self._shelves()]  # all of them, whatever became of the first
        return all(cleared)

    @property
    def counts(self) -> Counter[str]:
        """Pages of all pools by what happened to them."""
        return sum((Counter({str(k): n for k, n in shelf.counts.items()}) for shelf in self._shelves()), Counter())

    def get_stats(self) -> StorageMetrics | None:
        """Pages and GB/s of the batches since the last call; None where SGLang has no such class."""
        with suppress(ImportError):
            from sglang.srt.observability.metrics_collector import StorageMetrics

            stats = StorageMetrics()
            for samples, pages, bandwidth in (
                (self._loads, stats.prefetch_pgs, stats.prefetch_bandwidth),
                (self._stores, stats.backup_pgs, stats.backup_bandwidth),
            ):
                while samples:
                    sample = samples.popleft()
                    pages.append(sample.pages)
                    bandwidth.append(sample.size_bytes / 1e9 / max(sample.seconds, 1e-9))
            return stats
        return None

    def close(self) -> None:
        """Disconnect."""
        self._link.close()

    def _shelves(self) -> list[Shelf]:
        with self._lock:
            return [pool.shelf for pool in self._pools.values()] + ([self._plain] if self._plain is not None else [])

    def _sample(self, samples: deque[_Sample], size_bytes: int, done: Sequence[bool], began: float) -> None:
        if self._config.enable_storage_metrics and (pages := sum(done)):
            samples.append(_Sample(pages, size_bytes, time.monotonic() - began))


def rank_facts(config: HiCacheStorageConfig, pool: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Whose part of a page it is: the rank, and of how many.

    All ranks of a tensor-parallel group keep MLA's KV alike, but not Mamba's state.
    """
    ranks = {"pp": config.pp_rank, "cp": config.attn_cp_rank, "dcp": config.dcp_rank}
    sizes: dict[str, Any] = {
        "interface": 1 if (config.extra_config or {}).get("interface_v1") else 0,
        "mla": config.is_mla_model,
        "heads split": [config.tp_lcm_size, config.should_split_heads],
        "pp": config.pp_size,
        "cp": config.attn_cp_size,
        "dcp": [config.dcp_size, config.logical_page_size],
    }
    if not config.is_mla_model or pool == PoolName.MAMBA:
        ranks["tp"] = config.tp_rank
    if not config.is_mla_model or pool == PoolName.MAMBA or config.dcp_size > 1:
        sizes["tp"] = config.tp_size
    return ranks, sizes


def _settings(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of the extra config. Raises ConfigError for those that we do not know, or of another kind."""
    found: dict[str, Any] = {}
    for key, value in extra.items():
        if not key.startswith(PREFIX):
            continue
        name = key.removeprefix(PREFIX)
        if name not in SETTINGS:
            raise ConfigError(f"unknown key {key!r} in the extra config; known: {', '.join(SETTINGS)}")
        try:
            found[name] = SETTINGS[name](value)
        except (TypeError, ValueError) as error:
            kind = SETTINGS[name]
            wanted = f"one of {', '.join(WritePolicy)}" if kind is WritePolicy else kind.__name__
            raise ConfigError(f"{key} is {wanted}, not {value!r}") from error
    return found


def _leading(there: Sequence[bool]) -> int:
    return next((index for index, good in enumerate(there) if not good), len(there))


def _name(key: str) -> bytes:
    """A key of ours for one of SGLang's."""
    name = key.encode()
    return name if 0 < len(name) <= KEY_BYTES else blake2b(name, digest_size=32).digest()
