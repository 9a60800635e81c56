"""LMCache's L2 adapter over Holdfast's opaque objects, for `lmcache server`.

    --l2-adapter '{"type": "plugin", "module_path": "holdfast.engine_adapter.lmcache.l2_adapter",
                   "class_name": "HoldfastL2Adapter", "adapter_params": {"data_dir": "/var/lib/holdfast"}}'

Without a daemon, or with a slow or full one, stores fail, lookups miss, and loads say what they could not load; LMCache
goes on from its own memory. Holdfast evicts by itself: leave LMCache's "eviction" of this adapter out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from ...kvstore.errors import HoldfastError
from ..link import link_to
from ..objects import Objects, PutStatus
from .inventory import Inventory
from .locks import Locks
from .naming import Shard, form_of, is_packed, key_of, namespace_of, shard_of
from .settings import Settings
from .tasks import Tasks

K = TypeVar("K")
V = TypeVar("V")
log = logging.getLogger(__name__)

BEFORE_MAX: Final = 65_536
FAR_MAX: Final = 65_536
FORMS_MAX: Final = 4096
Members = list[tuple[int, ObjectKey]]  # with their numbers in the task


class HoldfastL2Adapter(L2AdapterInterface):
    """Methods may be called from any thread; none waits for the daemon but `delete` and `list_l2_keys`.

    Raises ConfigError for parameters that it does not know. A daemon need not be there yet.
    """

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: object = None) -> None:
        super().__init__()  # no capacity of LMCache's: Holdfast evicts
        self._settings = settings = Settings.of(params)
        self._link = link_to(settings.socket, settings.data_dir, settings.tenant)
        self._stores = ThreadPoolExecutor(settings.threads, "holdfast-store")
        self._reads = ThreadPoolExecutor(settings.threads, "holdfast-read")
        self._leaves = ThreadPoolExecutor(1, "holdfast-leave")  # what makes room is not queued behind what waits for it
        self._storing: Tasks[L2StoreResult] = Tasks(self._stores, create_event_notifier(), self._failed)
        self._looking: Tasks[Bitmap] = Tasks(self._reads, create_event_notifier(), self._failed)
        self._loading: Tasks[Bitmap] = Tasks(self._reads, create_event_notifier(), self._failed)
        self._locks = Locks(self._give_back, settings.lock_seconds)
        self._inventory = Inventory()
        self._lock = threading.Lock()
        self._passing = threading.Lock()  # what is below DDR passes through it for one task at a time
        self._counts: Counter[str] = Counter()
        self._last_error: str | None = None
        self._forms: OrderedDict[Shard, str] = OrderedDict()  # as lookups say them
        self._before: OrderedDict[ObjectKey, ObjectKey] = OrderedDict()  # what each follows in a prompt
        self._sizes: OrderedDict[Shard, int] = OrderedDict()  # of an object, as last stored
        self._far: OrderedDict[ObjectKey, str] = OrderedDict()  # found below DDR, and not loaded yet: its namespace

    def get_store_event_fd(self) -> int:
        return self._storing.descriptor

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._looking.descriptor

    def get_load_event_fd(self) -> int:
        return self._loading.descriptor

    # Store -------------------------------------------------------------------------------------

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        return self._storing.submit(partial(self._store, list(keys), list(objects)), L2StoreResult(False, 0))  # noqa: FBT003

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        return self._storing.pop_all()

    def _store(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> L2StoreResult:
        spaces = self._spaces(keys, [self._form(key, one) for key, one in zip(keys, objects, strict=True)])
        stored: dict[int, int] = {}
        refused = 0
        with self._link.use() as store:
            for namespace, members, before in self._in_chains(spaces):
                items = [(key_of(key), _bytes_of(objects[number])) for number, key in members]
                results = store.objects(namespace).put(
                    items,
                    write_policy=self._settings.write_policy,
                    deadline_seconds=self._settings.store_seconds,
                    tokens_each=self._settings.chunk_tokens,
                    behind=before and key_of(before),
                )
                for (number, _), (_, content), result in zip(members, items, results, strict=True):
                    if result.error is not None:
                        refused += 1
                        self._failed(result.error)
                    elif result.status is PutStatus.STORED:
                        stored[number] = content.nbytes
        self._count(stored=len(stored), present=len(keys) - len(stored) - refused, refused=refused)
        if stored:
            with self._lock:
                for number, size_bytes in stored.items():
                    _keep(self._sizes, shard_of(keys[number]), size_bytes, FORMS_MAX)
            self._notify_keys_stored([keys[number] for number in stored], list(stored.values()))
        return L2StoreResult(not refused, sum(stored.values()))

    def _in_chains(self, spaces: Mapping[str, Members]) -> Iterator[tuple[str, Members, ObjectKey | None]]:
        """Members that follow each other, and what they follow: LMCache stores a prompt bit by bit."""
        for namespace, members in spaces.items():
            with self._lock:
                before = [self._before.get(key) for _, key in members]
            breaks = [
                number
                for number in range(1, len(members))
                if before[number] is not None and before[number] != members[number - 1][1]
            ]
            for start, stop in pairwise([0, *breaks, len(members)]):
                yield namespace, members[start:stop], before[start]

    # Lookup and lock ---------------------------------------------------------------------------

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        found = Bitmap(len(keys))
        return self._looking.submit(partial(self._look_up, list(keys), dict(group_layout_descs), found), found)

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._looking.pop(task_id)

    def _look_up(self, keys: Sequence[ObjectKey], layouts: Mapping[int, MemoryLayoutDesc], found: Bitmap) -> Bitmap:
        forms = {group: form_of(layout.shapes, layout.dtypes) for group, layout in layouts.items()}
        with self._lock:
            for key in keys:
                if key.object_group_id in forms:
                    _keep(self._forms, shard_of(key), forms[key.object_group_id], FORMS_MAX)
            for before, key in pairwise(keys):  # chunks of a prompt, one shard after the other
                if shard_of(before) == shard_of(key):
                    _keep(self._before, key, before, BEFORE_MAX)
        self._count(looked_up=len(keys))
        with self._link.use() as store:
            for namespace, members in self._spaces(keys, [forms.get(key.object_group_id) for key in keys]).items():
                wanted = [key_of(key) for _, key in members]
                tiers = store.objects(namespace).find(wanted, deadline_seconds=self._settings.find_seconds)
                near = [member for member, tier in zip(members, tiers, strict=True) if tier == "ddr"]
                far = [member for member, tier in zip(members, tiers, strict=True) if tier not in ("ddr", None)]
                for number, _ in [*self._locked(namespace, near), *far]:
                    found.set(number)
                with self._lock:
                    for _, key in far:
                        _keep(self._far, key, namespace, FAR_MAX)
        self._count(found=found.popcount())
        return found

    def _locked(self, namespace: str, near: Members) -> Members:
        """Lease what lies in DDR; returns what is still there."""
        if not near:
            return []
        try:
            with ExitStack() as leases:
                objects = leases.enter_context(self._link.use()).objects(namespace)
                wanted = [key_of(key) for _, key in near]
                views = leases.enter_context(objects.get(wanted, deadline_seconds=self._settings.find_seconds))
                kept = leases.pop_all()
        except HoldfastError as error:
            self._failed(error)
            return near  # they may still be there when they are to be loaded
        here = {key: view for (_, key), view in zip(near, views, strict=True) if view is not None}
        self._locks.hold(kept, here)
        return [(number, key) for number, key in near if key in here]

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        self._locks.unlock(keys)
        unread: defaultdict[str, list[bytes]] = defaultdict(list)
        with self._lock:
            for key in keys:
                if (namespace := self._far.pop(key, None)) is not None:
                    unread[namespace].append(key_of(key))
        if unread:
            self._soon(partial(self._touch, unread))

    def _touch(self, unread: Mapping[str, Sequence[bytes]]) -> None:
        """LMCache had its own copies of these: they are in use all the same."""
        try:
            with self._link.use() as store:
                for namespace, keys in unread.items():
                    store.objects(namespace).touch(keys)
        except HoldfastError as error:
            self._failed(error)

    # Load --------------------------------------------------------------------------------------

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        loaded = Bitmap(len(keys))
        return self._loading.submit(partial(self._load, list(keys), list(objects), loaded), loaded)

    def query_load_result(self, task_id: int) -> Bitmap | None:
        return self._loading.pop(task_id)

    def _load(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj], loaded: Bitmap) -> Bitmap:
        buffers = [_bytes_of(one) for one in objects]
        rest = []
        for number, key in enumerate(keys):
            with self._locks.reading(key) as view:
                if view is None:
                    rest.append(number)
                elif view.nbytes == buffers[number].nbytes:
                    np.copyto(buffers[number], np.frombuffer(view, np.uint8))
                    loaded.set(number)
        try:
            if rest:
                self._wait_for_room()
                self._load_rest(keys, objects, buffers, rest, loaded)
        finally:
            here = [keys[number] for number in loaded.get_indices_list()]
            self._count(loaded=len(here), lost=len(keys) - len(here))
            if here:
                self._notify_keys_accessed(here)
        return loaded

    def _wait_for_room(self) -> None:
        """What lay in DDR has been read: its leases end before the rest asks for room there."""
        with suppress(TimeoutError):
            self._leaves.submit(lambda: None).result(self._settings.find_seconds)

    def _load_rest(
        self,
        keys: Sequence[ObjectKey],
        objects: Sequence[MemoryObj],
        buffers: Sequence[npt.NDArray[np.uint8]],
        rest: Sequence[int],
        loaded: Bitmap,
    ) -> None:
        """Those that were not locked in DDR, one task at a time: each may need all the room that there is."""
        with self._lock:
            for number in rest:
                self._far.pop(keys[number], None)
        spaces = self._spaces(
            [keys[number] for number in rest], [self._form(keys[number], objects[number]) for number in rest]
        )
        with self._passing, self._link.use() as store:
            for namespace, members in spaces.items():
                wanted = {rest[member]: key_of(key) for member, key in members}
                for number in self._loaded(store.objects(namespace), wanted, buffers):
                    loaded.set(number)

    def _loaded(
        self, there: Objects, wanted: Mapping[int, bytes], buffers: Sequence[npt.NDArray[np.uint8]]
    ) -> Iterator[int]:
        """Load these keys into the buffers of their numbers; which were. Rather than go without, no lock is kept."""
        until = time.monotonic() + self._settings.load_seconds
        for is_last in (False, True):
            outcomes = there.load_into(
                list(wanted.values()),
                [buffers[number] for number in wanted],
                deadline_seconds=max(0.0, until - time.monotonic()),
            )
            yield from (number for number, outcome in zip(wanted, outcomes, strict=True) if outcome)
            wanted = {number: key for (number, key), it_was in zip(wanted.items(), outcomes, strict=True) if not it_was}
            if is_last or not wanted or not self._locks.count:
                return
            tiers = there.find(list(wanted.values()), deadline_seconds=self._settings.find_seconds)
            wanted = {number: key for (number, key), tier in zip(wanted.items(), tiers, strict=True) if tier}
            if not wanted:
                return  # they have gone
            self._locks.give_up()
            self._wait_for_room()

    # Names -------------------------------------------------------------------------------------

    def _form(self, key: ObjectKey, one: MemoryObj) -> str:
        """What an object is. Packed bytes are of what lookups ask for."""
        form = form_of(one.get_shapes(), one.get_dtypes())
        if is_packed(form):
            with self._lock:
                return self._forms.get(shard_of(key), form)
        return form

    def _spaces(self, keys: Sequence[ObjectKey], forms: Iterable[str | None]) -> dict[str, Members]:
        """Keys by namespace, in their order; those of no known form are left out."""
        spaces: defaultdict[str, Members] = defaultdict(list)
        for number, (key, form) in enumerate(zip(keys, forms, strict=True)):
            if form is not None:
                spaces[namespace_of(shard_of(key), form, self._settings.qualifier)].append((number, key))
        self._inventory.saw(spaces)
        return spaces

    # What is there -----------------------------------------------------------------------------

    def delete(self, keys: list[ObjectKey]) -> None:
        """Forget these; what is locked, pinned or being stored stays. Without a daemon nothing happens."""
        try:
            with self._link.use() as store:
                gone = self._inventory.delete(store, keys)
        except HoldfastError as error:  # LMCache's thread that evicts would end with it
            self._failed(error)
            return
        if gone:
            with self._lock:
                sizes = [self._sizes.get(shard_of(key), 0) for key in gone]
            self._notify_keys_deleted(gone, sizes)

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """Raises ValueError for a cursor that is none, and HoldfastError."""
        with self._link.use() as store:
            return self._inventory.page(store, model_name, page_size, cursor)

    def get_usage(self) -> AdapterUsage:
        """Bytes that LMCache's objects have in Holdfast, as counted some seconds ago.

        By salt: what this server stored and did not delete, whatever Holdfast has evicted since.
        """
        if self._inventory.take_turn():
            self._soon(self._count_objects)
        return replace(super().get_usage(), total_bytes_used=self._inventory.total_bytes or 0)

    def _count_objects(self) -> None:
        try:
            with self._link.use() as store:
                self._inventory.count(store)
        except HoldfastError as error:
            self._failed(error)

    def report_status(self) -> dict[str, Any]:
        with self._lock:
            counts, last_error = dict(self._counts), self._last_error
        return {
            "is_healthy": True,  # without a daemon it misses, as it is meant to
            "type": "HoldfastL2Adapter",
            "connected": self._link.is_up,
            "tenant": self._settings.tenant,
            "locked_keys": self._locks.count,
            "tasks_waiting": self._storing.waiting + self._looking.waiting + self._loading.waiting,
            "objects": counts,
            "last_error": last_error,
        }

    def _count(self, **events: int) -> None:
        with self._lock:
            self._counts.update(events)

    def _failed(self, error: HoldfastError | Exception) -> None:
        """Said once for each kind of error in a row; all are counted."""
        kind = error.code if isinstance(error, HoldfastError) else type(error).__name__
        with self._lock:
            self._counts["errors"] += 1
            known, self._last_error = self._last_error, f"{kind}: {error}"
        if known is not None and known.partition(":")[0] == kind:
            return
        if isinstance(error, HoldfastError):
            log.warning("Holdfast could not serve LMCache (%s): %s", kind, error.message)
        else:
            log.error("a task of Holdfast's L2 adapter failed", exc_info=error)

    # End ---------------------------------------------------------------------------------------

    def _soon(self, work: Callable[[], None]) -> None:
        """Do what nobody waits for, and what may wait for the daemon."""
        _submitted(self._reads, work)

    def _give_back(self, work: Callable[[], None]) -> None:
        """End leases, in this order."""
        _submitted(self._leaves, work)

    def close(self) -> None:
        """Tasks that have not begun fail; what copies to and from LMCache's memory ends first."""
        for tasks in (self._storing, self._looking, self._loading):
            tasks.stop()
        self._locks.close()
        for pool in (self._stores, self._reads, self._leaves):
            pool.shutdown()
        self._link.close()
        for tasks in (self._storing, self._looking, self._loading):
            tasks.close()


def _submitted(pool: ThreadPoolExecutor, work: Callable[[], None]) -> None:
    try:
        pool.submit(work)
    except RuntimeError:  # the pool has ended, and so does the adapter
        work()


def _bytes_of(one: MemoryObj) -> npt.NDArray[np.uint8]:
    """An object's bytes where they lie."""
    return np.frombuffer(one.byte_array, np.uint8)


def _keep(kept: OrderedDict[K, V], key: K, value: V, limit: int) -> None:
    """Put it behind all others, and drop the first of too many."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > limit:
        kept.popitem(last=False)
