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
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .arena import Arena
from .config import LimitsConfig
from .document import checked_name
from .errors import Draining, HoldfastError, ProtocolError, VersionMismatch
from .frames import Answer, Envelope, FrameBuffer, decode_request, encode
from .ranks import Ranks
from .requests import Requests
from .service import Service
from .wire import (
    PROTOCOL_VERSION,
    Command,
    Done,
    Goodbye,
    Hello,
    MapSlab,
    MoveDone,
    Refused,
    RegisterRank,
    Reply,
    SlabMapped,
    Welcome,
)

READ_BYTES: Final = 256 << 10
OUTBOX_FRAMES: Final = 4096  # a peer that reads this little is taken for dead
HELLO_SECONDS: Final = 10.0
PEER: Final = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED


@dataclass(eq=False, slots=True)
class Connection:
    """One accepted socket. `client` is 0 until Hello."""

    sock: socket.socket
    pid: int
    client: int = 0
    tenant: str = ""
    outbox: asyncio.Queue[tuple[bytes, tuple[int, ...]]] = field(default_factory=lambda: asyncio.Queue(OUTBOX_FRAMES))
    requests: set[asyncio.Task[None]] = field(default_factory=set)

    def send(self, message: Answer, descriptors: tuple[int, ...] = ()) -> None:
        """Queue a frame; a full queue ends the connection."""
        try:
            self.outbox.put_nowait((encode(message), descriptors))
        except asyncio.QueueFull:
            self.sock.shutdown(socket.SHUT_RDWR)


class Server:
    """Accepts connections at `path` and runs their requests against the service."""

    def __init__(self, service: Service, arena: Arena, ranks: Ranks, limits: LimitsConfig, version: str) -> None:
        self._service = service
        self._arena = arena
        self._ranks = ranks
        self._limits = limits
        self._version = version
        self._requests = Requests(service, arena.serial)
        self._connections: dict[int, Connection] = {}
        self._zombies: dict[int, tuple[int, int]] = {}  # client -> (pid, pidfd): connection gone, process alive
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._draining = False

    # Life --------------------------------------------------------------------------------------

    async def start(self, path: Path) -> None:
        """Listen; only this user may connect. The caller holds the data directory lock, so a left-over is ours."""
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - once, before anything is served
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen(128)
        listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self._listener = listener
        self._spawn(self._accept(listener))

    def drain(self) -> None:
        """Take no new work; what is under way goes on."""
        self._draining = True

    async def close(self) -> None:
        """End every connection."""
        self._draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections.values()):
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _, descriptor in self._zombies.values():
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._zombies.clear()

    @property
    def connection_count(self) -> int:
        """Connections that said hello."""
        return len(self._connections)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            if len(self._tasks) > 4 * self._limits.connections or len(self._connections) >= self._limits.connections:
                sock.close()
                continue
            sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
            pid, _, _ = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
            self._spawn(self._serve(Connection(sock, pid)))

    # One connection ----------------------------------------------------------------------------

    async def _serve(self, connection: Connection) -> None:
        writer = asyncio.get_running_loop().create_task(self._write(connection))
        try:
            await self._read(connection)
        except (OSError, TimeoutError):
            pass
        except ProtocolError as error:
            connection.send(Answer(0, Refused(error.code, error.message)))
        finally:
            for task in connection.requests:
                task.cancel()
            with suppress(asyncio.QueueFull):
                connection.outbox.put_nowait((b"", ()))
            await asyncio.wait([writer], timeout=1.0)
            writer.cancel()
            connection.sock.close()
            self._ended(connection)

    async def _read(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        frames = FrameBuffer(self._limits.frame_bytes)
        while True:
            waiting = loop.sock_recv(connection.sock, READ_BYTES)
            data = await (waiting if connection.client else asyncio.wait_for(waiting, HELLO_SECONDS))
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
        """Run a request beside the others; a client with too many has to wait until some have ended."""
        while len(connection.requests) >= self._limits.requests_per_connection:
            await asyncio.wait(connection.requests, return_when=asyncio.FIRST_COMPLETED)
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
                data, descriptors = await connection.outbox.get()
                if not data:
                    return
                if descriptors:
                    data = await self._send_descriptors(connection.sock, data, descriptors)
                await loop.sock_sendall(connection.sock, data)

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
            for descriptor in descriptors:
                os.close(descriptor)

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
            pid, descriptor = self._zombies.get(client, (0, -1))
            if pid == connection.pid:
                self._buried(client, descriptor)
        connection.client = self._service.store.new_id()
        connection.tenant = hello.tenant
        self._connections[connection.client] = connection
        connection.send(Answer(envelope.id, Welcome(connection.client, PROTOCOL_VERSION, self._version)))

    async def _answer(self, connection: Connection, envelope: Envelope) -> None:
        body = envelope.body
        descriptors: tuple[int, ...] = ()
        reply: Reply
        try:
            if self._draining and self._requests.is_new_work(body):
                raise Draining("the daemon is shutting down")
            if isinstance(body, MapSlab):
                reply, descriptors = self._map(connection, body)
            elif isinstance(body, RegisterRank):
                reply = self._register(connection, body)
            else:
                reply = await self._requests.handle(connection.client, connection.tenant, body)
        except HoldfastError as error:
            reply = Refused(error.code, error.message)
        connection.send(Answer(envelope.id, reply), descriptors)

    def _map(self, connection: Connection, body: MapSlab) -> tuple[Reply, tuple[int, ...]]:
        """A tenant may see the slabs it owns, no others."""
        if self._service.state.ddr.owner(body.slab) != connection.tenant:
            raise ProtocolError(f"slab {body.slab} does not serve tenant {connection.tenant!r}")
        descriptor = os.dup(self._arena.descriptor(body.slab))
        return SlabMapped(body.slab, self._arena.serial(body.slab), self._arena.slab_bytes), (descriptor,)

    def _register(self, connection: Connection, body: RegisterRank) -> Reply:
        def command(message: Command) -> None:
            connection.send(Answer(0, message))

        self._service.register_rank(
            connection.client, body.group, body.rank, body.cp, body.tp, body.fingerprint, body.rows
        )
        self._ranks.add(connection.client, body.group, body.rank, command)
        return Done()

    # Ends --------------------------------------------------------------------------------------

    def _goodbye(self, connection: Connection, envelope: Envelope) -> None:
        self._connections.pop(connection.client, None)
        self._gone(connection.client)
        connection.send(Answer(envelope.id, Done()))

    def _ended(self, connection: Connection) -> None:
        """The connection broke: wait for the process to end before anything it held is reused."""
        if self._connections.pop(connection.client, None) is None:
            return
        client = connection.client
        self._ranks.lost(client)
        try:
            descriptor = os.pidfd_open(connection.pid)
        except OSError:
            self._gone(client)
            return
        self._zombies[client] = (connection.pid, descriptor)
        bury: Callable[[int, int], None] = self._buried
        asyncio.get_running_loop().add_reader(descriptor, bury, client, descriptor)

    def _buried(self, client: int, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        self._zombies.pop(client, None)
        self._gone(client)

    def _gone(self, client: int) -> None:
        self._ranks.lost(client)
        self._service.disconnect(client)
