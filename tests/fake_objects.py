"""A store of opaque objects in a dict, for tests of what stands above it. It can be away, slow, full, and forget."""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import contextmanager

from holdfast.engine_adapter.objects import PRESENT, STORED, PutResult, PutStatus
from holdfast.kvstore.errors import DaemonUnavailable, HoldfastError, NoCapacity


class FakeStore:
    """As much of Store as a shelf needs; `world` is shared by all connections."""

    def __init__(self, world: World) -> None:
        if not world.there:
            raise DaemonUnavailable("nobody there")
        self.world = world
        self.is_open = True
        world.stores.append(self)

    def objects(self, namespace: str) -> FakeObjects:
        return FakeObjects(self, namespace)

    def close(self) -> None:
        self.is_open = False


class World:
    """What a daemon has, and how it behaves."""

    def __init__(self) -> None:
        self.there = True
        self.spaces: dict[str, dict[bytes, bytes]] = defaultdict(dict)
        self.pins: list[tuple] = []
        self.touched: list[bytes] = []
        self.behind: list[bytes | None] = []  # of each put
        self.stores: list[FakeStore] = []
        self.room = 1 << 30
        self.error: HoldfastError | None = None  # raised by every call
        self.gate = threading.Event()  # every call waits for it
        self.gate.set()
        self.calls: list[tuple[str, int]] = []

    def go_away(self) -> None:
        self.there = False
        for store in self.stores:
            store.is_open = False

    def of(self, prefix: str) -> dict[bytes, bytes]:
        """The one namespace with this prefix."""
        (found,) = [space for name, space in self.spaces.items() if name.startswith(prefix)]
        return found


class FakeObjects:
    def __init__(self, store: FakeStore, namespace: str) -> None:
        self.store = store
        self.world = store.world
        self.namespace = namespace

    def _space(self, call: str, count: int) -> dict[bytes, bytes]:
        assert self.world.gate.wait(20.0)
        self.world.calls.append((call, count))
        if not self.store.is_open:
            raise DaemonUnavailable("it went away")
        if self.world.error is not None:
            raise self.world.error
        return self.world.spaces[self.namespace]

    def find(self, keys, *, deadline_seconds=30.0):
        space = self._space("find", len(keys))
        return ["ddr" if key in space else None for key in keys]

    @contextmanager
    def get(self, keys, *, deadline_seconds=30.0):
        space = self._space("get", len(keys))
        yield [memoryview(space[key]).toreadonly() if key in space else None for key in keys]

    def load_into(self, keys, buffers, *, deadline_seconds=30.0):
        space = self._space("load", len(keys))
        done = []
        for key, buffer in zip(keys, buffers, strict=True):
            content = space.get(key)
            fits = content is not None and len(content) == buffer.nbytes
            if fits:
                buffer[:] = content
            done.append(fits)
        return done

    def put(self, items, *, write_policy="auto", deadline_seconds=10.0, tokens_each=0, behind=None):
        space = self._space("put", len(items))
        self.world.behind.append(behind)
        results = []
        for key, content in items:
            if key in space:
                results.append(PRESENT)
            elif len(space) >= self.world.room:
                results.append(PutResult(PutStatus.REFUSED, NoCapacity("full")))
            else:
                space[key] = bytes(content)
                results.append(STORED)
        return results

    def touch(self, keys):
        self._space("touch", len(keys))
        self.world.touched += keys

    def delete(self, keys):
        space = self._space("delete", len(keys))
        return [space.pop(key, None) is not None for key in keys]

    def pin(self, keys=None, *, key_prefix=None, ttl_seconds=None, owner="", reason=""):
        space = self._space("pin", len(keys))
        self.world.pins.append((list(keys), ttl_seconds, owner, reason))
        return sum(key in space for key in keys)

    def clear(self):
        space = self._space("clear", 0)
        count = len(space)
        space.clear()
        return count
