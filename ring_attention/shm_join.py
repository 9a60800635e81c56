"""Joining of ranks of one host: each listens in the rendezvous directory and connects to every lower rank."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from ..kvstore.clock import Clock
from ..kvstore.errors import GroupFailed
from .shm_link import Link, new_ring

_HELLO: Final = struct.Struct("<8sII")  # magic, rank, size
_MAGIC: Final = b"hf-shm-1"
_RETRY_MS: Final = 5


class _Joining:
    """One rank on its way into the group."""

    def __init__(self, rank: int, size: int, directory: int, deadline_s: float, clock: Clock) -> None:
        self._rank = rank
        self._size = size
        self._directory = directory
        self._clock = clock
        self._deadline_s = deadline_s
        self._deadline_ns = clock.monotonic_ns() + int(deadline_s * 1e9)
        self.links: dict[int, Link] = {}

    def join(self) -> None:
        """Link up with everybody. Raises GroupFailed or OSError."""
        with closing(_socket()) as listener:
            listener.bind(self._address(self._rank))
            try:
                listener.listen(self._size)
                for peer in range(self._rank):
                    self._connect(peer)
                while len(self.links) < self._size - 1:
                    self._accept(listener)
            except TimeoutError:
                self._left_s()
                raise
            finally:
                os.unlink(str(self._rank), dir_fd=self._directory)

    def give_up(self) -> None:
        """End the links that there are."""
        for link in self.links.values():
            link.close(f"rank {self._rank} did not join")

    def _address(self, rank: int) -> str:
        """Of a rank's listener, by way of the open directory: socket paths must be short."""
        return f"/proc/self/fd/{self._directory}/{rank}"

    def _left_s(self) -> float:
        left_s = (self._deadline_ns - self._clock.monotonic_ns()) / 1e9
        if left_s <= 0:
            missing = sorted(set(range(self._size)) - {self._rank} - set(self.links))
            raise GroupFailed(
                f"rank {self._rank}: ranks {missing} did not join within {self._deadline_s} s; are they all started?"
            )
        return left_s

    def _connect(self, peer: int) -> None:
        """Link up with a lower rank, which may not listen yet."""
        while True:
            sock = _socket()
            with ExitStack() as opened:
                opened.callback(sock.close)
                sock.settimeout(self._left_s())
                try:
                    sock.connect(self._address(peer))
                except (FileNotFoundError, ConnectionRefusedError):
                    select.select([], [], [], _RETRY_MS / 1e3)
                    continue
                self._link(sock)
                opened.pop_all()
            return

    def _accept(self, listener: socket.socket) -> None:
        """Link up with any higher rank."""
        listener.settimeout(self._left_s())
        sock, _ = listener.accept()
        with ExitStack() as opened:
            opened.callback(sock.close)
            sock.settimeout(self._left_s())
            self._link(sock)
            opened.pop_all()

    def _link(self, sock: socket.socket) -> None:
        """Swap names and rings."""
        descriptors = [new_ring()]
        try:
            socket.send_fds(sock, [_HELLO.pack(_MAGIC, self._rank, self._size)], descriptors)
            hello, incoming, _, _ = socket.recv_fds(sock, _HELLO.size, 1, socket.MSG_CMSG_CLOEXEC)
            descriptors += incoming
            if len(hello) != _HELLO.size or len(incoming) != 1:
                raise GroupFailed(f"rank {self._rank}: a peer went away while joining")
            magic, peer, size = _HELLO.unpack(hello)
            if (magic, size) != (_MAGIC, self._size) or peer in {self._rank, *self.links}:
                raise GroupFailed(f"rank {self._rank}: rank {peer} of {size} is of another group; use a new rendezvous")
            self.links[peer] = Link(peer, sock, *descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def join_links(rank: int, size: int, rendezvous: Path, deadline_s: float, clock: Clock) -> dict[int, Link]:
    """Links to all other ranks, in rank order. Raises GroupFailed."""
    assert 0 <= rank < size, (rank, size)
    try:
        with _directory(rendezvous) as directory:
            joining = _Joining(rank, size, directory, deadline_s, clock)
            with ExitStack() as opened:
                opened.callback(joining.give_up)
                joining.join()
                opened.pop_all()
    except OSError as error:
        raise GroupFailed(f"rank {rank}: joining in {rendezvous}: {error}") from error
    return dict(sorted(joining.links.items()))


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    """The rendezvous, made if need be, and removed by the last who leaves it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        with suppress(OSError):
            path.rmdir()


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
