"""Real daemons for tests: processes of their own, in short directories, that a test starts, stops and kills.

with DaemonProcess() as daemon:
    client = daemon.start().client()
    content = put(client, "report", 100)      # committed
    daemon.kill()                             # SIGKILL
    assert fetch(daemon.start().client(), "report") == content

They are forked from a server that has imported the daemon already, so that a start takes milliseconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

import numpy as np
from holdfast.kvstore.client import Client
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import DaemonUnavailable, HoldfastError
from holdfast.kvstore.machine import unmount
from holdfast.kvstore.spec import KVSpec

from fakes import tiny_spec
from holdfast.rest import Rest, left_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Self

PATIENCE_SECONDS = 20.0
LAYERS = 2
SETTINGS = {
    "ddr.capacity_bytes": "1 MiB",
    "ddr.slab_bytes": "64 KiB",
    "ddr.on_stop": "free",
    "nvme.capacity_bytes": "4 MiB",
    "nvme.segment_bytes": "256 KiB",
    "nvme.threads": "2",
    "daemon.rest_port": "0",
    "daemon.drain_seconds": "5",
}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["holdfast.kvstore.daemon", "holdfast.kvstore.client", "daemon_process"])


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> object:
    """Ask again until the condition holds; returns what it returned. Fails at the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.004)


def _serve(settings: Mapping[str, str], log: Path, prepare: Callable[[], None] | None) -> None:
    """The child: `holdfast serve` without the command line, with faults put in by `prepare`."""
    from holdfast.kvstore.config import load_config
    from holdfast.kvstore.daemon import serve

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    if prepare is not None:
        prepare()
    try:
        status = serve(load_config(None, {}, settings))
    except HoldfastError as error:
        os.write(2, f"error: {error.code}: {error.message}\n".encode())
        status = 1
    os._exit(status)


class DaemonProcess:
    """A daemon on a data directory of its own. Everything it leaves is removed by `close`."""

    def __init__(self, **settings: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))
        self.data_dir = self.directory / "data"
        self.socket = self.data_dir / "holdfast.sock"
        self._shared = Path(tempfile.mkdtemp(prefix="hf-", dir="/dev/shm"))
        self.settings = {
            **SETTINGS,
            "daemon.data_dir": str(self.data_dir),
            "ddr.directory": str(self._shared),
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        self._log = self.directory / "log"
        self._process = None
        self._clients: list[Client] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Life --------------------------------------------------------------------------------------

    def spawn(self, prepare: Callable[[], None] | None = None) -> DaemonProcess:
        """Start, without waiting until it serves."""
        assert self._process is None, "it runs already"
        self._process = FORKS.Process(target=_serve, args=(self.settings, self._log, prepare), daemon=True)
        self._process.start()
        return self

    def start(self, prepare: Callable[[], None] | None = None) -> DaemonProcess:
        """Start, and wait until it is ready. Fails when it ends instead. Clients of the last daemon are closed."""
        for client in self._clients:
            until(lambda client=client: not client.is_open, "clients notice that their daemon has ended")
            client.close()
        (self.data_dir / "rest.json").unlink(missing_ok=True)
        self.spawn(prepare)
        until(lambda: not self.alive or (self.data_dir / "rest.json").exists(), "the daemon starts")
        assert self.alive, self.log_text()
        until(self._is_ready, "the daemon is ready")
        return self

    def _is_ready(self) -> bool:
        with suppress(HoldfastError):
            return self.rest().get("/readyz") == {"status": "ok"}
        return False

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.exitcode is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """The exit status, negative for a signal, as soon as it has ended by itself."""
        assert self._process is not None
        assert wait([self._process.sentinel], seconds), f"the daemon has not ended:\n{self.log_text()}"
        self._process.join()
        status = self._process.exitcode
        self._process.close()
        self._process = None
        assert status is not None
        return status

    def kill(self) -> None:
        """SIGKILL: no goodbye, no flush."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def terminate(self) -> None:
        """SIGTERM: asks it to drain and end."""
        os.kill(self.pid, signal.SIGTERM)

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        self.terminate()
        return self.wait()

    def restart(self) -> DaemonProcess:
        """SIGKILL and start again on the same data directory, and on what is left in shared memory."""
        self.kill()
        return self.start()

    def restart_cold(self) -> DaemonProcess:
        """SIGKILL and start again, with nothing in memory."""
        self.kill()
        self.cool()
        return self.start()

    def cool(self) -> None:
        """Between two lives: nothing is left in shared memory, as after a reboot."""
        assert self._process is None, "it runs"
        for directory in self._shared.iterdir():
            shutil.rmtree(directory)

    def close(self) -> None:
        """End it and its clients; remove its directories. What it said of a bug is shown with a test that failed."""
        if "bug: stopping" in self.events():
            print(self.log_text().replace("\\n", "\n"))  # noqa: T201 - pytest shows it
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        for client in self._clients:
            client.close()
        while (self.data_dir / "arena").is_mount():  # of one that was killed
            unmount(self.data_dir / "arena")
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self._shared, ignore_errors=True)

    # Looking -----------------------------------------------------------------------------------

    @property
    def arena(self) -> Path:
        """Where its slabs lie."""
        (found,) = self._shared.iterdir()
        return found

    def shared_bytes(self) -> int:
        """Memory that its files in shared memory take, by the blocks that they have."""
        return sum(path.stat().st_blocks * 512 for path in self._shared.rglob("*") if path.is_file())

    def metric(self, name: str) -> float:
        """A metric without labels."""
        with urlopen(f"{left_address(self.data_dir)}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def swaps(self) -> list[dict]:
        """The receipts of attaches, the newest first."""
        return self.rest().get("/v1/swaps")["swaps"]

    def client(self, tenant: str = "default", resume: list[int] | None = None) -> Client:
        """A connection that knows the tiny model, closed at the end of the test."""
        client = Client(self.socket, tenant, resume=resume)
        client.register_spec(tiny_spec())
        self._clients.append(client)
        return client

    def rest(self) -> Rest:
        return Rest(left_address(self.data_dir))

    def leases(self) -> list[dict]:
        return self.rest().get("/v1/leases")["leases"]

    def used(self, tier: str) -> int:
        """Bytes of the tier in use, over its devices."""
        tiers = self.rest().get("/v1/tiers")["tiers"]
        return sum(found["used_bytes"] for found in tiers if found["tier"] == tier)

    def groups(self) -> list[dict]:
        return self.rest().get("/v1/groups")["groups"]

    def descriptors(self) -> int:
        """How many files it has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def log_text(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def events(self) -> list[str]:
        """What it logged, event by event."""
        lines = [line for line in self.log_text().splitlines() if line.startswith("{")]
        return [json.loads(line)["event"] for line in lines]


# Documents -------------------------------------------------------------------------------------


def tokens_of(name: str, count: int, vocabulary: int = 1000) -> list[int]:
    """Tokens that another name does not share."""
    return np.random.default_rng(list(name.encode())).integers(0, vocabulary, count).tolist()


def content_of(name: str, start: int, size_bytes: int) -> bytes:
    """The KV that a document of that name has behind token `start`."""
    return np.random.default_rng([start, *name.encode()]).bytes(size_bytes)


def write(client: Client, name: str, parts: Iterable) -> None:
    """Fill the slots of an open ingest."""
    for part in parts:
        view = client.view(part)
        view[:] = content_of(name, part.start, part.size_bytes)
        view.release()


def put(
    client: Client,
    name: str,
    count: int,
    policy: WritePolicy = WritePolicy.THROUGH,
    spec: KVSpec | None = None,
    tokens: list[int] | None = None,
) -> dict[int, bytes]:
    """Ingest a document; returns its bytes by first token."""
    spec = spec or tiny_spec()
    opened = client.begin_ingest(
        name, spec.fingerprint(), tokens or tokens_of(name, count), write_policy=policy, deadline_seconds=10.0
    )
    write(client, name, opened.parts)
    client.commit_ingest(opened.ingest)
    return expected(name, count)


def expected(name: str, count: int) -> dict[int, bytes]:
    """The bytes of a document by first token."""
    return {start: content_of(name, start, 16384) for start in range(0, count, 32)}


def fetch(client: Client, name: str) -> dict[int, bytes]:
    """Attach a document, and return its bytes by first token."""
    attached = client.attach(name, deadline_seconds=10.0)
    try:
        client.wait_layers(attached.lease, LAYERS, 10.0)
        return {part.start: bytes(client.view(part)) for part in attached.parts}
    finally:
        with suppress(DaemonUnavailable):
            client.detach(attached.lease)


def durable(client: Client, name: str) -> bool:
    return client.document(name).durable
