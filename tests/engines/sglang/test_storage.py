"""HoldfastHiCacheStorage against the base class, factory and file backend of SGLang's published wheel, and a daemon.

The engine itself needs CUDA, and does not run here: host pools are stand-ins with the published layouts, and conftest
imports SGLang's modules without its `__init__`.
"""

from __future__ import annotations

import inspect
import sys
import threading
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from holdfast.engine_adapter.api import connect
from holdfast.engine_adapter.objects import Objects
from holdfast.engine_adapter.sglang.storage import HoldfastHiCacheStorage, rank_facts
from holdfast.engine_adapter.shelf import Event
from holdfast.kvstore.errors import ConfigError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheFile,
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    HiCacheStorageFailureInjector,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.mem_cache.storage import StorageBackendFactory

from daemon_process import DaemonProcess, until
from host_pools import MhaPool, MlaPool

DAEMON = {"ddr__capacity_bytes": "8 MiB", "ddr__slab_bytes": "256 KiB", "nvme__capacity_bytes": "16 MiB"}
POOLS = {
    "page_first": lambda: MhaPool("page_first"),
    "page_first_direct": lambda: MhaPool("page_first_direct"),
    "page_head": lambda: MhaPool("page_head"),
    "layer_first": lambda: MhaPool("layer_first"),
    "float32": lambda: MhaPool("page_first", torch.float32),
    "float8": lambda: MhaPool("layer_first", torch.float8_e4m3fn),
    "mla": lambda: MlaPool("page_first"),
    "mla_layer_first": lambda: MlaPool("layer_first"),
}


def config(daemon: DaemonProcess, interface: int = 1, extra: dict | None = None, **changes) -> HiCacheStorageConfig:
    values = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
        "is_mla_model": False, "enable_storage_metrics": True, "is_page_first_layout": True, "model_name": "org/model",
    }  # fmt: skip
    given_here = {
        "backend_name": "holdfast",
        "module_path": "holdfast.engine_adapter.sglang.storage",
        "class_name": "HoldfastHiCacheStorage",
        "interface_v1": interface,
        "holdfast.socket": str(daemon.socket),
    }
    return HiCacheStorageConfig(**{**values, **changes}, extra_config={**given_here, **(extra or {})})


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(**DAEMON) as running:
        yield running.start()


@pytest.fixture
def opened():
    """Makes storages as SGLang's controller does, and closes them."""
    made: list[HoldfastHiCacheStorage] = []

    def make(settings_given: HiCacheStorageConfig, pool: object | None = None) -> HoldfastHiCacheStorage:
        storage = StorageBackendFactory.create_backend("dynamic", settings_given, pool)
        assert isinstance(storage, HoldfastHiCacheStorage)
        made.append(storage)
        if pool is not None:
            storage.register_mem_pool_host(pool)
            storage.on_host_pools_registered()
        return storage

    yield make
    for storage in made:
        storage.clear()
        storage.close()


def randomized(pool):
    pool.kv_buffer.view(torch.uint8).random_(1, 100)
    return pool


def keys_of(name: str, count: int) -> list[str]:
    return [f"{name}{number:060x}" for number in range(count)]


def indices(pool, pages: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(page * pool.page_size, (page + 1) * pool.page_size) for page in pages])


def flat(pool, page: int) -> bytes:
    return pool.get_data_page(page * pool.page_size).contiguous().view(torch.uint8).numpy().tobytes()


# The contract -----------------------------------------------------------------------------------


def disagreements(base: type, ours: type) -> list[str]:
    """Methods of ours that could not be called as the base class's are."""
    found = [f"{name} is abstract" for name in getattr(ours, "__abstractmethods__", ())]
    for name, theirs in inspect.getmembers(base, inspect.isfunction):
        mine = getattr(ours, name)
        if mine is theirs or (name.startswith("__") and name != "__init__"):
            continue
        wanted, got = (list(inspect.signature(one).parameters.values()) for one in (theirs, mine))
        if [one.name for one in wanted] != [one.name for one in got]:
            found.append(f"{name}: {[one.name for one in got]} for {[one.name for one in wanted]}")
            continue
        for theirs_one, mine_one in zip(wanted, got, strict=True):
            optional = theirs_one.default is not theirs_one.empty
            if theirs_one.kind != mine_one.kind or (optional and mine_one.default != theirs_one.default):
                found.append(f"{name}: {mine_one} for {theirs_one}")
    return found


def test_every_method_can_be_called_as_the_base_class_says():
    assert disagreements(HiCacheStorage, HoldfastHiCacheStorage) == []
    ours = set(vars(HoldfastHiCacheStorage))
    theirs = {name for name, _ in inspect.getmembers(HiCacheStorage, inspect.isfunction)}
    assert theirs - ours == {"on_host_pools_registered"}  # nothing to finish when all pools are known


def test_a_method_that_differs_is_noticed():
    class Wrong(HoldfastHiCacheStorage):
        def exists(self, name):
            return False

        def batch_exists(self, keys, extra_info=()):
            return 0

    assert [text.split(":")[0] for text in disagreements(HiCacheStorage, Wrong)] == ["batch_exists", "exists"]


def test_their_fault_injector_wraps_it(daemon, monkeypatch):
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "1.0")
    storage = StorageBackendFactory.create_backend("dynamic", config(daemon), None)
    assert isinstance(storage, HiCacheStorageFailureInjector)
    storage.register_mem_pool_host(MhaPool())
    assert storage.batch_exists(["a"]) == 0
    assert storage.clear()
    storage.close()


def test_an_unknown_setting_is_an_error_at_start(daemon):
    with pytest.raises(ConfigError, match="sokcet"):
        HoldfastHiCacheStorage(config(daemon, extra={"holdfast.sokcet": "x"}), {})
    with pytest.raises(ConfigError, match="load_seconds is float"):
        HoldfastHiCacheStorage(config(daemon, extra={"holdfast.load_seconds": "long"}), {})
    with pytest.raises(ConfigError, match="one of auto, write-through"):
        HoldfastHiCacheStorage(config(daemon, extra={"holdfast.write_policy": "sometimes"}), {})


# Pages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POOLS)
def test_pages_come_back_into_any_place_of_the_pool(daemon, opened, kind):
    pool = randomized(POOLS[kind]())
    storage = opened(config(daemon, is_mla_model=kind.startswith("mla")), pool)
    keys, before = keys_of(kind, 3), [flat(pool, page) for page in range(pool.page_num)]
    assert storage.batch_set_v1(keys, indices(pool, [5, 0, 9])) == [True] * 3
    assert storage.batch_exists([*keys, "x"]) == 3
    randomized(pool)
    others = {page: flat(pool, page) for page in range(pool.page_num)}
    assert storage.batch_get_v1([*keys, "x"], indices(pool, [1, 2, 3, 4])) == [True, True, True, False]
    assert [flat(pool, page) for page in (1, 2, 3)] == [before[page] for page in (5, 0, 9)]
    assert all(flat(pool, page) == others[page] for page in others if page not in (1, 2, 3))

    # The plain interface sees the same flat pages.
    target = pool.get_dummy_flat_data_page()
    assert storage.get(keys[1], target) is target
    assert target.view(torch.uint8).numpy().tobytes() == before[0]
    assert storage.get(keys[1]).numpy().tobytes() == before[0]


def test_page_first_pages_are_not_copied_through_the_pools_methods(daemon, opened, monkeypatch):
    pool = randomized(MhaPool("page_first"))
    storage = opened(config(daemon), pool)
    monkeypatch.setattr(pool, "get_data_page", None)
    monkeypatch.setattr(pool, "set_from_flat_data_page", None)
    keys = keys_of("direct", 2)
    assert storage.batch_set_v1(keys, indices(pool, [0, 1])) == [True, True]
    assert storage.batch_get_v1(keys, indices(pool, [3, 4])) == [True, True]


def without(pool, *methods):
    """A pool that lacks some forms of its pages, as SGLang's for unlike head dims, for MXFP8 and for Mamba do."""

    def refused(*_, **__):
        raise NotImplementedError("flat pages are not supported")

    for method in methods:
        setattr(pool, method, refused)
    return pool


FLAT = ("get_data_page", "get_dummy_flat_data_page", "set_from_flat_data_page")


@pytest.mark.parametrize("lacking", [FLAT, ("get_page_buffer_meta",)])
def test_one_form_of_pages_is_enough(daemon, opened, lacking):
    pool = randomized(MhaPool("page_first"))
    storage = opened(config(daemon), without(pool, *lacking))
    keys, before = keys_of("".join(lacking), 2), pool.kv_buffer.clone()
    assert storage.batch_set_v1(keys, indices(pool, [0, 1])) == [True, True]
    randomized(pool)
    assert storage.batch_get_v1(keys, indices(pool, [3, 4])) == [True, True]
    tokens = 2 * pool.page_size
    assert torch.equal(pool.kv_buffer[:, 3 * pool.page_size :][:, :tokens], before[:, :tokens])


def test_a_pool_that_gives_its_pages_in_no_form_for_now_misses(daemon, opened):
    pool = without(randomized(MhaPool("page_first")), *FLAT)
    storage = opened(config(daemon), pool)
    keys = keys_of("for now", 2)
    assert storage.batch_set_v1(keys, indices(pool, [0, 1])) == [True, True]
    without(pool, "get_page_buffer_meta")
    assert storage.batch_set_v1(keys_of("later", 2), indices(pool, [0, 1])) == [False, False]
    assert storage.batch_get_v1(keys, indices(pool, [3, 4])) == [False, False]


def no_bytes(pool):
    """LogicalHostPool: indices alone."""
    pool.get_dummy_flat_data_page, pool.get_page_buffer_meta = lambda: torch.empty(0), lambda _: None
    return pool


@pytest.mark.parametrize(
    "pool",
    [
        lambda: without(MhaPool("layer_first"), *FLAT),
        lambda: without(MhaPool("page_first"), *FLAT, "get_page_buffer_meta"),
        lambda: no_bytes(MhaPool("page_first")),
    ],
)
def test_a_pool_whose_pages_cannot_be_had_is_left_out_and_its_engine_starts(daemon, opened, caplog, pool):
    made = pool()
    storage = opened(config(daemon), made)
    assert "pool kv (MhaPool) is not kept" in caplog.text
    keys = keys_of("left out", 2)
    assert storage.batch_set_v1(keys, indices(made, [0, 1])) == [False, False]
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v1(keys, indices(made, [0, 1])) == [False, False]


def test_the_plain_interface_as_the_controller_uses_it(daemon, opened):
    pool = randomized(MhaPool("layer_first"))
    storage = opened(config(daemon, interface=0, is_page_first_layout=False), pool)
    keys = keys_of("plain", 3)
    assert storage.batch_set(keys, [pool.get_data_page(page * pool.page_size) for page in range(3)])
    found = storage.batch_get([*keys[:2], "x", keys[2]], [pool.get_dummy_flat_data_page() for _ in range(4)])
    assert [one is not None for one in found] == [True, True, False, True]
    for page, content in enumerate(found[:2]):
        pool.set_from_flat_data_page((page + 8) * pool.page_size, content)
        assert flat(pool, page + 8) == flat(pool, page)
    assert storage.set("one", found[0])
    assert storage.exists("one")
    assert storage.get("one", torch.zeros(3)) is None  # of another size
    assert storage.get("one", torch.zeros(8, 256, dtype=torch.bfloat16)[:, ::2]) is None  # not contiguous
    assert not storage.exists("two")
    assert not storage.set("nothing")


def test_pages_leave_behind_those_that_follow_them(daemon, opened, monkeypatch):
    pool = randomized(MhaPool())
    storage = opened(config(daemon), pool)
    behind: list[bytes | None] = []
    put = Objects.put

    def noted(*args, **given):
        if "behind" in given:  # not the word that is left of this layout
            behind.append(given["behind"])
        return put(*args, **given)

    monkeypatch.setattr(Objects, "put", noted)
    assert storage.batch_set_v1(["a", "b"], indices(pool, [0, 1])) == [True, True]
    more = HiCacheStorageExtraInfo(prefix_keys=["a", "b"])
    assert storage.batch_set_v1(["c"], indices(pool, [2]), more) == [True]
    assert behind == [None, b"b"]


def test_wrong_indices_and_unknown_pools_are_misses(daemon, opened):
    pool = randomized(MhaPool())
    storage = opened(config(daemon), pool)
    assert storage.batch_set_v1(["a", "b"], indices(pool, [0])) == [False, False]
    assert storage.batch_get_v1(["a"], indices(pool, [0, 1])) == [False]
    nowhere = PoolTransfer(PoolName.SWA, host_indices=indices(pool, [0]), keys=["a"])
    assert storage.batch_set_v2([nowhere]) == {PoolName.SWA: [False]}
    assert storage.batch_get_v2([PoolTransfer(PoolName.KV, keys=["a"])]) == {PoolName.KV: [False]}


def test_long_keys_are_kept_apart(daemon, opened):
    storage = opened(config(daemon), MhaPool())
    page = torch.ones(4, dtype=torch.uint8)
    assert storage.batch_set(["k" * 500 + "a", "k" * 500 + "b", ""], [page, page * 2, page * 3])
    assert [int(storage.get(key)[0]) for key in ("k" * 500 + "a", "k" * 500 + "b", "")] == [1, 2, 3]


# Whose pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "pool"),
    [
        ({"tp_size": 2}, MhaPool),
        ({"tp_rank": 1, "tp_size": 2}, MhaPool),
        ({"pp_size": 2}, MhaPool),
        ({"attn_cp_size": 2}, MhaPool),
        ({"model_name": "org/other"}, MhaPool),
        ({"extra": {"holdfast.model": "org/model@2"}}, MhaPool),
        ({"extra": {"holdfast.layout": "fp8 scales"}}, MhaPool),
        ({"extra": {"holdfast.tenant": "others"}}, MhaPool),
        ({"interface": 0}, MhaPool),
        ({}, lambda: MhaPool("page_head")),
        ({}, lambda: MhaPool(dtype=torch.float16)),
        ({}, lambda: MhaPool(page_size=8)),
        ({}, lambda: MhaPool(heads=4, dim=4)),
        ({}, lambda: MlaPool(width=32)),
    ],
)
def test_pages_of_another_form_are_misses(daemon, opened, changes, pool):
    here = opened(config(daemon), randomized(MhaPool()))
    assert here.set("a", torch.ones(8))
    assert opened(config(daemon), MhaPool()).exists("a")  # the control
    assert not opened(config(daemon, **changes), pool()).exists("a")


def test_ranks_of_mla_share_their_latents_but_not_their_states(daemon, opened):
    ranks = []
    for rank in range(2):
        pool = randomized(MlaPool())
        storage = opened(config(daemon, is_mla_model=True, tp_rank=rank, tp_size=2), pool)
        storage.register_mem_host_pool_v2(pool, PoolName.MAMBA)
        storage.register_mem_host_pool_v2(pool, PoolName.INDEXER)
        ranks.append((storage, pool))
    (first, pool), (second, _) = ranks
    assert first.batch_set_v1(["a"], indices(pool, [0])) == [True]
    assert second.exists("a")
    for name, shared in ((PoolName.MAMBA, False), (PoolName.INDEXER, True)):
        transfer = PoolTransfer(name, host_indices=indices(pool, [1]), keys=["a"])
        assert first.batch_set_v2([transfer]) == {name: [True]}
        assert second.batch_get_v2([transfer]) == {name: [shared]}


def test_context_parallel_decoding_is_part_of_the_rank():
    def facts(**changes):
        values = {
            "tp_rank": 1, "tp_size": 4, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
            "is_mla_model": True, "enable_storage_metrics": False, "is_page_first_layout": True, "model_name": "m",
            "dcp_size": 2, "dcp_rank": 1, "logical_page_size": 8,
        }  # fmt: skip
        return rank_facts(HiCacheStorageConfig(**{**values, **changes}), str(PoolName.KV))

    assert facts() == facts(tp_rank=3)
    assert facts() != facts(tp_rank=2, dcp_rank=0)
    assert facts() != facts(logical_page_size=16)


# Several pools ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kv=st.integers(0, 5),
    side=st.sets(st.integers(0, 5)),
    other=st.sets(st.integers(0, 5)),
    policy=st.sampled_from([PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES]),
    window=st.integers(0, 3),
)
def test_prefixes_over_pools_are_those_of_sglangs_file_backend(pools, kv, side, other, policy, window):
    """SGLang's own backend is the model."""
    storage, files, pool = pools
    storage.clear()
    files.clear()
    keys = keys_of("k", 6)
    there = {PoolName.KV: set(range(kv)), PoolName.SWA: side, PoolName.INDEXER: other}
    transfers = [
        PoolTransfer(name, host_indices=indices(pool, [0] * len(some)), keys=[keys[number] for number in sorted(some)])
        for name, some in there.items()
        if some
    ]
    for backend in (storage, files):
        assert all(all(kept) for kept in backend.batch_set_v2(transfers).values())
    asked = [
        PoolTransfer(PoolName.SWA, keys=keys[:window], hit_policy=policy),
        PoolTransfer(PoolName.INDEXER, hit_policy=PoolHitPolicy.ALL_PAGES),
    ]
    assert storage.batch_exists_v2(keys, asked) == files.batch_exists_v2(keys, asked)
    assert storage.batch_exists_v2(keys) == files.batch_exists_v2(keys)


@pytest.fixture(scope="module")
def pools(daemon, tmp_path_factory):
    pool = randomized(MhaPool())
    ours = HoldfastHiCacheStorage(config(daemon, model_name="org/pools"), {})
    with pytest.MonkeyPatch.context() as patch:  # its evictor imports the whole engine, and has nothing to evict here
        patch.setitem(sys.modules, "sglang.srt.mem_cache.storage.file", ModuleType("file"))
        evictor = ModuleType("lru_file_evictor")
        evictor.LRUFileEvictor = lambda *_, **__: MagicMock()
        patch.setitem(sys.modules, "sglang.srt.mem_cache.storage.file.lru_file_evictor", evictor)
        files = HiCacheFile(config(daemon), str(tmp_path_factory.mktemp("hicache")))
    ours.register_mem_pool_host(pool)
    for backend in (ours, files):
        for name in (PoolName.KV, PoolName.SWA, PoolName.INDEXER):
            backend.register_mem_host_pool_v2(pool, name)
    yield ours, files, pool
    ours.close()


def test_a_policy_that_is_not_known_says_nothing(daemon, opened):
    pool = randomized(MhaPool())
    storage = opened(config(daemon), pool)
    assert storage.batch_set_v1(keys_of("g", 2), indices(pool, [0, 1])) == [True, True]
    groups = PoolTransfer(PoolName.DEEPSEEK_V4_C4, hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=2, group_pages=1)
    assert storage.batch_exists_v2(keys_of("g", 3), [groups]) == PoolTransferResult(2, {PoolName.KV: 2}, [1, 2])


# A daemon that goes away, and is full -----------------------------------------------------------


def test_what_was_stored_outlives_daemons_and_engines(opened):
    with DaemonProcess(**DAEMON) as daemon:
        pool = randomized(MhaPool())
        storage = HoldfastHiCacheStorage(config(daemon, extra={"holdfast.write_policy": "write-through"}), {})
        storage.register_mem_pool_host(pool)
        keys = keys_of("life", 4)
        try:
            assert storage.batch_set_v1(keys, indices(pool, [0, 1, 2, 3])) == [False] * 4  # nobody there yet
            daemon.start()
            until(lambda: all(storage.batch_set_v1(keys, indices(pool, [0, 1, 2, 3]))), "it connects")
            namespace = storage._kv.origin.namespace
            with connect(daemon.socket) as store:
                until(
                    lambda: all(store.document(f"{namespace}/{key.encode().hex()}").durable for key in keys),
                    "they are on disk",
                )
            daemon.kill()
            assert storage.batch_get_v1(keys, indices(pool, [4, 5, 6, 7])) == [False] * 4
            assert (storage.batch_exists(keys), storage.exists("a"), storage.get("a")) == (0, False, None)
            assert not storage.set("a", torch.ones(4))
            assert storage.batch_exists_v2(keys) == PoolTransferResult(0, {}, [])
            assert not storage.clear()
            assert storage.counts[Event.UNANSWERED] > 0
            daemon.start()
            until(lambda: storage.batch_exists(keys) == 4, "it is back, with what it had")
            assert storage.batch_get_v1(keys, indices(pool, [4, 5, 6, 7])) == [True] * 4
            assert [flat(pool, page) for page in (4, 5, 6, 7)] == [flat(pool, page) for page in range(4)]
            assert daemon.stop() == 0
        finally:
            storage.close()
        daemon.cool()
        daemon.start()
        other = randomized(MhaPool())
        again = HoldfastHiCacheStorage(config(daemon), {})
        again.register_mem_pool_host(other)
        try:
            assert again.batch_get_v1(keys, indices(other, [0, 1, 2, 3])) == [True] * 4
            assert [flat(other, page) for page in range(4)] == [flat(pool, page) for page in range(4)]
        finally:
            again.close()


def test_a_full_daemon_refuses_and_says_so():
    with DaemonProcess(ddr__capacity_bytes="1 MiB", ddr__slab_bytes="64 KiB", nvme__capacity_bytes="1 MiB") as daemon:
        daemon.start()
        storage = HoldfastHiCacheStorage(config(daemon), {})
        try:
            large = torch.zeros(4 << 20, dtype=torch.uint8)
            assert not storage.set("large", large)
            assert storage.set("small", large[:4096])
            assert storage.counts[Event.REFUSED] == 1
        finally:
            storage.close()


def test_it_is_used_from_several_threads(daemon, opened):
    pool = randomized(MhaPool("layer_first", pages=64))
    storage = opened(config(daemon), pool)
    wrong: list[object] = []

    def work(number: int) -> None:
        keys, pages = keys_of(f"t{number}", 4), [number * 8 + step for step in range(4)]
        for _ in range(5):
            wrong.extend(good for good in storage.batch_set_v1(keys, indices(pool, pages)) if not good)
            loaded = storage.batch_get_v1(keys, indices(pool, [page + 4 for page in pages]))
            wrong.extend(good for good in loaded if not good)
            wrong.extend(page for page in pages if flat(pool, page) != flat(pool, page + 4))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert wrong == []


def test_numbers_in_sglangs_own_form(daemon, opened, monkeypatch):
    pool = randomized(MhaPool())
    storage = opened(config(daemon), pool)
    storage.batch_set_v1(keys_of("n", 3), indices(pool, [0, 1, 2]))
    storage.batch_get_v1(keys_of("n", 2), indices(pool, [3, 4]))
    module = ModuleType("sglang.srt.observability.metrics_collector")
    module.StorageMetrics = lambda: SimpleNamespace(
        prefetch_pgs=[], backup_pgs=[], prefetch_bandwidth=[], backup_bandwidth=[]
    )
    monkeypatch.setitem(sys.modules, "sglang.srt.observability.metrics_collector", module)
    stats = storage.get_stats()
    assert (stats.prefetch_pgs, stats.backup_pgs) == ([2], [3])
    assert all(rate > 0 for rate in stats.prefetch_bandwidth + stats.backup_bandwidth)
    assert storage.get_stats().backup_pgs == []
    assert storage.counts == {"stored": 3, "loaded": 2}
    monkeypatch.setitem(sys.modules, "sglang.srt.observability.metrics_collector", None)
    assert storage.get_stats() is None
