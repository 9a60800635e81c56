"""Both sides of the connector around a small engine whose KV can be told: at random, and never with a wrong page.

A page's content follows from all tokens up to its end, as KV does. Blocks that are freed are spoilt as soon as vLLM
would write there again, so that whoever still reads or writes them is found out.
"""

import hashlib
import random
import threading
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch
from holdfast.engine_adapter.api import connect
from holdfast.engine_adapter.link import Link
from holdfast.engine_adapter.vllm.caches import Caches
from holdfast.engine_adapter.vllm.lookups import Lookups
from holdfast.engine_adapter.vllm.scheduling import SchedulerSide
from holdfast.engine_adapter.vllm.settings import Settings
from holdfast.engine_adapter.vllm.worker import WorkerSide
from vllm_cases import PAGE, READY, SPEC, FakeRequest

from daemon_process import DaemonProcess, until

BLOCKS = 48
STEPS = 120
LAYERS = range(3)
FAMILIES = [np.random.default_rng(family).integers(0, 9999, 8 * PAGE).tolist() for family in range(3)]


@pytest.fixture(scope="module")
def daemon():
    sizes = {"ddr__slab_bytes": "16 MiB", "ddr__capacity_bytes": "32 MiB", "nvme__capacity_bytes": "64 MiB"}
    with DaemonProcess(**sizes, nvme__segment_bytes="16 MiB") as process:
        yield process.start()


def content(tokens, layer):
    """The KV of the page that ends with these tokens."""
    digest = hashlib.blake2b(bytes([layer]) + np.array(tokens, np.uint32).tobytes()).digest()
    return np.frombuffer(digest * (SPEC.page_bytes() // len(digest)), np.uint8)


class SlowCaches(Caches):
    """A piece or two are copied in a step of the engine, so that it takes away what is not copied yet."""

    def __init__(self, *given):
        super().__init__(*given)
        self.permits = threading.Semaphore(0)

    def put(self, *given):
        self.permits.acquire(timeout=0.01)
        super().put(*given)

    def take(self, *given):
        self.permits.acquire(timeout=0.01)
        super().take(*given)


class SmallEngine:
    """vLLM's scheduler and worker, as far as a connector sees them."""

    def __init__(self, socket, seed, **settings):
        self.random = random.Random(seed)
        self.tensors = {layer: torch.zeros(BLOCKS, 2, PAGE, 64, dtype=torch.bfloat16) for layer in LAYERS}
        self.pages = {
            layer: tensor.view(torch.uint8).reshape(BLOCKS, -1).numpy() for layer, tensor in self.tensors.items()
        }
        self.free, self.freed = list(range(1, BLOCKS)), []
        self.waiting, self.running, self.loading, self.finished = [], [], {}, {}
        self.blocks, self.left = {}, {}
        self.number = self.loaded_tokens = self.recomputed = 0
        given = Settings(save_generated=True, lookup_seconds=20.0, **settings)
        caches = SlowCaches(SPEC, {layer: (0, tensor) for layer, tensor in self.tensors.items()})
        self.permits = caches.permits
        self.worker = WorkerSide(given, caches, partial(connect, socket))
        self.side = SchedulerSide(given, lambda request, page, count: {})
        self.side.open([READY], lambda ranks: Lookups(Link(partial(connect, socket)), ranks, 20.0))
        self.worker._save_link.wait(10)
        self.worker._load_link.wait(10)

    def close(self):
        self.side.close()
        self.worker.close()

    # Blocks ------------------------------------------------------------------------------------

    def give(self, name, count):
        """Blocks for so many tokens in all."""
        wanted = -(-count // PAGE) - len(self.blocks[name])
        if wanted > len(self.free):
            return False
        for _ in range(wanted):
            self.blocks[name].append(self.free.pop(self.random.randrange(len(self.free))))
        return True

    def take(self, name):
        self.freed += self.blocks[name]
        self.free += self.blocks.pop(name)

    def compute(self, one, start, stop):
        """What the forward pass writes."""
        for page in range(start // PAGE, stop // PAGE):
            for layer in LAYERS:
                self.pages[layer][self.blocks[one.request_id][page]] = content(
                    one.all_token_ids[: (page + 1) * PAGE], layer
                )

    def check(self, one, computed):
        for page in range(computed // PAGE):
            for layer in LAYERS:
                found = self.pages[layer][self.blocks[one.request_id][page]]
                assert np.array_equal(found, content(one.all_token_ids[: (page + 1) * PAGE], layer)), (one, page, layer)

    # A step ------------------------------------------------------------------------------------

    def arrive(self):
        family = self.random.choice(FAMILIES)
        tokens = family[: self.random.randrange(1, len(family))]
        tokens += [self.random.randrange(9999) for _ in range(self.random.randrange(1, 2 * PAGE))]
        params = self.random.choice([None, None, {}, {"store": False}, {"document": f"d{self.number}"}])
        one = FakeRequest(f"r{self.number}", tokens, kv_transfer_params=params)
        self.number += 1
        self.blocks[one.request_id], self.left[one.request_id] = [], self.random.randrange(1, 20)
        self.waiting.append(one)
        self.side.arrived(one)

    def step(self):
        self.permits.release(2)
        preempted = self.preempt()
        scheduled = self.admit()
        for one in list(self.running):
            if one in scheduled or one not in self.running:
                continue
            count = max(min(one.num_tokens - one.num_computed_tokens, 3 * PAGE), 1)
            if self.give(one.request_id, one.num_computed_tokens + count):
                scheduled[one] = count
            elif not self.side.give_way():
                last = self.running[-1]
                scheduled.pop(last, None)
                preempted.append(self.put_back(last))
        plan = self.side.plan(
            {one.request_id: count for one, count in scheduled.items()},
            preempted,
            lambda name: (list(self.blocks[name]),),
        )
        self.worker.take_back(plan)
        for layer in LAYERS:  # from now on others write there
            self.pages[layer][self.freed] = 0xEE
        self.freed = []
        for one, count in scheduled.items():
            self.compute(one, one.num_computed_tokens, one.num_computed_tokens + count)
            one.num_computed_tokens += count
        self.worker.start_loads(plan)
        self.worker.start_saves(plan)
        ended, heard = self.worker.ended(), self.worker.heard()
        self.side.heard([heard] if heard is not None else [], ended.sent)
        for name in ended.received:
            self.received(name, set(ended.missing.get(name, ())))
        for name in ended.sent:
            self.take(name)
            del self.finished[name]
        for one in scheduled:
            self.sample(one)

    def preempt(self):
        return [self.put_back(one) for one in list(self.running) if self.random.random() < 0.05]

    def put_back(self, one):
        self.running.remove(one)
        self.take(one.request_id)
        self.blocks[one.request_id] = []
        one.num_computed_tokens, one.num_preemptions = 0, one.num_preemptions + 1
        self.waiting.insert(0, one)
        return one.request_id

    def admit(self):
        scheduled = {}
        for one in list(self.waiting):
            external = 0
            if one.num_computed_tokens == 0:
                external, _ = self.side.matched(one, 0)
            # What waits with blocks must be able to go on with them, or all may wait for each other.
            if external is None or not self.give(one.request_id, one.num_tokens + 1):
                continue
            self.side.allocated(one, (list(self.blocks[one.request_id]),), external)
            self.waiting.remove(one)
            if external:
                self.loading[one.request_id] = one
                one.num_computed_tokens = external
                continue
            self.running.append(one)
            scheduled[one] = 1
        return scheduled

    def received(self, name, missing):
        one = self.loading.pop(name)
        if one in self.finished.values():
            self.take(name)
            del self.finished[name]
            return
        good = next(
            (i for i, block in enumerate(self.blocks[name]) if block in missing), one.num_computed_tokens // PAGE
        )
        self.recomputed += one.num_computed_tokens - good * PAGE
        one.num_computed_tokens = good * PAGE
        self.loaded_tokens += good * PAGE
        self.check(one, good * PAGE)
        if not good:
            self.take(name)
            self.blocks[name] = []
        self.waiting.insert(0, one)

    def sample(self, one):
        if one.num_computed_tokens < one.num_tokens:
            return
        self.left[one.request_id] -= 1
        one.all_token_ids.append(self.random.randrange(9999))
        if not self.left[one.request_id]:
            self.check(one, one.num_computed_tokens)
            self.running.remove(one)
            self.end(one)

    def abort(self):
        everyone = [*self.waiting, *self.running, *self.loading.values()]
        one = self.random.choice(everyone) if everyone else None
        if one is None or one in self.finished.values():
            return
        for queue in (self.waiting, self.running):
            if one in queue:
                queue.remove(one)
        self.end(one)

    def end(self, one):
        hold, _ = self.side.ended(one, (list(self.blocks[one.request_id]),))
        if hold or one.request_id in self.loading:
            self.finished[one.request_id] = one
        else:
            self.take(one.request_id)

    @property
    def idle(self):
        return not (self.waiting or self.running or self.loading or self.finished)


@pytest.fixture
def engine(daemon):
    """Makes engines by seed, and closes them."""
    with ExitStack() as stack:

        def make(seed):
            made = SmallEngine(daemon.socket, seed)
            stack.callback(made.close)
            return made

        yield make


def drain(engine):
    """Step until everything has ended; then all blocks are free."""

    def drained():
        engine.step()
        return engine.idle

    until(drained, "everything ends", 60)
    assert sorted(engine.free) == list(range(1, BLOCKS))
    assert not engine.side.holds
    assert not engine.side._requests


@pytest.mark.parametrize("seed", range(3))
def test_no_page_is_ever_wrong_and_every_block_comes_back(daemon, engine, seed):
    small = engine(seed)
    with connect(daemon.socket) as store:
        for _ in range(STEPS):
            if small.random.random() < 0.3:
                small.arrive()
            if small.random.random() < 0.02:
                small.abort()
            if small.random.random() < 0.02:
                store.clear(SPEC)  # what was promised is gone
            small.step()
    drain(small)
    assert small.loaded_tokens


def test_a_daemon_that_is_killed_costs_what_was_on_its_way(daemon, engine):
    """In the midst of loads and saves; afterwards the engine uses the next one."""
    small = engine(7)
    for killed in range(2):
        for _ in range(STEPS // 2):
            if small.random.random() < 0.5:
                small.arrive()
            small.step()
        daemon.kill()
        until(lambda: not small.worker._load_link.is_up, "it is noticed")
        for _ in range(STEPS // 4):
            small.arrive()
            small.step()
        drain(small)
        daemon.start()
        assert small.worker._load_link.wait(20), killed
        assert small.worker._save_link.wait(20), killed
        small.loaded_tokens = 0
        until(lambda: small.arrive() or small.step() or small.loaded_tokens, "it loads again")
    drain(small)
