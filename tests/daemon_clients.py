"""Clients in processes of their own, which tests kill. Each says through its pipe how far it is."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from holdfast.kvstore.client import Client
from holdfast.kvstore.commands import Command, SaveCommand
from holdfast.kvstore.errors import NoCapacity

from daemon_process import FORKS, PATIENCE_SECONDS, fetch, tokens_of, write
from fakes import tiny_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection


class ClientProcess:
    """A running client; `hear` waits for what it says."""

    def __init__(self, process, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe

    def hear(self) -> object:
        assert self.pipe.poll(PATIENCE_SECONDS), "the client process says nothing"
        return self.pipe.recv()

    def say(self, word: object) -> None:
        self.pipe.send(word)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(PATIENCE_SECONDS)
        assert self.process.exitcode == -signal.SIGKILL


@contextmanager
def client_process(job: Callable, path: Path, *arguments: object) -> Iterator[ClientProcess]:
    """Run `job(pipe, path, *arguments)` in a process of its own; killed at the end."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=job, args=(theirs, path, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ClientProcess(process, ours)
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def awaits(_: Connection, path: Path, name: str) -> None:
    """Asks for a document that does not come; whoever looks whether it waits may be in its place for a moment."""
    client = Client(path)
    while True:
        with suppress(NoCapacity):
            client.attach(name, wait_seconds=60.0)


def reads(pipe: Connection, path: Path, tenant: str, name: str) -> None:
    """Say what a document holds."""
    client = Client(path, tenant)
    pipe.send(fetch(client, name))
    client.close()


def holds_lease(pipe: Connection, path: Path, name: str) -> None:
    """Attach, and hold the lease; when told to, drop the connection without a word but live on."""
    client = Client(path)
    attached = client.attach(name)
    client.wait_layers(attached.lease, 2)
    pipe.send(client.number)
    pipe.recv()
    client._connection._sock.shutdown(socket.SHUT_RDWR)
    client._connection._reader.join()
    pipe.send("dropped")
    pipe.recv()


def holds_bytes(pipe: Connection, path: Path, name: str) -> None:
    """Attach, hold the lease, and say what the bytes are when asked; nobody else is told of a lost daemon."""
    client = Client(path)
    attached = client.attach(name)
    client.wait_layers(attached.lease, 2)
    views = {part.start: client.view(part) for part in attached.parts}
    pipe.send("holding")
    while True:
        pipe.recv()
        pipe.send({start: bytes(view) for start, view in views.items()})


def holds_save(pipe: Connection, path: Path, group: str) -> None:
    """Be a rank that, told to save, drops its connection without a word, but lives on and may still write."""
    commands: SimpleQueue[Command] = SimpleQueue()
    client = Client(path, on_command=commands.put)
    client.register_rank(group, 0, 1, 1, client.register_spec(tiny_spec()), 256)
    pipe.send("seated")
    while not isinstance(commands.get(timeout=PATIENCE_SECONDS), SaveCommand):
        pass
    client._connection._sock.shutdown(socket.SHUT_RDWR)
    client._connection._reader.join()
    pipe.send("dropped")
    pipe.recv()


def ingests(pipe: Connection, path: Path, name: str) -> None:
    """Open an ingest and never commit it."""
    opened = _opened(path, name)[1]
    pipe.send(len(opened.parts))
    pipe.recv()


def writes(pipe: Connection, path: Path, name: str) -> None:
    """Open an ingest and write into its slots without end."""
    client, opened = _opened(path, name)
    while True:
        write(client, name, opened.parts)
        pipe.send("written")


def waits_for_room(pipe: Connection, path: Path, name: str) -> None:
    """Ask for room that is not there."""
    client = Client(path)
    fingerprint = client.register_spec(tiny_spec())
    pipe.send("asking")
    client.begin_ingest(name, fingerprint, tokens_of(name, 320), deadline_seconds=300.0)
    pipe.send("granted")
    pipe.recv()


def floods(pipe: Connection, path: Path, requests: bytes) -> None:
    """Say hello, send these frames over and over, and never read a reply."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    sock.settimeout(1.0)
    try:
        sent = sock.send(requests)
        while True:
            sent += sock.send(requests[sent % len(requests) :])
    except TimeoutError:
        pipe.send("stuck")  # the daemon does not take more
    except OSError:
        pipe.send("cut off")
    pipe.recv()


def _opened(path: Path, name: str):
    client = Client(path)
    fingerprint = client.register_spec(tiny_spec())
    return client, client.begin_ingest(name, fingerprint, tokens_of(name, 320))
