"""HoldfastTier with vLLM's own classes and without an engine: what happens when things go wrong between two steps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from holdfast.engine_adapter.link import Link
from holdfast.engine_adapter.vllm import tier as tier_module
from holdfast.engine_adapter.vllm.tier import CONNECTED, HINTS, OBJECTS, HoldfastTier
from holdfast.kvstore.errors import DeadlineExceeded
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from daemon_process import until
from fake_objects import FakeStore, World

ROWS, ROW_BYTES = 16, 4096
STEP_OVER = ScheduleEndContext(new_req_ids=(), preempted_req_ids=())


def spec(model: str = "org/model", block: int = 32, tp: int = 1) -> SimpleNamespace:
    """As much of an OffloadingSpec as a tier is given."""
    config = OffloadingConfig(
        groups=(OffloadingGroupConfig(block, ("layer.0",), 0),),
        worker_kv_bytes_per_block=ROW_BYTES,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="e",
        model=OffloadingModelConfig(model, "bfloat16"),
        cache=OffloadingCacheConfig(block, 1),
        parallel=OffloadingParallelConfig(0, tp, tp, 1, 1, 1, 0, 1, None, is_parallelism_agnostic=False),
    )
    return SimpleNamespace(config=config, blocks_per_chunk=1, tokens_per_block=(block,), replicated_layout=False)


class Bench:
    """A tier, the primary tier's rows, and the framework's part of the conversation."""

    def __init__(self, monkeypatch, world: World, made_of: SimpleNamespace | None = None, **settings) -> None:
        self.world = world
        monkeypatch.setattr(
            tier_module, "link_to", lambda *_: Link(lambda: FakeStore(world), retry_seconds=0.02, rest_seconds=60.0)
        )
        self.rows = np.random.default_rng(0).integers(0, 255, (ROWS, ROW_BYTES), np.uint8)
        self.view = memoryview(self.rows)
        self.tier = SecondaryTierFactory.create_secondary_tier(
            {"type": "HoldfastTier", "module_path": "holdfast.engine_adapter.vllm.tier", **settings},
            self.view,
            made_of or spec(),
        )
        self.jobs = 0
        if world.there:
            assert self.tier._link.wait(20.0)

    def request(self, name: str, params: dict | None = None, actions: list | None = None) -> ReqContext:
        hints = None if actions is None else KvHintsEnvelope("1", "m", [KvHintAction(**one) for one in actions])
        context = ReqContext(name, params, hints)
        for number in range(ROWS):
            context.set_offload_key_position(key(number), (number + 1) * 32)
        self.tier.on_new_request(context)
        return context

    def look(self, numbers: list[int], context: ReqContext) -> list[LookupResult]:
        """Step after step, until nothing is to be retried."""
        found: list[LookupResult] = []

        def settled() -> bool:
            found[:] = [self.tier.lookup(key(number), context) for number in numbers]
            self.tier.on_schedule_end(STEP_OVER)
            return LookupResult.RETRY not in found

        until(settled, "all is looked up")
        return found

    def submit(self, numbers: list[int], rows: list[int], context: ReqContext, *, load: bool = False) -> int:
        self.jobs += 1
        job = TransferJob(self.jobs, [key(n) for n in numbers], np.array(rows, np.int32), load, context)
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        return self.jobs

    def results(self, count: int) -> dict:
        found: dict = {}
        until(
            lambda: found.update({one.job_id: one for one in self.tier.get_finished_jobs()}) or len(found) == count,
            "the jobs end",
        )
        return found

    def counts(self) -> dict[str, float]:
        """Everything told so far, by label."""
        stats = self.tier.get_stats()
        for name, values in stats._values.items():
            for labels, value in values.items():
                told = ":".join([name.removeprefix("vllm:kv_offload_holdfast_"), *labels])
                self.told[told] = self.told.get(told, 0) + value if stats._types[name] == "counter" else value
        return self.told

    @property
    def told(self) -> dict[str, float]:
        return self.__dict__.setdefault("_told", {})


def key(number: int) -> bytes:
    return make_offload_key(bytes([number]) * 32, 0)


@pytest.fixture
def world():
    return World()


@pytest.fixture
def bench(monkeypatch, world):
    made = Bench(monkeypatch, world)
    yield made
    world.gate.set()
    made.tier.shutdown()
    made.view.release()  # as the framework does: nothing of ours holds it


def test_it_has_all_that_the_base_class_asks_for():
    assert issubclass(HoldfastTier, SecondaryTierManager)
    assert not HoldfastTier.__abstractmethods__


def test_chunks_go_out_and_come_back_into_other_rows(bench, world):
    before, context = bench.rows.copy(), bench.request("r")
    assert bench.look([0, 1], context) == [LookupResult.MISS] * 2
    job = bench.submit([1, 0], [5, 4], context)
    assert bench.results(1)[job].success
    assert world.behind[-1] is None
    assert list(world.of("vllm-model-")) == [key(0), key(1)]  # in prefix order
    bench.submit([2], [6], context)
    bench.results(1)
    assert world.behind[-1] == key(1)

    other = bench.request("s")
    assert bench.look([0, 1, 3], other) == [LookupResult.HIT, LookupResult.HIT, LookupResult.MISS]
    job = bench.submit([0, 1], [10, 11], other, load=True)
    result = bench.results(1)[job]
    assert (result.success, result.transfer_bytes) == (True, 2 * ROW_BYTES)
    assert (bench.rows[[10, 11]] == before[[4, 5]]).all()
    bench.submit([3], [7], other)
    bench.results(1)
    assert world.behind[-1] == key(1)  # what the request found, it goes on from


def test_what_was_found_and_is_gone_is_a_miss_for_this_request_at_once(bench, world):
    context = bench.request("r")
    bench.submit([0, 1], [0, 1], context)
    bench.results(1)
    assert bench.look([0, 1], context) == [LookupResult.HIT] * 2
    del world.of("vllm-model-")[key(1)]
    job = bench.submit([0, 1], [2, 3], context, load=True)
    result = bench.results(1)[job]
    assert (result.success, result.successful_keys) == (False, (key(0),))
    assert bench.tier.lookup(key(1), context) is LookupResult.MISS
    bench.tier._lookups.found([key(1)])  # somebody else says that it is there
    assert bench.tier.lookup(key(1), context) is LookupResult.MISS  # no second try for this one
    assert bench.tier.lookup(key(1), bench.request("s")) is LookupResult.HIT


def test_a_daemon_that_is_away_misses_and_drops_at_once_and_comes_back(bench, world):
    context = bench.request("r")
    bench.submit([0], [0], context)
    bench.results(1)
    world.go_away()
    assert bench.tier.lookup(key(0), context) is LookupResult.MISS
    job = bench.submit([1], [1], context)
    assert not bench.results(1)[job].success
    counts = bench.counts()
    assert (counts["objects:dropped"], counts["objects:late"], counts["connected"]) == (1, 1, 0)
    world.there = True
    until(lambda: bench.tier._link.is_up, "it is back")
    assert bench.look([0], bench.request("s")) == [LookupResult.HIT]


def test_a_daemon_that_hangs_holds_a_request_for_the_lookups_deadline_only(bench, world):
    context = bench.request("r")
    world.gate.clear()
    assert bench.tier.lookup(key(0), context) is LookupResult.RETRY
    bench.tier.on_schedule_end(STEP_OVER)
    until(lambda: bench.tier.lookup(key(0), context) is LookupResult.MISS, "it waits no longer")
    assert bench.tier.lookup(key(1), context) is LookupResult.MISS
    assert bench.tier.lookup(key(2), bench.request("s")) is LookupResult.MISS  # nor does anybody after it
    world.error = DeadlineExceeded("slow")
    world.gate.set()
    until(lambda: not bench.tier._link.is_up, "the daemon is left alone for a while")


def test_queues_have_limits(monkeypatch, world):
    bench = Bench(monkeypatch, world, store_queue=2, load_queue=2)
    context = bench.request("r")
    world.gate.clear()
    held = bench.submit([0, 1], [0, 1], context)
    refused = bench.submit([2], [2], context)
    assert [one.job_id for one in bench.tier.get_finished_jobs()] == [refused]
    loading = bench.submit([0, 1], [3, 4], context, load=True)
    too_many = bench.submit([5], [5], context, load=True)
    assert [(one.job_id, one.success) for one in bench.tier.get_finished_jobs()] == [(too_many, False)]
    assert bench.tier.lookup(key(5), context) is LookupResult.MISS
    assert bench.counts()["waiting:store"] == 2
    world.gate.set()
    assert set(bench.results(2)) == {held, loading}
    assert bench.counts()["objects:dropped"] == 1
    bench.tier.shutdown()


def test_draining_leaves_nothing_that_touches_rows(bench, world):
    context = bench.request("r")
    world.gate.clear()
    jobs = [bench.submit([number], [number], context) for number in range(4)]
    until(lambda: world.stores, "one is under way")
    until(lambda: bench.tier._transfers._lanes["store"].waiting.__len__() == 3, "the others wait")
    world.gate.set()
    bench.tier.drain_jobs()
    results = bench.results(4)
    assert set(results) == set(jobs)
    assert results[jobs[0]].success
    assert not any(results[job].success for job in jobs[1:])


def test_requests_say_what_they_want(bench, world):
    stored = bench.request("r")
    bench.submit([0], [0], stored)
    bench.results(1)
    left = bench.request("s", {"store": False, "load": False})
    assert bench.tier.lookup(key(0), left) is LookupResult.MISS
    job = bench.submit([1], [1], left)
    result = bench.results(1)[job]
    assert (result.success, result.transfer_bytes) == (True, 0)
    assert key(1) not in world.of("vllm-model-")


def test_pins_hold_what_a_request_finds_and_stores(bench, world):
    bench.submit([0], [0], bench.request("r"))
    bench.results(1)
    pin = {
        "action_id": "a",
        "action_type": "pin",
        "action_version": "1",
        "payload": {"ttl_seconds": 1e9, "owner": "me"},
    }
    other = {"action_id": "b", "action_type": "evict", "action_version": "1", "payload": {}}
    context = bench.request("s", actions=[pin, other])
    assert bench.look([0, 1], context) == [LookupResult.HIT, LookupResult.MISS]
    bench.submit([1], [1], context)
    bench.results(1)
    bench.tier.on_request_finished(context)
    until(lambda: len(world.pins) == 2, "both are pinned")
    assert world.pins == [([key(1)], 86_400.0, "me", "a"), ([key(0)], 86_400.0, "me", "a")]
    counts = bench.counts()
    assert (counts["hints:clipped"], counts["hints:unknown"], counts["objects:pinned"]) == (1, 1, 2)


def test_touches_are_passed_on_with_the_step(bench, world):
    bench.tier.touch([key(0), key(1), key(0)], bench.request("r"))
    bench.tier.on_schedule_end(STEP_OVER)
    until(lambda: world.touched == [key(0), key(1)], "they are touched")


def test_numbers_are_told_once_and_defined(bench):
    assert set(HoldfastTier.build_metric_definitions({})) >= {OBJECTS, HINTS, CONNECTED}
    bench.look([0], bench.request("r"))
    assert bench.counts()["objects:miss"] == 1
    assert bench.counts()["objects:miss"] == 1
    for name in bench.tier.get_stats()._values:
        assert name in HoldfastTier.build_metric_definitions({})


@pytest.mark.parametrize("other", [{"model": "org/else"}, {"block": 64}, {"tp": 2}])
def test_another_layout_or_model_finds_nothing(monkeypatch, bench, world, other):
    bench.submit([0], [0], bench.request("r"))
    bench.results(1)
    same = Bench(monkeypatch, world)
    assert same.look([0], same.request("r")) == [LookupResult.HIT]
    changed = Bench(monkeypatch, world, spec(**other))
    assert changed.look([0], changed.request("r")) == [LookupResult.MISS]
    for one in (same, changed):
        one.tier.shutdown()


def test_an_unknown_setting_is_an_error_at_start(monkeypatch, world):
    with pytest.raises(TypeError, match="sokcet"):
        Bench(monkeypatch, world, sokcet="x")
