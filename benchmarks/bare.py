"""Bare operations: what the machine does without the store, to divide by. And the clock that times both."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from holdfast.kvstore.machine import unmount
from xxhash import xxh3_64_intdigest

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]
Piece = tuple[int, int, int, int]  # descriptor, offset in the file, offset in the buffer, bytes
SHARED: Final = Path("/dev/shm")  # where the daemon makes its slabs
ECHO: Final = """
import socket, sys
s = socket.socket(fileno=int(sys.argv[1]))
while data := s.recv(4096):
    s.sendall(data)
"""


def timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def timed_cpu(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of work that stays on this thread; the second hardly feels its neighbours."""
    started, cpu = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - started, time.thread_time() - cpu


def in_turn(first: bool, ours: Callable[[], T], bare: Callable[[], T]) -> tuple[T, T]:
    """Run both; the bare one first when `first` is False."""
    if first:
        mine = ours()
        return mine, bare()
    other = bare()
    return ours(), other


def fresh_shared(size_bytes: int) -> mmap.mmap:
    """Shared memory whose pages exist, but were never touched through this mapping."""
    with tempfile.TemporaryFile(dir=SHARED) as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
        return mmap.mmap(file.fileno(), size_bytes)


def let_go(data_dir: Path) -> None:
    """Unmount what a daemon that was killed, or whose clients still had views, left mounted."""
    while (data_dir / "arena").is_mount():
        unmount(data_dir / "arena")


def open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:  # the file system has no direct I/O, so the store uses none either
        return os.open(path, flags, 0o600)


def located(descriptors: Sequence[int], extents: Bytes, chunk_bytes: int) -> list[Piece]:
    """Where extents [count, slot bytes] lie in segment files, found by their first pages; in chunks, in their order."""
    count, slot = extents.shape
    heads = {extent[:4096].tobytes(): index for index, extent in enumerate(extents)}
    found: dict[int, tuple[int, int]] = {}
    with mmap.mmap(-1, 4096) as page:
        for descriptor in descriptors:
            for at in range(0, os.fstat(descriptor).st_size - slot + 1, slot):
                if os.preadv(descriptor, [page], at) and (index := heads.get(page[:])) is not None:
                    found[index] = (descriptor, at)
    assert len(found) == count, f"{len(found)} of {count} extents are in the segment files"
    starts = range(0, slot, chunk_bytes)
    return [
        (found[index][0], found[index][1] + start, index * slot + start, min(chunk_bytes, slot - start))
        for index in range(count)
        for start in starts
    ]


@contextmanager
def echo_peer() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-c", ECHO, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    ours.sendall(b"x")
    ours.recv(1)
    try:
        yield ours
    finally:
        ours.close()
        process.wait(10)


def read_all(pool: ThreadPoolExecutor, pieces: Sequence[Piece], into: memoryview) -> None:
    def read(piece: Piece) -> None:
        descriptor, at, start, size = piece
        assert os.preadv(descriptor, [into[start : start + size]], at) == size

    list(pool.map(read, pieces))


def read_views(pool: ThreadPoolExecutor, pieces: Sequence[Piece], views: Sequence[memoryview]) -> None:
    """Into equal views, one for each extent that the pieces are cut from."""
    slot = len(views[0])

    def read(piece: Piece) -> None:
        descriptor, at, start, size = piece
        index, offset = divmod(start, slot)
        assert os.preadv(descriptor, [views[index][offset : offset + size]], at) == size

    list(pool.map(read, pieces))


def write_views(pool: ThreadPoolExecutor, descriptor: int, views: Sequence[memoryview], chunk_bytes: int) -> None:
    """Equal views one after the other, then fdatasync."""
    slot = len(views[0])

    def write(place: tuple[int, int]) -> None:
        index, offset = place
        piece = views[index][offset : offset + chunk_bytes]
        assert os.pwritev(descriptor, [piece], index * slot + offset) == len(piece)

    list(pool.map(write, [(index, offset) for index in range(len(views)) for offset in range(0, slot, chunk_bytes)]))
    os.fdatasync(descriptor)


def write_all(pool: ThreadPoolExecutor, descriptor: int, data: memoryview, chunk_bytes: int) -> None:
    def write(start: int) -> None:
        piece = data[start : start + chunk_bytes]
        assert os.pwrite(descriptor, piece, start) == len(piece)

    list(pool.map(write, range(0, len(data), chunk_bytes)))
    os.fdatasync(descriptor)


def copy_rows(target: Bytes, source: Bytes) -> None:
    """Row by row, as slots are filled."""
    for to, row in zip(target, source, strict=True):
        np.copyto(to, row)


def hash_planes(pool: ThreadPoolExecutor, planes: Sequence[Bytes], threads: int) -> None:
    def digest(some: Sequence[Bytes]) -> None:
        for plane in some:
            xxh3_64_intdigest(plane.data)

    list(pool.map(digest, [planes[i::threads] for i in range(threads)]))
