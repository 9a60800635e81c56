"""LMCache's memory objects, and our adapter asked as LMCache's controllers ask it: submit, poll a descriptor, query."""

from __future__ import annotations

import hashlib
import select
import time

import numpy as np
import torch
from holdfast.engine_adapter.lmcache import naming
from holdfast.engine_adapter.lmcache.l2_adapter import HoldfastL2Adapter
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.config import L1ManagerConfig, L1MemoryManagerConfig
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l1_manager import L1Manager
from lmcache.v1.platform import consume_fd

from daemon_process import PATIENCE_SECONDS

LAYOUT = MemoryLayoutDesc([torch.Size((2, 2, 16, 64))], [torch.bfloat16])  # 8 KiB
SIZE_BYTES = 8192


def key(number, *, model="hub/tiny", kv_rank=0x01000100, group=0, salt=""):
    return ObjectKey(hashlib.blake2b(b"%d" % number, digest_size=32).digest(), model, kv_rank, group, salt)


def keys(*numbers, **fields):
    return [key(number, **fields) for number in numbers]


class Memory:
    """LMCache's own memory manager, as its server has it. Its objects live as long as it does."""

    def __init__(self):
        self._manager = L1Manager(L1ManagerConfig(L1MemoryManagerConfig(64 << 20, False, shm_name="")))
        self._made = 0

    def take(self, count, layout=LAYOUT):
        """Buffers as LMCache reserves them before it stores or loads, filled with zeros."""
        names = [ObjectKey(b"%d" % (self._made + number), "buffers", 0) for number in range(count)]
        self._made += count
        reserved = self._manager.reserve_write(names, [False] * count, layout, tag="test")
        found = [reserved[name][1] for name in names]
        for one in found:
            raw(one)[:] = 0
        return found

    def filled(self, wanted, layout=LAYOUT):
        """Buffers with what these keys' objects hold."""
        found = self.take(len(wanted), layout)
        for name, one in zip(wanted, found, strict=True):
            raw(one)[:] = np.frombuffer(content(name, one.get_size()), np.uint8)
        return found

    def close(self):
        self._manager.clear(force=True)
        self._manager.close()


def content(name, size_bytes=SIZE_BYTES):
    """What the object of a key holds: nobody else's bytes."""
    return hashlib.shake_128(repr(name).encode()).digest(size_bytes)


def raw(one):
    return np.frombuffer(one.byte_array, np.uint8)


def holds(name, one):
    return raw(one).tobytes() == content(name, one.get_size())


def is_untouched(one):
    return not raw(one).any()


def name_of(one, layout=LAYOUT):
    """What Holdfast calls it."""
    namespace = naming.namespace_of(naming.shard_of(one), naming.form_of(layout.shapes, layout.dtypes))
    return f"{namespace}/{naming.key_of(one).hex()}"


class Heard(L2AdapterListener):
    """What a listener of LMCache's is told."""

    def __init__(self):
        self.stored, self.accessed, self.deleted = [], [], []

    def on_l2_keys_stored(self, keys, sizes):
        self.stored += zip(keys, sizes, strict=True)

    def on_l2_keys_accessed(self, keys):
        self.accessed += keys

    def on_l2_keys_deleted(self, keys):
        self.deleted += keys


class Asked:
    """An adapter, and what it answers to whole questions."""

    def __init__(self, daemon, **params):
        params = {"socket": str(daemon.socket), "write_policy": "write-through"} | params
        self.adapter = HoldfastL2Adapter(params)
        self.adapter.set_backend_identity("plugin")
        self.heard = Heard()
        self.adapter.register_listener(self.heard)

    def connected(self):
        """When the daemon is there for it."""
        assert self.adapter._link.wait(PATIENCE_SECONDS), self.adapter.report_status()
        return self

    def _until(self, descriptor, query):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (found := query()) in (None, {}):
            assert time.monotonic() < deadline, "LMCache would wait for ever"
            select.select([descriptor], [], [], PATIENCE_SECONDS)
            consume_fd(descriptor)
        return found

    def store(self, wanted, objects):
        """Whether it is stored."""
        task = self.adapter.submit_store_task(wanted, objects)
        done = self._until(self.adapter.get_store_event_fd(), self.adapter.pop_completed_store_tasks)
        return done[task].is_successful()

    def look_up(self, wanted, layout=LAYOUT):
        """The numbers of those that were found, and are locked."""
        task = self.adapter.submit_lookup_and_lock_task(wanted, {one.object_group_id: layout for one in wanted})
        descriptor = self.adapter.get_lookup_and_lock_event_fd()
        return self._until(descriptor, lambda: self.adapter.query_lookup_and_lock_result(task)).get_indices_list()

    def load(self, wanted, objects):
        """The numbers of those that were loaded."""
        task = self.adapter.submit_load_task(wanted, objects)
        descriptor = self.adapter.get_load_event_fd()
        return self._until(descriptor, lambda: self.adapter.query_load_result(task)).get_indices_list()

    def fetch(self, wanted, objects):
        """As LMCache does: look up, load what was found, unlock. The numbers of what was loaded."""
        found = self.look_up(wanted)
        loaded = self.load([wanted[number] for number in found], [objects[number] for number in found])
        self.adapter.submit_unlock([wanted[number] for number in found])
        return [found[number] for number in loaded]
