"""Server: the unix socket that engines and ranks speak to.

One task reads a connection, one writes it; each request runs as its own task, so a long wait blocks nobody. KV bytes
never pass here. When a connection ends, its client's claims end too, but only when the process behind it is proven
gone (or says that it holds nothing any more): until then it may still read what it was given.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .arena import Arena
from .commands import Command
from .document import checked_name
from .errors import ConfigError, Draining, HoldfastError, InUse, ProtocolError, Unavailable, VersionMismatch
from .frames import Answer, Envelope, FrameBuffer, decode_request, encode
from .handout import Handout, Receiver, close_all
from .object_requests import SETTLED_OBJECTS
from .processes import started
from .ranks import Ranks
from .requests import Requests
from .sections import LimitsConfig
from .service import Service
from .state import Backend
from .warm import WarmIndex
from .wire import (
    PROTOCOL_VERSION,
    BeginIngest,
    DeleteDocument,
    Done,
    Goodbye,
    Hello,
    MapSlabs,
    MoveDone,
    NextSlots,
    Refused,
    RegisterRank,
    Reply,
    SlabsMapped,
    Welcome,
)

READ_BYTES: Final = 256 << 10
OUTBOX_FRAMES: Final = 4096  # a peer that reads this little is taken for dead
HELLO_SECONDS: Final = 10.0
FAREWELL_SECONDS: Final = 1.0  # for a peer to take what it was sent last
ACCEPT_RETRY_SECONDS: Final = 0.1
SETTLED: Final = (BeginIngest, NextSlots, DeleteDocument, *SETTLED_OBJECTS)  # answered when the index has heard of it
PEER: Final = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame to be sent, and the descriptors beside it. A reply frees one of the connection's request places."""

    data: bytes
    descriptors: tuple[int, ...] = ()
    is_reply: bool = False


@dataclass(eq=False, slots=True)
class Connection:
    """One accepted socket. `client` is 0 until Hello; `process` is a pidfd of the peer, if it is one we can see.

    `started` is when that process began. `places` are how many more requests it may have that are not answered, or
    whose answers it has not taken; `mapping` lets one answer with descriptors wait for it at a time, because we have
    only so many.
    """

    sock: socket.socket
    pid: int
    process: int | None
    started: int | None
    places: asyncio.Semaphore
    client: int = 0
    tenant: str = ""
    has_seat: bool = False
    outbox: asyncio.Queue[_Frame | None] = field(default_factory=lambda: asyncio.Queue(OUTBOX_FRAMES))
    requests: set[asyncio.Task[None]] = field(default_factory=set)
    mapping: asyncio.Lock = field(default_factory=asyncio.Lock)

    def send(self, frame: _Frame) -> None:
        """Queue a frame; a full queue ends the connection."""
        try:
            self.outbox.put_nowait(frame)
        except asyncio.QueueFull:
            close_all(frame.descriptors)
            self.hang_up()

    def hang_up(self) -> None:
        """Let the reader find the end."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close everything but the pidfd, what was never sent included."""
        self.sock.close()
        while not self.outbox.empty():
            frame = self.outbox.get_nowait()
            close_all(frame.descriptors if frame is not None else ())


class Server:
    """Accepts connections at `path` and runs their requests against the service."""

    def __init__(
        self, service: Service, arena: Arena, index: WarmIndex, ranks: Ranks, limits: LimitsConfig, version: str
    ) -> None:
        self._service = service
        self._handout = Handout(service.state.ddr, arena, index)
        self._ranks = ranks
        self._limits = limits
        self._version = version
        self._requests = Requests(service, arena.serial)
        self._accepted: set[Connection] = set()
        self._connections: dict[int, Connection] = {}  # those that said hello
        self._zombies: dict[int, tuple[int, int]] = {}  # client -> (pid, pidfd): connection gone, process alive
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._draining = False

    # Life --------------------------------------------------------------------------------------

    async def start(self, path: Path) -> None:
        """Listen; only this user may connect. The caller holds the data directory lock, so a left-over is ours.

        Raises ConfigError when the socket cannot be made.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            path.unlink(missing_ok=True)  # noqa: ASYNC240 - once, before anything is served
            listener.bind(str(path))
        except OSError as error:
            listener.close()
            raise ConfigError(f"cannot listen on daemon.socket = {path}: {error.strerror}") from error
        finally:
            os.umask(old)
        listener.listen(128)
        listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self._listener = listener
        self._spawn(self._accept(listener))

    def clients(self) -> set[int]:
        """Those that are connected, or whose process may still look at what it was given."""
        return {*self._connections, *self._zombies}

    def watch(self, client: int, pid: int, process: int) -> None:
        """Someone who is not connected may still look at slots: until the end of the process, or its word."""
        self._zombies[client] = (pid, process)
        bury: Callable[[int, int], None] = self._buried
        asyncio.get_running_loop().add_reader(process, bury, client, process)

    def drain(self) -> None:
        """Take no new work; what is under way goes on."""
        self._draining = True

    async def close(self) -> None:
        """End every connection."""
        self._draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in self._accepted:
            connection.hang_up()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _, descriptor in self._zombies.values():
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._zombies.clear()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:  # no descriptor or memory left just now, or the peer is gone again
                await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                continue
            sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
            if len(self._accepted) >= self._limits.connections:
                error = Unavailable(f"all of limits.connections = {self._limits.connections} connections are taken")
                with suppress(OSError), sock:
                    sock.send(encode(Answer(0, Refused(error.code, error.message))))
                continue
            self._spawn(self._serve(self._connected(sock)))

    def _connected(self, sock: socket.socket) -> Connection:
        pid, _, _ = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        try:
            process = os.pidfd_open(pid)
        except OSError:  # it has ended already, or lives in a container we cannot look into
            process = None
        since = started(pid) if process is not None else None
        return Connection(sock, pid, process, since, asyncio.Semaphore(self._limits.requests_per_connection))

    # One connection ----------------------------------------------------------------------------

    async def _serve(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        serving = asyncio.current_task()
        assert serving is not None
        self._accepted.add(connection)
        reader = loop.create_task(self._read(connection))
        writer = loop.create_task(self._write(connection))
        if connection.process is not None:  # the reader may be busy, and then does not see the end of the stream
            loop.add_reader(connection.process, reader.cancel)
        try:
            await reader
        except (OSError, TimeoutError):
            pass
        except HoldfastError as error:
            connection.send(_Frame(encode(Answer(0, Refused(error.code, error.message)))))
        except asyncio.CancelledError:
            if serving.cancelling():
                raise  # our end, not the peer's
        finally:
            if connection.process is not None:
                loop.remove_reader(connection.process)
            for task in connection.requests:
                task.cancel()
            with suppress(asyncio.QueueFull):
                connection.outbox.put_nowait(None)
            await asyncio.wait([writer], timeout=FAREWELL_SECONDS)
            writer.cancel()
            await asyncio.wait([writer])
            connection.close()
            self._accepted.discard(connection)
            self._ended(connection)

    async def _read(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        frames = FrameBuffer(self._limits.frame_bytes)
        deadline = loop.time() + HELLO_SECONDS
        while True:
            waiting = loop.sock_recv(connection.sock, READ_BYTES)
            left = max(0.0, deadline - loop.time())
            data = await (waiting if connection.client else asyncio.wait_for(waiting, left))
            if not data:
                return
            for frame in frames.feed(data):
                envelope = decode_request(frame)
                if not connection.client:
                    self._hello(connection, envelope)
                elif isinstance(envelope.body, Goodbye):
                    self._goodbye(connection, envelope)
                    return
                elif isinstance(envelope.body, MoveDone):
                    self._ranks.done(connection.client, envelope.body)
                else:
                    await self._start(connection, envelope)

    async def _start(self, connection: Connection, envelope: Envelope) -> None:
        """Run a request beside the others, as soon as the client has a place for it."""
        await connection.places.acquire()
        task = asyncio.get_running_loop().create_task(self._answer(connection, envelope))
        connection.requests.add(task)
        task.add_done_callback(lambda ended: self._request_ended(connection, ended))

    def _request_ended(self, connection: Connection, task: asyncio.Task[None]) -> None:
        connection.requests.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # a bug of ours: the daemon's handler stops the process
            task.get_loop().call_exception_handler({"message": "a request failed", "exception": error})

    async def _write(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while True:
                frame = await connection.outbox.get()
                if frame is None:
                    return
                data = frame.data
                if frame.descriptors:
                    data = await self._send_descriptors(connection.sock, data, frame.descriptors)
                    connection.mapping.release()
                await loop.sock_sendall(connection.sock, data)
                if frame.is_reply:
                    connection.places.release()

    async def _send_descriptors(self, sock: socket.socket, data: bytes, descriptors: tuple[int, ...]) -> bytes:
        """Send the first byte with the descriptors beside it, and close ours; returns what is left to send."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                with suppress(BlockingIOError):
                    return data[socket.send_fds(sock, [data[:1]], list(descriptors)) :]
                writable = loop.create_future()
                loop.add_writer(sock, writable.set_result, None)
                try:
                    await writable
                finally:
                    loop.remove_writer(sock)
        finally:
            close_all(descriptors)

    def _hello(self, connection: Connection, envelope: Envelope) -> None:
        hello = envelope.body
        if not isinstance(hello, Hello):
            raise ProtocolError(f"the first message must be Hello, not {type(hello).__name__}")
        if hello.version != PROTOCOL_VERSION:
            raise VersionMismatch(
                f"this daemon speaks protocol version {PROTOCOL_VERSION}, the client {hello.version}; upgrade one"
            )
        checked_name(hello.tenant, "tenant")
        for client in hello.resume:
            self._resumed(client, connection.pid)
        connection.client = self._service.store.new_id()
        connection.tenant = hello.tenant
        self._connections[connection.client] = connection
        if connection.process is not None:
            self._service.introduce(connection.client, connection.pid)
        welcome = Welcome(connection.client, PROTOCOL_VERSION, self._version)
        connection.send(_Frame(encode(Answer(envelope.id, welcome))))

    def _resumed(self, client: int, pid: int) -> None:
        """A process holds nothing any more of what it held as `client`; its old connection may still seem to live."""
        old = self._connections.get(client)
        if old is not None and old.pid == pid:
            del self._connections[client]
            old.hang_up()
            self._gone(client)
        zombie_pid, descriptor = self._zombies.get(client, (0, -1))
        if zombie_pid == pid:
            self._buried(client, descriptor)

    async def _answer(self, connection: Connection, envelope: Envelope) -> None:
        if self._connections.get(connection.client) is not connection:
            return  # its claims have ended already, by goodbye or resume: nobody would end new ones
        body = envelope.body
        descriptors: tuple[int, ...] = ()
        reply: Reply
        try:
            if self._draining and self._requests.is_new_work(body):
                raise Draining("the daemon is shutting down")
            if isinstance(body, MapSlabs):
                reply, descriptors = await self._map(connection, body.slabs)
            elif isinstance(body, RegisterRank):
                reply = self._register(connection, body)
            else:
                reply = await self._requests.handle(connection.client, connection.tenant, body)
                if isinstance(body, SETTLED):
                    await self._handout.settled()
        except HoldfastError as error:
            reply = Refused(error.code, error.message, list(error.holders))
        connection.send(_Frame(encode(Answer(envelope.id, reply)), descriptors, is_reply=True))

    async def _map(self, connection: Connection, slabs: Sequence[int]) -> tuple[Reply, tuple[int, ...]]:
        await connection.mapping.acquire()  # until the descriptors are sent
        descriptors: tuple[int, ...] = ()
        receiver = Receiver(connection.client, connection.tenant, connection.pid, connection.started)
        try:
            mapped, descriptors = await self._handout.open(slabs, receiver)
        finally:
            if not descriptors:
                connection.mapping.release()
        return SlabsMapped(mapped, self._service.state.ddr.slab_bytes), descriptors

    def _register(self, connection: Connection, body: RegisterRank) -> Reply:
        if connection.has_seat:
            raise InUse("this connection is a rank already; each rank has one of its own")

        def command(message: Command) -> None:
            connection.send(_Frame(encode(Answer(0, message))))

        backend = Backend(body.kernel, body.communicator, body.device)
        self._service.register_rank(
            connection.client, body.group, body.rank, body.cp, body.tp, body.fingerprint, body.rows, backend
        )
        connection.has_seat = True
        self._ranks.add(connection.client, body.group, body.rank, command)
        return Done()

    # Ends --------------------------------------------------------------------------------------

    def _goodbye(self, connection: Connection, envelope: Envelope) -> None:
        self._connections.pop(connection.client, None)
        self._gone(connection.client)
        connection.send(_Frame(encode(Answer(envelope.id, Done()))))

    def _ended(self, connection: Connection) -> None:
        """The connection broke: nothing it held is reused before the process behind it has ended."""
        client, process = connection.client, connection.process
        known = self._connections.pop(client, None) is not None
        if known:
            self._ranks.lost(client)
        if known and process is not None and (self._service.holds(client) or self._ranks.owes(client)):
            self.watch(client, connection.pid, process)
            return
        if process is not None:
            os.close(process)
        if known:
            self._gone(client)

    def _buried(self, client: int, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        self._zombies.pop(client, None)
        self._gone(client)

    def _gone(self, client: int) -> None:
        """Its claims end. The other ranks of its group hear of that as of a daemon's end: they register anew."""
        groups = [group for group in self._service.state.groups.values() if client in group.seats.values()]
        self._ranks.gone(client)
        self._service.disconnect(client)
        self._handout.gone(client)
        for seat in (seat for group in groups for seat in group.seats.values()):
            if seat in self._connections:
                self._connections[seat].hang_up()
