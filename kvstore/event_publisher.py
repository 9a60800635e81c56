"""Event publisher: sends KV events over ZeroMQ as vLLM does, so that routers need to know one format.

Each message is (topic, number, batch): 8 bytes big-endian, counted from 0, and msgpack. A number that was skipped is
asked for again at the replay socket: a request with that number is answered by every batch since, as far as they are
kept, and an end mark. A number that is smaller than the last one means that the daemon was started anew.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec

from .clock import Clock
from .errors import ConfigError, MissingExtra
from .kv_events import AllBlocksCleared, Announcer, Batch, Event
from .sections import OFF, EventsConfig
from .state import State

if TYPE_CHECKING:
    import zmq

EXTENTS_AT_ONCE: Final = 2048  # a look must not hold up the loop
SENT_MAX: Final = 100_000  # messages that a slow subscriber may be behind, as vLLM has it
REPLAYS_AT_ONCE: Final = 16  # requests answered per wake
END: Final = (-1).to_bytes(8, "big", signed=True)
NS: Final = 1_000_000_000


class EventPublisher:
    """Binds its sockets at once; `tick` looks for changes and sends them. All on the loop's thread, and never waits."""

    def __init__(self, config: EventsConfig, state: State, clock: Clock) -> None:
        """Raises ConfigError for an endpoint that is refused or taken, MissingExtra without pyzmq."""
        try:
            import zmq
        except ImportError as error:
            raise MissingExtra("events.endpoint needs pyzmq: pip install 'holdfast[events]'") from error
        self._zmq = zmq
        self._topic = b"" if config.topic == OFF else config.topic.encode()
        self._clock = clock
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_batches)
        self._number = 0
        self._context = zmq.Context()
        self._loop = asyncio.get_running_loop()
        try:
            self._publish = self._bound(zmq.PUB, "events.endpoint", config.endpoint, SENT_MAX)
            self._replay: zmq.Socket[bytes] | None = None
            if config.replay_endpoint != OFF:
                kept = config.buffer_batches + 1
                self._replay = self._bound(zmq.ROUTER, "events.replay_endpoint", config.replay_endpoint, kept)
                self._loop.add_reader(self._replay.fileno(), self._answer)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._announcer = Announcer(state)
        self._send([AllBlocksCleared()])

    def _bound(self, kind: int, key: str, endpoint: str, limit: int) -> zmq.Socket[bytes]:
        checked_endpoint(key, endpoint)
        made = self._context.socket(kind)
        made.set_hwm(limit)
        try:
            made.bind(endpoint)
        except self._zmq.ZMQError as error:
            raise ConfigError(f"{key} = {endpoint!r} cannot be bound: {error}; choose another") from error
        return made

    def tick(self) -> None:
        """Send what has changed since the last time; at most so much at once, the rest next time."""
        events = self._announcer.events(EXTENTS_AT_ONCE)
        if events:
            self._send(events)
        if self._replay is not None:
            self._answer()  # the descriptor wakes us at edges only

    def _send(self, events: list[Event]) -> None:
        payload = msgspec.msgpack.encode(Batch(self._clock.wall_ns() / NS, events))
        number, self._number = self._number, self._number + 1
        self._kept.append((number, payload))
        with suppress(self._zmq.Again):  # PUB drops what a subscriber cannot take; it sees the gap
            self._publish.send_multipart((self._topic, number.to_bytes(8, "big"), payload), self._zmq.NOBLOCK)

    def _answer(self) -> None:
        """Replay what was asked for."""
        replay = self._replay
        assert replay is not None
        for _ in range(REPLAYS_AT_ONCE):
            try:
                frames = replay.recv_multipart(self._zmq.NOBLOCK)
            except self._zmq.Again:
                return
            if len(frames) != 3 or len(frames[2]) != 8:
                continue  # not of our protocol; vLLM ignores it too
            peer, first = frames[0], int.from_bytes(frames[2], "big")
            with suppress(self._zmq.Again):
                for number, payload in self._kept:
                    if number >= first:
                        parts = (peer, b"", self._topic, number.to_bytes(8, "big"), payload)
                        replay.send_multipart(parts, self._zmq.NOBLOCK)
                replay.send_multipart((peer, b"", b"", END, b""), self._zmq.NOBLOCK)

    def close(self) -> None:
        """Stop; what is under way is dropped."""
        if self._replay is not None:
            self._loop.remove_reader(self._replay.fileno())
        self._context.destroy(linger=0)


def checked_endpoint(key: str, endpoint: str) -> None:
    """Token ids are what documents say, and nobody is asked who they are: this machine only. Raises ConfigError."""
    scheme, _, place = endpoint.partition("://")
    if scheme == "ipc" and place:
        return
    host, _, port = place.rpartition(":")
    with suppress(ValueError):
        if scheme == "tcp" and port.isdecimal() and ipaddress.ip_address(host.strip("[]")).is_loopback:
            return
    raise ConfigError(
        f"{key} = {endpoint!r}: say ipc:///path or tcp://127.0.0.1:PORT; events tell tokens, and have no access control"
    )
