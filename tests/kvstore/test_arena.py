"""The arena, with real processes on the other end of a real socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from holdfast.kvstore import arena as arena_module
from holdfast.kvstore.arena import Arena
from holdfast.kvstore.errors import StorageFailed
from holdfast.kvstore.slots import Slot

SLAB_BYTES = 16 * 4096

# Maps the descriptor it is sent, answers with the first bytes, writes behind them, waits, answers again.
CLIENT = """
import mmap, socket, sys
with socket.socket(socket.AF_UNIX) as peer:
    peer.connect(sys.argv[1])
    _, (descriptor,), _, _ = socket.recv_fds(peer, 1, 1)
    slab = mmap.mmap(descriptor, int(sys.argv[2]))
    peer.sendall(slab[:5])
    slab[5:10] = b"there"
    peer.sendall(b"!")
    peer.recv(1)
    peer.sendall(slab[:10])
"""


@pytest.fixture
def directory():
    """A directory on the real shared-memory file system where there is one."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as path:
        yield Path(path) / "slabs"


@pytest.fixture
def arena(directory):
    arena = Arena(directory, SLAB_BYTES)
    yield arena
    arena.close()


def open_files():
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_a_client_shares_the_slab_and_never_sees_the_next_owner(arena, tmp_path):
    slot = Slot(3, 0, SLAB_BYTES)
    arena.view(slot)[:5] = b"hello"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    arguments = [sys.executable, "-c", CLIENT, tmp_path / "socket", str(SLAB_BYTES)]
    with listener, subprocess.Popen(arguments) as client, listener.accept()[0] as peer:
        peer.settimeout(30)
        answers = peer.makefile("rb")
        descriptor = arena.descriptor(3, arena.serial(3))
        socket.send_fds(peer, [b"x"], [descriptor])
        os.close(descriptor)
        assert answers.read(6) == b"hello!"
        assert arena.view(slot)[:10] == b"hellothere"
        arena.retire(3)
        assert arena.sweep() == 0
        assert arena.view(slot)[:10] == bytes(10)
        arena.view(slot)[:10] = b"next owner"
        peer.sendall(b"x")
        assert answers.read(10) == b"hellothere"
        answers.close()
        assert client.wait(30) == 0


def test_slots_are_windows_of_one_slab(arena):
    arena.view(Slot(0, 4096, 4096))[:] = b"b" * 4096
    whole = arena.view(Slot(0, 0, SLAB_BYTES))
    assert whole[4095:4097] == b"\0b"
    assert whole[8191:8193] == b"b\0"
    assert not whole.readonly


def test_a_slot_beyond_the_slab_is_our_bug(arena):
    with pytest.raises(AssertionError):
        arena.view(Slot(0, SLAB_BYTES - 4096, 8192))


def test_retire_gives_a_new_inode_and_serial(arena):
    serial = arena.serial(0)
    kept = arena.descriptor(0, serial)  # keeps the old inode from being reused
    arena.retire(0)
    assert arena.serial(0) > serial
    assert arena.descriptor(0, serial) is None, "the next owner's bytes went to whoever asked for the last one's"
    fresh = arena.descriptor(0, arena.serial(0))
    assert not os.path.samestat(os.fstat(fresh), os.fstat(kept))
    assert os.fstat(kept).st_nlink == 0
    os.close(kept)
    os.close(fresh)


def test_serials_differ_between_slabs_and_stay_while_the_slab_does(arena):
    serials = [arena.serial(slab) for slab in (0, 1, 2, 0, 1, 2)]
    assert serials[:3] == serials[3:]
    assert len(set(serials)) == 3


def test_retire_tolerates_views_and_lets_go_when_they_do(arena):
    view = arena.view(Slot(0, 0, 4096))
    view[:3] = b"old"
    arena.retire(0)
    assert arena.sweep() == 1
    assert view[:3] == b"old"
    assert arena.view(Slot(0, 0, 4096))[:3] == bytes(3)
    view.release()
    assert arena.sweep() == 0


def test_sweep_closes_the_descriptor(arena):
    before = open_files()
    arena.make(0)
    arena.retire(0)
    arena.sweep()
    assert open_files() == before


def test_retire_of_an_untouched_slab_or_a_removed_file_is_nothing(arena, directory):
    arena.retire(7)
    arena.serial(1)
    arena.retire(1)
    arena.make(0)
    for path in directory.iterdir():
        path.unlink()
    arena.retire(0)
    assert arena.sweep() == 0


def test_files_are_private_and_allocated(arena, directory):
    arena.make(4)
    (path,) = directory.iterdir()
    assert path.name == "slab-4-1"
    assert path.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_size == SLAB_BYTES
    assert path.stat().st_blocks * 512 >= SLAB_BYTES, "a sparse slab may end in SIGBUS"


def test_a_killed_daemon_leaves_slabs_that_the_next_removes(directory):
    script = (
        "import os, sys; from pathlib import Path; from holdfast.kvstore.arena import Arena\n"
        f"Arena(Path(sys.argv[1]), {SLAB_BYTES}).make(0); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, directory], check=False).returncode == -9
    (directory / "mine").write_text("not a slab")
    assert sorted(path.name for path in directory.iterdir()) == ["mine", "slab-0-1"]
    arena = Arena(directory, SLAB_BYTES)
    assert arena.found == {0: 1}
    arena.keep(())
    assert [path.name for path in directory.iterdir()] == ["mine"]
    assert arena.serial(0) == 2
    arena.close()
    assert directory.exists(), "what is not ours stays"


def leave(directory, name, content=b"x" * SLAB_BYTES, mode=0o600):
    path = directory / name
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_left_slabs_are_kept_with_their_serial_and_bytes(directory):
    directory.mkdir()
    inodes = {name: leave(directory, name).stat().st_ino for name in ("slab-0-3", "slab-1-9", "slab-2-5")}
    leave(directory, "slab-0-2")
    leave(directory, "slab-0-1")
    before = open_files()
    arena = Arena(directory, SLAB_BYTES)
    assert arena.found == {0: 3, 1: 9, 2: 5}
    arena.keep({0, 2})
    assert sorted(path.name for path in directory.iterdir()) == ["slab-0-3", "slab-2-5"]
    assert (arena.serial(0), arena.serial(2)) == (3, 5)
    assert arena.serial(1) == 10, "a serial was used twice"
    assert arena.view(Slot(2, 4096, 4096)) == b"x" * 4096
    descriptor = arena.descriptor(0, 3)
    assert os.fstat(descriptor).st_ino == inodes["slab-0-3"]
    os.close(descriptor)
    arena.close()
    assert not directory.exists()
    assert open_files() == before


def test_what_only_looks_like_a_left_slab_is_removed_and_its_serial_not_used(directory, tmp_path):
    directory.mkdir()
    other = leave(tmp_path, "other")
    leave(directory, "slab-0-1", mode=0o640)
    leave(directory, "slab-1-2", b"x" * 4096)
    leave(directory, "slab-2-3", b"x" * SLAB_BYTES * 2)
    (directory / "slab-3-4").symlink_to(other)
    os.mkfifo(directory / "slab-4-5", 0o600)
    with leave(directory, "slab-5-600", b"").open("r+b") as sparse:
        sparse.truncate(SLAB_BYTES)
    unrelated = [leave(directory, name) for name in ("slab-1", "slab-1-x", "Slab-1-1", "slab-1-1.bak")]
    before = open_files()
    arena = Arena(directory, SLAB_BYTES)
    assert arena.found == {}
    assert sorted(directory.iterdir()) == sorted(unrelated)
    assert open_files() == before
    assert arena.serial(0) == 601
    arena.close()
    assert other.read_bytes() == b"x" * SLAB_BYTES


def test_an_arena_that_was_not_told_what_to_keep_gives_nothing_out(directory):
    directory.mkdir()
    leave(directory, "slab-0-1")
    arena = Arena(directory, SLAB_BYTES)
    with pytest.raises(AssertionError, match="keep"):
        arena.serial(0)
    arena.close()
    assert not directory.exists()


def test_naming_a_slab_makes_no_memory(arena, directory):
    serial = arena.serial(0)
    assert not list(directory.iterdir())
    arena.make(0)
    assert [path.name for path in directory.iterdir()] == [f"slab-0-{serial}"]
    inode = next(directory.iterdir()).stat().st_ino
    arena.make(0)
    assert next(directory.iterdir()).stat().st_ino == inode


class Stopped:
    """Stops whoever calls that function first, until it may go on."""

    def __init__(self, monkeypatch, module, name):
        self.reached, self.go_on = threading.Event(), threading.Event()
        function = getattr(module, name)

        def stopped(*arguments):
            monkeypatch.undo()
            self.reached.set()
            assert self.go_on.wait(30)
            return function(*arguments)

        monkeypatch.setattr(module, name, stopped)


@pytest.mark.parametrize(
    ("module", "name"), [(arena_module, "_created"), (os, "posix_fallocate")], ids=["before its file", "with its file"]
)
def test_a_slab_in_the_making_holds_up_nobody_else(arena, directory, monkeypatch, module, name):
    stopped = Stopped(monkeypatch, module, name)
    making = threading.Thread(target=arena.make, args=(3,))
    making.start()
    assert stopped.reached.wait(30)
    serial = arena.serial(3)
    arena.view(Slot(1, 0, 4096))[:1] = b"x"
    os.close(arena.descriptor(2, arena.serial(2)))
    arena.retire(2)
    assert arena.sweep() == 0
    arena.retire(3)  # before it has memory
    assert arena.serial(3) > serial
    arena.view(Slot(3, 0, 4096))[:1] = b"y"
    stopped.go_on.set()
    making.join()
    assert arena.sweep() == 0
    assert sorted(path.name for path in directory.iterdir()) == [
        f"slab-1-{arena.serial(1)}",
        f"slab-3-{arena.serial(3)}",
    ]


def test_close_removes_everything_even_while_viewed(directory):
    arena = Arena(directory, SLAB_BYTES)
    view = arena.view(Slot(0, 0, 4096))
    arena.make(1)
    arena.close()
    assert not directory.exists()
    view[:1] = b"x"  # still mapped


def test_threads_that_view_a_new_slab_at_once_get_the_same(arena):
    start = threading.Barrier(8)
    serials = []

    def use(index):
        start.wait()
        arena.view(Slot(0, index * 4096, 4096))[:] = bytes([index + 1]) * 4096
        serials.append(arena.serial(0))

    threads = [threading.Thread(target=use, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(serials) == {1}
    content = arena.view(Slot(0, 0, SLAB_BYTES))
    assert [content[index * 4096] for index in range(9)] == [*range(1, 9), 0]


def test_kept_at_the_end_they_are_found_by_the_next(directory):
    before = open_files()
    arena = Arena(directory, SLAB_BYTES)
    serials = {number: arena.serial(number) for number in range(4)}
    for number in (0, 1, 3):
        arena.make(number)
    view = arena.view(Slot(1, 0, 4096))
    view[:4] = b"kept"
    view.release()
    assert arena.close(keep={0, 1, 2}) == 2 * SLAB_BYTES, "slab 2 has no memory"
    assert open_files() == before
    following = Arena(directory, SLAB_BYTES)
    assert following.found == {number: serials[number] for number in (0, 1)}
    assert following.close(keep={1}) == SLAB_BYTES, "of those found too, as long as nobody chose"
    assert open_files() == before
    last = Arena(directory, SLAB_BYTES)
    last.keep({1})
    assert last.adopted == {1}
    assert last.view(Slot(1, 0, 4096))[:4] == b"kept"
    assert last.close() == 0
    assert not directory.exists()


def test_memory_that_cannot_be_filled_in_is_a_typed_error_and_leaves_nothing(arena, directory, monkeypatch):
    def short(mapping):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("holdfast.kvstore.arena.populate", short)
    before = open_files()
    with pytest.raises(StorageFailed, match=r"Cannot allocate memory; lower ddr\.capacity_bytes"):
        arena.make(0)
    assert not list(directory.iterdir())
    assert open_files() == before


def test_a_full_device_is_a_typed_error_and_leaves_nothing(arena, directory, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = open_files()
    with pytest.raises(StorageFailed, match=r"No space left.*ddr\.capacity_bytes"):
        arena.view(Slot(0, 0, 4096))
    assert not list(directory.iterdir())
    assert open_files() == before
    monkeypatch.undo()
    arena.view(Slot(0, 0, 4096))


def test_a_directory_that_is_a_file_or_a_link_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(StorageFailed, match=name):
            Arena(tmp_path / name, SLAB_BYTES)


def test_a_forked_child_does_not_inherit_the_mapping(arena):
    arena.view(Slot(0, 0, 4096))[:1] = b"x"
    pid = os.fork()
    if not pid:
        maps = Path("/proc/self/maps").read_text()
        os._exit(1 if "slab-0-1" in maps else 0)
    assert os.waitpid(pid, 0)[1] == 0
