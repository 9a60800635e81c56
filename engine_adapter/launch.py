"""Launch: how the rank processes of a group come to be: started here, or by somebody else who sends them to a socket.

Either way a rank gets its configuration over its channel, and the driver can end it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

from ..kvstore.errors import GroupFailed, InvalidRequest
from .control import Channel, Joining

PEER: Final = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED
SAY_SECONDS: Final = 10.0  # for a rank that has connected to say which one it is
RETRY_SECONDS: Final = 0.05


class Member(Protocol):
    """A rank process, as its driver sees it."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    @property
    def channel(self) -> Channel:
        """The way to it."""
        ...

    def kill(self) -> None:
        """End it at once; one that has ended stays so."""
        ...

    def wait(self, seconds: float) -> str | None:
        """How it ended, in words; None when it still runs after that time."""
        ...


class Launcher(Protocol):
    """Gets the processes of a group."""

    def launch(self, size: int) -> list[Member]:
        """Ranks 0, 1, ... of a group of that size, each waiting for its Start.

        Raises GroupFailed when they do not come, and leaves none behind.
        """
        ...


class _Spawned:
    """A child of ours."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self._process = process
        self.pid = process.pid
        self.channel = channel

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float) -> str | None:
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return f"signal {-code}" if code < 0 else f"exit status {code}"


class SpawnLauncher:
    """Starts the ranks as children on this machine."""

    def launch(self, size: int) -> list[Member]:
        """See Launcher."""
        return [self._start() for _ in range(size)]

    def _start(self) -> _Spawned:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "holdfast.engine_adapter.rank", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        return _Spawned(process, Channel(ours))


class _Joined:
    """A process that somebody else started. A pidfd names it, so that no other process is killed for it."""

    def __init__(self, sock: socket.socket) -> None:
        self.pid, _, _ = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        self.channel = Channel(sock)
        try:
            self._process = os.pidfd_open(self.pid)
        except OSError as error:
            self.channel.close()
            raise GroupFailed(f"process {self.pid} joined the group and is gone: {error.strerror}") from error

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._process)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def wait(self, seconds: float) -> str | None:
        ended, _, _ = select.select([self._process], [], [], seconds)
        return "its process ended" if ended else None


class JoinLauncher:
    """Listens at `path` for ranks that somebody else starts, as torchrun does: each calls `rank.join(path, rank)`."""

    def __init__(self, path: Path, deadline_seconds: float) -> None:
        """Nobody listens yet; `launch` waits that long for all ranks."""
        self._path = path
        self._deadline_seconds = deadline_seconds

    def launch(self, size: int) -> list[Member]:
        """See Launcher. Ranks may come in any order, and before we listen."""
        deadline = time.monotonic() + self._deadline_seconds
        members: dict[int, _Joined] = {}
        try:
            with _listening(self._path) as listener:
                while len(members) < size:
                    listener.settimeout(max(0.01, deadline - time.monotonic()))
                    try:
                        sock, _ = listener.accept()
                    except TimeoutError:
                        missing = sorted(set(range(size)) - members.keys())
                        raise GroupFailed(
                            f"rank(s) {missing} did not join at {self._path} within {self._deadline_seconds:g} s"
                        ) from None
                    sock.settimeout(None)
                    member = _Joined(sock)
                    members[_said(member, size, members)] = member
        except GroupFailed:
            for member in members.values():
                member.channel.close()  # a rank whose driver is gone ends
            raise
        return [members[rank] for rank in range(size)]


def _said(member: _Joined, size: int, known: dict[int, _Joined]) -> int:
    """Which rank it says it is. Raises GroupFailed."""
    ready, _, _ = select.select([member.channel], [], [], SAY_SECONDS)
    reports = member.channel.receive_reports() if ready else None
    match reports:
        case [Joining(rank)] if 0 <= rank < size and rank not in known:
            return rank
        case [Joining(rank)]:
            reason = f"rank {rank} of {size} joined, or did so twice"
        case _:
            reason = f"process {member.pid} joined the group and did not say which rank it is"
    member.channel.close()
    raise GroupFailed(reason)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A socket there that only this user may connect to. Raises GroupFailed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        old = os.umask(0o177)
        try:
            path.unlink(missing_ok=True)
            listener.bind(str(path))
        except OSError as error:
            raise GroupFailed(f"cannot listen for ranks at {path}: {error.strerror or error}") from error
        finally:
            os.umask(old)
        listener.listen(128)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def joined(path: Path, rank: int, deadline_seconds: float) -> Channel:
    """A rank's way to the driver that listens, or will, at `path`. Raises GroupFailed after the deadline."""
    if rank < 0:
        raise InvalidRequest(f"there is no rank {rank}")
    deadline = time.monotonic() + deadline_seconds
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            if time.monotonic() >= deadline:
                raise GroupFailed(
                    f"no driver at {path} within {deadline_seconds:g} s: {error.strerror or error}"
                ) from error
            time.sleep(RETRY_SECONDS)
            continue
        channel = Channel(sock)
        channel.send(Joining(rank))
        return channel
