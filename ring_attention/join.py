"""Join: a rank's way into its group, by the communicator that suits device and hosts."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
from torch.distributed.rendezvous import rendezvous

from ..kvstore.errors import ConfigError, GroupFailed
from .communicator import Communicator
from .distributed import DistributedCommunicator
from .local import local_group
from .shm import ShmCommunicator

KINDS: Final = ("auto", "gloo", "nccl", "shm")
_FILE: Final = "file://"


def join(
    kind: str, rank: int, size: int, init_method: str, device: torch.device, deadline_s: float = 60.0
) -> Communicator:
    """Join the group; blocks until all ranks have.

    `kind` is one of KINDS, the same on all ranks; "auto" takes nccl on GPUs, shared memory for CPU ranks of one host
    (several times faster than gloo: benchmarks/LOG.md), else gloo, and nothing at all for a group of one.
    `init_method` is torch's: file:///path (a new path for every group; all ranks on this host), tcp://h:p or env://.
    Raises ConfigError, and GroupFailed when the others do not come before the deadline.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown communicator {kind!r}; use one of {', '.join(KINDS)}")
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} of a group of {size}: ranks count from 0 to size - 1")
    on_gpu = device.type == "cuda"
    if kind != "auto" and on_gpu != (kind == "nccl"):
        raise ConfigError(f"communicator {kind} cannot exchange tensors of device {device.type}; use auto")
    if kind == "auto" and size == 1:
        return local_group(1, deadline_s)[0]
    if on_gpu or kind == "gloo":
        return DistributedCommunicator(rank, size, init_method, device, deadline_s)
    if init_method.startswith(_FILE):
        return ShmCommunicator(rank, size, Path(init_method.removeprefix(_FILE)), deadline_s)
    return _by_hosts(kind, rank, size, init_method, deadline_s)


def _by_hosts(kind: str, rank: int, size: int, init_method: str, deadline_s: float) -> Communicator:
    """CPU ranks that meet at a store: shared memory if all are on one host."""
    try:
        store, _, _ = next(rendezvous(init_method, rank, size, timeout=timedelta(seconds=deadline_s)))
        # A store may outlive a group, and serve the next one: torchrun's does.
        attempt = f"holdfast/{store.add(f'holdfast/joins/{rank}', 1)}"
        store.set(f"{attempt}/host/{rank}", _host())
        hosts = {store.get(f"{attempt}/host/{peer}") for peer in range(size)}
        if len(hosts) == 1:
            if rank == 0:
                store.set(f"{attempt}/rendezvous", tempfile.mkdtemp(prefix="holdfast-group-"))
            directory = Path(store.get(f"{attempt}/rendezvous").decode())
            return ShmCommunicator(rank, size, directory, deadline_s)
    except (RuntimeError, ValueError) as error:
        raise GroupFailed(f"rank {rank}: joining at {init_method}: {error}") from error
    if kind == "shm":
        raise ConfigError(f"communicator shm needs all ranks on one host, and these are on {len(hosts)}; use gloo")
    return DistributedCommunicator(rank, size, init_method, torch.device("cpu"), deadline_s)


def _host() -> str:
    """Equal for processes that can meet in a directory of this user: the boot, the mount namespace, the user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    mounts = Path("/proc/self/ns/mnt").stat().st_ino
    return f"{boot} {mounts} {os.getuid()}"
