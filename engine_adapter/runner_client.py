"""RunnerClient: asks a runner over its unix socket. The command line uses it; so may any script.

with RunnerClient(runner_named(data_dir)) as runner:
    for event in runner.ask(AskRequest(document="contract", question="Who pays?")):
        ...
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from ..kvstore.errors import InvalidRequest, RunnerUnavailable, from_code
from ..kvstore.frames import FrameBuffer
from .runner_wire import (
    FINAL,
    FRAME_LIMIT,
    RUNNERS,
    AnyEvent,
    AnyRequest,
    AskRequest,
    IngestRequest,
    Refused,
    RunnerStatus,
    StatusRequest,
    event_of,
    frame_of,
)

READ_BYTES: Final = 1 << 16
CONNECT_SECONDS: Final = 10.0
# Between two events. A request that waits hears of it every second; one that runs may compute for long in silence.
SILENCE_SECONDS: Final = 4 * 3600.0


class RunnerClient:
    """A connection to one runner. Use as a context manager, or call `close`."""

    def __init__(self, path: Path) -> None:
        """Connect. Raises RunnerUnavailable."""
        self._path = path
        self._frames = FrameBuffer(FRAME_LIMIT)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(CONNECT_SECONDS)
            self._sock.connect(str(path))
        except OSError as error:
            self._sock.close()
            raise RunnerUnavailable(f"no runner answers at {path} ({error.strerror or error})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. What runs for us goes on, unheard."""
        self._sock.close()

    def status(self) -> RunnerStatus:
        """What it is, and what it does at the moment."""
        (status,) = self._events(StatusRequest(), CONNECT_SECONDS)
        assert isinstance(status, RunnerStatus), status
        return status

    def ingest(self, request: IngestRequest) -> Iterator[AnyEvent]:
        """Waiting and Prefilling, then Ingested. Raises what the runner refuses with, or RunnerUnavailable."""
        return self._events(request, SILENCE_SECONDS)

    def ask(self, request: AskRequest) -> Iterator[AnyEvent]:
        """Waiting, Recomputing and Piece, then Answered. Raises what the runner refuses with, or RunnerUnavailable."""
        return self._events(request, SILENCE_SECONDS)

    def _events(self, request: AnyRequest, silence_seconds: float) -> Iterator[AnyEvent]:
        frame = frame_of(request)
        if len(frame) > FRAME_LIMIT:
            raise InvalidRequest(f"{len(frame)} bytes are more than a runner takes at once ({FRAME_LIMIT})")
        try:
            self._sock.settimeout(silence_seconds)
            self._sock.sendall(frame)
            while True:
                data = self._sock.recv(READ_BYTES)
                if not data:
                    raise RunnerUnavailable(f"the runner at {self._path} went away before it had answered")
                for answer in self._frames.feed(data):
                    event = event_of(answer)
                    if isinstance(event, Refused):
                        raise from_code(event.code, event.message)
                    yield event
                    if isinstance(event, FINAL):
                        return
        except OSError as error:
            raise RunnerUnavailable(
                f"the runner at {self._path} does not answer ({error.strerror or error})"
            ) from error


def running(data_dir: Path) -> dict[Path, RunnerStatus]:
    """The runners that answer in a daemon's data directory, by socket."""
    found = {}
    for path in sorted((data_dir / RUNNERS).glob("*.sock")):
        with suppress(RunnerUnavailable), RunnerClient(path) as client:
            found[path] = client.status()
    return found


def runner_for(data_dir: Path, tenant: str, group: str | None) -> Path:
    """The socket of the one runner that serves a tenant, or of the group that is named.

    Raises RunnerUnavailable when there is none, InvalidRequest when it serves another tenant or there are several.
    """
    found = running(data_dir)
    if group is not None:
        found = {path: status for path, status in found.items() if status.facts.group == group}
        if not found:
            raise RunnerUnavailable(f"no runner named {group!r} runs in {data_dir}")
    serving = {path: status for path, status in found.items() if status.facts.tenant == tenant}
    if found and not serving:
        others = ", ".join(f"{s.facts.group!r} serves tenant {s.facts.tenant!r}" for s in found.values())
        raise InvalidRequest(f"no runner serves tenant {tenant!r}: {others}; name the document as TENANT/NAME")
    if not serving:
        raise RunnerUnavailable(f"no runner runs in {data_dir}")
    if len(serving) > 1:
        names = ", ".join(status.facts.group for status in serving.values())
        raise InvalidRequest(f"several runners run: {names}; choose one with --group")
    return next(iter(serving))
