"""Connection: the client's end of the socket. Requests from any thread, each with a deadline; pushes to a handler."""

from __future__ import annotations

import os
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from .commands import Command
from .errors import DaemonUnavailable, DeadlineExceeded, HoldfastError, Unavailable, from_code
from .frames import LENGTH, Answer, Envelope, FrameBuffer, decode_answer, decode_request, encode
from .object_messages import AbortPut, ObjectsLeased, PutBegun, ReleaseObjects
from .wire import (
    PROTOCOL_VERSION,
    AbortIngest,
    Attached,
    Detach,
    Goodbye,
    Hello,
    IngestOpened,
    Refused,
    Reply,
    Request,
    SlabsMapped,
    Welcome,
)

# Replies that give something, and what gives it back where nobody waits for it any more.
GIVING_BACK: Final[dict[type, Callable[[Any], Request]]] = {
    Attached: lambda reply: Detach(reply.lease),
    IngestOpened: lambda reply: AbortIngest(reply.ingest),
    ObjectsLeased: lambda reply: ReleaseObjects(reply.lease),
    PutBegun: lambda reply: AbortPut(reply.put),
}
READ_BYTES: Final = 256 << 10
DESCRIPTORS: Final = 253  # more cannot come with one read
FRAME_LIMIT: Final = 256 << 20  # we trust our daemon, but not a broken stream
REPLY_SECONDS: Final = 30.0
REASON_SECONDS: Final = 1.0
# The last clients of this process, by socket, that hold nothing any more. A daemon that was killed may not have written
# down what they told it, so each that connects tells it again, and what was kept for them is free.
LET_GO_KEPT: Final = 256
_let_go: defaultdict[Path, deque[int]] = defaultdict(lambda: deque(maxlen=LET_GO_KEPT))


class Connection:
    """An open connection that said hello. `on_command` hears the daemon's pushes, `on_lost` the end, on a thread."""

    def __init__(
        self,
        path: Path,
        tenant: str,
        *,
        resume: list[int] | None = None,
        on_command: Callable[[Command], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        deadline_seconds: float = REPLY_SECONDS,
    ) -> None:
        """Connect. Raises DaemonUnavailable, or what the daemon answers to Hello."""
        self._path = path
        self._on_command = on_command
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[tuple[Reply, list[int]]]] = {}
        self._next_id = 1
        self._open = True
        self._refusal: HoldfastError | None = None  # why the daemon hung up, where it said so
        self._descriptors: list[int] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(deadline_seconds)
            self._sock.connect(str(path))
            self._sock.settimeout(None)
        except OSError as error:
            self._sock.close()
            raise DaemonUnavailable(
                f"no daemon answers at {path} ({error.strerror or error}); start one with `holdfast serve`, "
                "or connect to its socket or data_dir"
            ) from error
        self._reader = threading.Thread(target=self._read, name="holdfast-client", daemon=True)
        self._reader.start()
        try:
            hello = Hello(PROTOCOL_VERSION, tenant, [*(resume or ()), *_let_go[path]])
            reply, _ = self.call(hello, deadline_seconds)
        except HoldfastError:
            self._hang_up()
            raise
        assert isinstance(reply, Welcome), reply
        self.client = reply.client

    @property
    def is_open(self) -> bool:
        """Whether the daemon is still there, as far as we know."""
        return self._open

    def call(self, body: Request, deadline_seconds: float = REPLY_SECONDS) -> tuple[Reply, list[int]]:
        """Send a request and wait for its reply and the descriptors that came with it.

        Raises what the daemon refused with, DeadlineExceeded, or DaemonUnavailable when the connection ends. What a
        reply gives that comes after its deadline is given back.
        """
        future: Future[tuple[Reply, list[int]]] = Future()
        with self._lock:
            if not self._open:
                raise DaemonUnavailable(f"the connection to {self._path} has ended; connect again")
            number = self._next_id
            self._next_id += 1
            self._waiting[number] = future
        try:
            self._send(Envelope(number, body))
        except HoldfastError:
            with self._lock:
                self._waiting.pop(number, None)
            raise
        try:
            reply, descriptors = future.result(deadline_seconds)
        except TimeoutError as error:
            with self._lock:
                given_up = self._waiting.pop(number, None) is not None
            if given_up:
                what = f"{type(body).__name__} was not answered within {deadline_seconds:g} s"
                raise DeadlineExceeded(what) from error
            reply, descriptors = future.result()  # it came just now
        if isinstance(reply, Refused):
            raise from_code(reply.code, reply.message, reply.holders)
        return reply, descriptors

    def notify(self, body: Request) -> None:
        """Send it, and do not wait for a reply."""
        with self._lock:
            number = self._next_id
            self._next_id += 1
        self._send(Envelope(number, body))

    def _send(self, envelope: Envelope) -> None:
        data = encode(envelope)
        decode_request(data[LENGTH.size :])  # a value of a wrong type fails here, and does not cost the connection
        try:
            with self._lock:
                self._sock.sendall(data)
        except OSError as error:
            if threading.current_thread() is not self._reader:
                self._reader.join(REASON_SECONDS)  # the daemon may have said why before it hung up
            broke = DaemonUnavailable(f"the connection to {self._path} broke: {error.strerror or error}")
            raise self._refusal or broke from error

    def _read(self) -> None:
        frames = FrameBuffer(FRAME_LIMIT)
        try:
            while True:
                data, descriptors, flags, _ = socket.recv_fds(self._sock, READ_BYTES, DESCRIPTORS)
                self._descriptors += descriptors
                if flags & socket.MSG_CTRUNC:  # which slabs the others are of cannot be known any more
                    self._refusal = Unavailable("this process may open no more files to map slabs; raise `ulimit -n`")
                    return
                if not data:
                    return
                for frame in frames.feed(data):
                    self._deliver(decode_answer(frame))
        except (OSError, HoldfastError):
            return
        finally:
            self._ended()

    def _deliver(self, answer: Answer) -> None:
        body = answer.body
        if isinstance(body, Command):
            if self._on_command is not None:
                self._on_command(body)
            return
        if answer.id == 0 and isinstance(body, Refused):
            self._refusal = from_code(body.code, body.message, body.holders)
            return
        with self._lock:
            future = self._waiting.pop(answer.id, None)
        # Descriptors arrive no later than the frame they belong to, but perhaps together with frames before that one;
        # each SlabsMapped has one a slab, and a reply nobody waits for any more must still not leak them.
        count = len(body.slabs) if isinstance(body, SlabsMapped) else 0
        descriptors, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        if future is not None:
            future.set_result((body, descriptors))
        else:
            for descriptor in descriptors:
                os.close(descriptor)
            if type(body) in GIVING_BACK:
                with suppress(HoldfastError):  # the connection has ended, and with it what it held
                    self.notify(GIVING_BACK[type(body)](body))

    def _ended(self) -> None:
        with self._lock:
            self._open = False
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_exception(self._refusal or DaemonUnavailable(f"the daemon at {self._path} went away"))
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        if self._on_lost is not None:
            self._on_lost()

    def close(self) -> None:
        """Say goodbye, so that claims end at once, and hang up."""
        self._on_lost = None
        with suppress(HoldfastError):
            self.call(Goodbye(), 5.0)
        _let_go[self._path].append(self.client)
        self._hang_up()

    def _hang_up(self) -> None:
        self._on_lost = None
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join(5.0)
        self._sock.close()
