"""Slabs made ahead of their use: in order, by several threads, stopped or failed without a trace."""

from __future__ import annotations

import os
import threading

import pytest
from holdfast.kvstore.arena import Arena
from holdfast.kvstore.errors import StorageFailed
from holdfast.kvstore.prefault import Prefault

from daemon_process import until

SLAB_BYTES = 4 * 4096


class Watched(Arena):
    """Notes which slabs were made; stops at `stop_at` until it may go on."""

    def __init__(self, directory, stop_at=None):
        super().__init__(directory, SLAB_BYTES)
        self.begun = []
        self.stop_at = stop_at
        self.reached, self.go_on = threading.Event(), threading.Event()

    def make(self, slab):
        self.begun.append(slab)
        if slab == self.stop_at:
            self.reached.set()
            assert self.go_on.wait(30)
        super().make(slab)


def names(arena):
    return sorted(path.name.rpartition("-")[0] for path in arena.directory.iterdir())


def test_one_thread_makes_them_in_their_order(tmp_path):
    arena = Watched(tmp_path / "slabs")
    work = Prefault(arena, range(5), threads=1)
    assert (work.done_bytes, work.total_bytes, work.percent) == (0, 5 * SLAB_BYTES, 0)
    work.run()
    assert arena.begun == [0, 1, 2, 3, 4]
    assert (work.done_bytes, work.percent) == (work.total_bytes, 100)
    assert names(arena) == [f"slab-{number}" for number in range(5)]
    arena.close()


def test_a_slow_slab_holds_up_only_its_thread_and_progress_tells(tmp_path):
    arena = Watched(tmp_path / "slabs", stop_at=1)
    work = Prefault(arena, range(8), threads=2)
    running = threading.Thread(target=work.run)
    running.start()
    assert arena.reached.wait(30)
    until(lambda: work.done_bytes == 7 * SLAB_BYTES, "the other thread has made the others")
    assert work.percent == 87
    arena.go_on.set()
    running.join()
    assert work.percent == 100
    arena.close()


def test_stopped_it_finishes_what_it_began(tmp_path):
    arena = Watched(tmp_path / "slabs", stop_at=2)
    work = Prefault(arena, range(100), threads=1)
    running = threading.Thread(target=work.run)
    running.start()
    assert arena.reached.wait(30)
    work.stop()
    arena.go_on.set()
    running.join()
    assert names(arena) == ["slab-0", "slab-1", "slab-2"]
    assert work.percent == 3
    arena.close()
    assert not arena.directory.exists()


def test_a_failure_ends_all_threads_and_is_told(tmp_path, monkeypatch):
    allocate, count = os.posix_fallocate, iter(range(100))

    def full(descriptor, offset, size):
        if next(count) >= 3:
            raise OSError(28, "No space left on device")
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    arena = Arena(tmp_path / "slabs", SLAB_BYTES)
    work = Prefault(arena, range(1000), threads=3)
    with pytest.raises(StorageFailed, match=r"No space left.*lower ddr\.capacity_bytes"):
        work.run()
    assert work.done_bytes == 3 * SLAB_BYTES
    arena.close()
    assert not arena.directory.exists()


def test_nothing_to_make_is_done(tmp_path):
    arena = Arena(tmp_path / "slabs", SLAB_BYTES)
    work = Prefault(arena, (), threads=2)
    work.run()
    assert work.percent == 100
    arena.close()
