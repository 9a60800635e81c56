"""RunnerServer: a runner's unix socket, a thin layer over RunnerService: frames in, events out.

One thread a connection, and a bound on those. Only its user may connect (mode 0600). A lock beside the socket says who
owns the name, so that the socket of a runner that was killed can be replaced, and that of one which lives cannot.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Generator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Final

from ..kvstore.config import SOCKET_PATH_BYTES
from ..kvstore.document import checked_name
from ..kvstore.errors import Conflict, HoldfastError, InvalidRequest, StorageFailed, Unavailable
from ..kvstore.frames import FrameBuffer
from .runner_service import RunnerService
from .runner_wire import (
    FRAME_LIMIT,
    RUNNERS,
    AnyEvent,
    AskRequest,
    IngestRequest,
    Refused,
    StatusRequest,
    frame_of,
    request_of,
)

READ_BYTES: Final = 1 << 20
CONNECTIONS: Final = 128
HEARD_SECONDS: Final = 5.0  # for clients to hear the end of what was answered before we hang up
SEND_SECONDS: Final = 30.0  # a client that reads nothing for that long is as good as gone


class RunnerSeat:
    """A runner's name: its place in the directory of runners, owned as long as this object is open."""

    def __init__(self, data_dir: Path, name: str) -> None:
        """Take the name. Raises Conflict when a runner that lives has it, InvalidName, or StorageFailed."""
        checked_name(name, "group")
        self.directory = data_dir / RUNNERS
        self.socket = self.directory / f"{name}.sock"
        if len(os.fsencode(self.socket)) > SOCKET_PATH_BYTES:
            raise InvalidRequest(f"{self.socket} is longer than the {SOCKET_PATH_BYTES} bytes of a unix socket's path")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.directory / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageFailed(f"{self.directory} cannot hold a runner's socket ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(self._lock, 32).decode(errors="replace").strip()
            os.close(self._lock)
            raise Conflict(
                f"a runner named {name!r} runs already (process {pid or 'unknown'}); stop it, or choose another --name"
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())

    def bind(self) -> socket.socket:
        """Listen, in place of whoever had the name and died."""
        self.socket.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.socket))
        self.socket.chmod(0o600)
        listener.listen(CONNECTIONS)
        return listener

    def close(self) -> None:
        """Give the name back."""
        self.socket.unlink(missing_ok=True)
        os.close(self._lock)  # the lock's file stays: whoever waits for it must not lock another


class RunnerServer:
    """Serves from construction to `close`."""

    def __init__(self, service: RunnerService, seat: RunnerSeat) -> None:
        self._service = service
        self._listener = seat.bind()
        self._lock = threading.Condition()
        self._answering = 0
        self._connections: set[socket.socket] = set()
        self._closing = False
        threading.Thread(target=self._accept, name="holdfast-runner-accept", daemon=True).start()

    def close(self) -> None:
        """Hang up on everybody, after those who are being answered have heard the end."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._closing = True
            self._lock.wait_for(lambda: not self._answering, HEARD_SECONDS)
            connections = list(self._connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            connection.settimeout(SEND_SECONDS)
            with self._lock:
                full = len(self._connections) >= CONNECTIONS
                if not full and not self._closing:
                    self._connections.add(connection)
            if full or self._closing:
                with closing(connection), suppress(OSError):
                    connection.sendall(frame_of(_refused(Unavailable(f"{CONNECTIONS} connections are open already"))))
                continue
            threading.Thread(target=self._serve, args=(connection,), name="holdfast-runner-client", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with ExitStack() as stack:
            stack.callback(connection.close)
            stack.callback(self._forget, connection)
            frames = FrameBuffer(FRAME_LIMIT)
            # Whoever has gone is found out when the next event is sent to it; its iterator is closed then.
            with suppress(OSError):
                while data := _received(connection):
                    try:
                        for frame in frames.feed(data):
                            self._answer(connection, frame)
                    except HoldfastError as error:  # the stream cannot be read on
                        connection.sendall(frame_of(_refused(error)))
                        return

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _answer(self, connection: socket.socket, frame: bytes) -> None:
        with self._lock:
            self._answering += 1
        try:
            with closing(self._events(frame)) as events:
                for event in events:
                    connection.sendall(frame_of(event))
        except HoldfastError as error:
            connection.sendall(frame_of(_refused(error)))
        finally:
            with self._lock:
                self._answering -= 1
                self._lock.notify_all()

    def _events(self, frame: bytes) -> Generator[AnyEvent]:
        """What is said of a request."""
        request = request_of(frame)
        match request:
            case StatusRequest():
                yield self._service.status()
            case IngestRequest():
                yield from self._service.ingest(request)
            case AskRequest():
                yield from self._service.ask(request)


def _received(connection: socket.socket) -> bytes:
    """More bytes, whenever they come; empty when the client is gone."""
    while True:
        try:
            return connection.recv(READ_BYTES)
        except TimeoutError:
            continue


def _refused(error: HoldfastError) -> Refused:
    return Refused(code=error.code, message=error.message)
