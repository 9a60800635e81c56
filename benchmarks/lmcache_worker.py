"""LMCache's storage managers behind a pipe: commands as JSON lines on stdin, answers on stdout.

Runs in LMCache's own environment (`make engines`) and imports nothing of Holdfast. A store is: allocate,
copy in from an engine's buffer, put, wait until the tier has every object, and (disk) fsync of what it wrote. A load
is: get, copy out into an engine's buffer. Objects are 256 tokens of all layers, as LMCache cuts them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final, Protocol

os.environ |= {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "ERROR", "LMCACHE_DISABLE_BANNER": "1"}

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2AdapterConfig
from lmcache.v1.distributed.storage_manager import StorageManager as SharedManager
from lmcache.v1.event_manager import EventManager
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.storage_manager import StorageManager as LocalManager

LAYERS: Final = 32
HEADS: Final = 8
HEAD_DIM: Final = 128
CHUNK_TOKENS: Final = 256
BATCH: Final = 8  # objects a call
WAIT_SECONDS: Final = 120.0
POLL_SECONDS: Final = 0.001
SHAPE: Final = torch.Size([2, LAYERS, CHUNK_TOKENS, HEADS * HEAD_DIM])
DTYPE: Final = torch.bfloat16


class Manager(Protocol):
    """One way of LMCache to keep objects. `number` names a generation of them."""

    def store(self, number: int, source: list[torch.Tensor]) -> None: ...

    def load(self, number: int, target: list[torch.Tensor]) -> None: ...

    def drop(self, number: int) -> None: ...


class Local:
    """The in-process manager: RAM, or disk only (`directory`)."""

    def __init__(self, gib: float, directory: Path | None, rounds: int, options: dict[str, Any]) -> None:
        settings: dict[str, Any] = {
            "chunk_size": CHUNK_TOKENS,
            "local_cpu": directory is None,
            "max_local_cpu_size": gib * 1.25 + 0.25,
        }
        if directory is not None:
            # Room for every round: remove() of 0.5.6 does not give its size back, and a full tier drops what is put.
            disk = {"local_disk": str(directory), "max_local_disk_size": gib * 2 * (rounds + 2) + 1}
            settings |= disk | {"extra_config": options}
        config = LMCacheEngineConfig.from_defaults(**settings)
        metadata = LMCacheMetadata(
            model_name="model",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=DTYPE,
            kv_shape=(LAYERS, 2, CHUNK_TOKENS, HEADS, HEAD_DIM),
            role="worker",
        )
        self.manager = LocalManager(config, metadata, EventManager())
        self.tier = "LocalCPUBackend" if directory is None else "LocalDiskBackend"
        self.backend = self.manager.storage_backends[self.tier]
        self.objects = 0

    def keys(self, number: int) -> list[CacheEngineKey]:
        return [CacheEngineKey("model", 1, 0, (number << 32) + i + 1, DTYPE) for i in range(self.objects)]

    def store(self, number: int, source: list[torch.Tensor]) -> None:
        self.objects = len(source)
        keys = self.keys(number)
        for key, tensor in zip(keys, source, strict=True):
            memory = self.manager.allocate(SHAPE, DTYPE, fmt=MemoryFormat.KV_2LTD)
            memory.tensor.copy_(tensor)
            self.manager.batched_put([key], [memory])
        until(lambda: all(self.backend.contains(key) for key in keys))

    def load(self, number: int, target: list[torch.Tensor]) -> None:
        keys = self.keys(number)
        for start in range(0, len(keys), BATCH):
            found = self.manager.batched_get(keys[start : start + BATCH], location=self.tier)
            for memory, tensor in zip(found, target[start : start + BATCH], strict=True):
                tensor.copy_(memory.tensor)
                memory.ref_count_down()

    def drop(self, number: int) -> None:
        for key in self.keys(number):
            self.backend.remove(key)


class Shared:
    """The manager of `lmcache server`: RAM, or RAM in front of files (`directory`), from which a load prefetches."""

    def __init__(self, gib: float, directory: Path | None, rounds: int, options: dict[str, Any]) -> None:
        self.directory = directory
        behind = []
        if directory is not None:
            behind = [FSL2AdapterConfig.from_dict({"type": "fs", "base_path": str(directory)} | options)]
        size = int((gib * 1.3 + 0.25) * 2**30)
        self.manager = SharedManager(
            StorageManagerConfig(
                l1_manager_config=L1ManagerConfig(L1MemoryManagerConfig(size, False, shm_name="")),
                eviction_config=EvictionConfig("LRU", trigger_watermark=0.98),
                l2_adapter_config=L2AdaptersConfig(behind),
            )
        )
        self.layout = MemoryLayoutDesc([SHAPE], [DTYPE])
        self.objects = 0

    def keys(self, number: int) -> list[ObjectKey]:
        names = (f"{number}/{i}".encode() for i in range(self.objects))
        return [ObjectKey(hashlib.blake2b(name, digest_size=32).digest(), "model", 0) for name in names]

    def store(self, number: int, source: list[torch.Tensor]) -> None:
        self.objects = len(source)
        keys = self.keys(number)
        before = self.files()
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            found = self.manager.reserve_write(some, self.layout)
            assert len(found) == len(some), "RAM tier is full"
            for key, tensor in zip(some, source[start : start + BATCH], strict=True):
                found[key].tensor.view(SHAPE).copy_(tensor)
            self.manager.finish_write(some)
        if self.directory is not None:
            until(lambda: self.files() - before >= len(keys))

    def load(self, number: int, target: list[torch.Tensor]) -> None:
        keys = self.keys(number)
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            handle = self.manager.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(some, 0, self.layout)]))
            assert self.manager.wait_prefetch_status(handle, WAIT_SECONDS), "prefetch timed out"
            result = self.manager.query_prefetch_status(handle)
            assert result.hit_cells[0].popcount() == len(some), result
            with self.manager.read_prefetched_results(some) as found:
                for memory, tensor in zip(found, target[start : start + BATCH], strict=True):
                    tensor.copy_(memory.tensor.view(SHAPE))
            self.manager.finish_read_prefetched(some)

    def forget_ram(self, number: int) -> None:
        """What a cold load must not find there."""
        self.manager.delete_l1_keys(self.keys(number))

    def drop(self, number: int) -> None:
        self.forget_ram(number)
        if self.directory is not None:
            for path in self.directory.rglob("*"):
                if path.is_file():
                    path.unlink()

    def files(self) -> int:
        """Whole objects: they are renamed to this name once written."""
        return len(list(self.directory.rglob("*.data"))) if self.directory is not None else 0


def until(is_done: Any) -> None:
    limit = time.monotonic() + WAIT_SECONDS
    while not is_done():
        assert time.monotonic() < limit, "the tier did not report all objects stored"
        time.sleep(POLL_SECONDS)


def each_file(directory: Path, advice: int | None) -> None:
    """Sync every file and its directory; with `advice`, also tell the page cache."""
    for path in [directory, *directory.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if advice is not None and path.is_file():
            os.posix_fadvise(descriptor, 0, 0, advice)
        os.close(descriptor)


MANAGERS: Final = {
    "local_ram": (Local, False, {}),
    "shared_ram": (Shared, False, {}),
    "local_disk": (Local, True, {"use_odirect": False}),
    "local_disk_direct": (Local, True, {"use_odirect": True}),
    "shared_files": (Shared, True, {"use_odirect": False}),
}


class Worker:
    """Engine buffers, and the managers by name."""

    def __init__(self, directory: str, objects: int, rounds: int, managers: list[str]) -> None:
        gib = objects * SHAPE.numel() * DTYPE.itemsize / 2**30
        self.source = [torch.zeros(SHAPE, dtype=DTYPE) for _ in range(objects)]
        self.target = [torch.zeros(SHAPE, dtype=DTYPE) for _ in range(objects)]
        self.directories: dict[str, Path] = {}
        self.managers: dict[str, Manager] = {}
        self.threads = torch.get_num_threads()
        for name in managers:
            kind, on_disk, options = MANAGERS[name]
            if on_disk:
                self.directories[name] = Path(directory, name)
                self.directories[name].mkdir(parents=True)
            self.managers[name] = kind(gib, self.directories.get(name), rounds, options)

    def fill(self, number: int) -> dict[str, Any]:
        """Other bytes."""
        maker = torch.Generator().manual_seed(number)
        for tensor in self.source:
            tensor.view(torch.int16).random_(-(2**15), 2**15, generator=maker)
        return {}

    def store(self, name: str, number: int) -> dict[str, Any]:
        started = time.perf_counter()
        self.managers[name].store(number, self.source)
        stored = time.perf_counter()
        if name in self.directories:
            each_file(self.directories[name], None)
        return {"seconds": time.perf_counter() - started, "unsynced_seconds": stored - started}

    def load(self, name: str, number: int, threads: int) -> dict[str, Any]:
        """Cold where there is a disk: synced, page cache and RAM tier told to forget. Bytes are compared afterwards."""
        for tensor in self.target:
            tensor.zero_()
        manager = self.managers[name]
        if name in self.directories:
            if isinstance(manager, Shared):
                manager.forget_ram(number)
            each_file(self.directories[name], os.POSIX_FADV_DONTNEED)
        torch.set_num_threads(threads)
        started = time.perf_counter()
        manager.load(number, self.target)
        seconds = time.perf_counter() - started
        torch.set_num_threads(self.threads)
        pairs = zip(self.source, self.target, strict=True)
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs), f"{name}: other bytes"
        return {"seconds": seconds}

    def drop(self, name: str, number: int) -> dict[str, Any]:
        self.managers[name].drop(number)
        return {}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed is no answer
    worker = None
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if worker is None:
            assert do == "start", do
            worker = Worker(**command)
            answer = {"torch": torch.__version__, "threads": worker.threads}
        else:
            answer = getattr(worker, do)(**command)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # its threads do not end


if __name__ == "__main__":
    main()
