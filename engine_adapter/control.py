"""Control: the messages between the driver of a group and its rank processes, over a socket pair.

Framed as in kvstore.wire. KV never travels here; logits do, for they are small.
"""

from __future__ import annotations

import socket
from typing import Final

import msgspec

from ..kvstore.errors import GroupFailed, MalformedFrame
from ..kvstore.frames import LENGTH
from ..kvstore.layouts import LayoutMessage

FRAME_LIMIT: Final = 256 << 20  # tokens and logits of one call; ranks are our own processes
READ_BYTES: Final = 1 << 20


class Order(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of what the driver says."""


class Prefill(Order, frozen=True):
    """Compute a document's KV into the rows of a shard, behind `cached_tokens` that the daemon loads."""

    shard: int
    generation: int
    layout: LayoutMessage
    cached_tokens: int
    chunk_tokens: int
    tokens: bytes
    deadline_seconds: float


class Ask(Order, frozen=True):
    """Answer a question over a shard."""

    shard: int
    generation: int
    layout: LayoutMessage
    question: list[int]
    new_tokens: int
    deadline_seconds: float


class Recompute(Order, frozen=True):
    """Answer a question over a document without the cache, in memory of the rank's own."""

    tokens: bytes
    chunk_tokens: int
    question: list[int]
    new_tokens: int
    deadline_seconds: float


class Rejoin(Order, frozen=True):
    """Leave the broken process group and join a new one."""

    init_method: str


class Quit(Order, frozen=True):
    """Leave."""


class Report(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of what a rank says."""


class Ready(Report, frozen=True):
    """The rank has its model, its arena and its seat."""

    fingerprint: bytes


class Progress(Report, frozen=True):
    """Tokens prefilled so far."""

    tokens: int


class Prefilled(Report, frozen=True):
    """Measured chunks: (cached tokens, new tokens, nanoseconds)."""

    points: list[tuple[int, int, int]]


class Answered(Report, frozen=True):
    """The answer; `logits` float32 [tokens, vocabulary] from rank 0, empty from the others."""

    tokens: list[int]
    logits: bytes
    prefill_ns: int
    decode_ns: int
    exposed_ns: int


class Rejoined(Report, frozen=True):
    """The rank is in the new process group."""


class Failed(Report, frozen=True):
    """The call failed on this rank."""

    code: str
    message: str


AnyOrder = Prefill | Ask | Recompute | Rejoin | Quit
AnyReport = Ready | Progress | Prefilled | Answered | Rejoined | Failed

_encoder = msgspec.msgpack.Encoder()
_orders = msgspec.msgpack.Decoder(AnyOrder)
_reports = msgspec.msgpack.Decoder(AnyReport)


class Channel:
    """One end of the socket pair; whole messages, in order."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = bytearray()

    def fileno(self) -> int:
        """For selectors."""
        return self._sock.fileno()

    def send(self, message: AnyOrder | AnyReport) -> None:
        """Send one message. Raises GroupFailed when the other end is gone."""
        data = _encoder.encode(message)
        try:
            self._sock.sendall(LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise GroupFailed(f"the other end of a group's channel is gone: {error.strerror or error}") from error

    def receive_order(self) -> AnyOrder | None:
        """The next order; None when the driver is gone."""
        while (frame := self._frame()) is None:
            if not self._receive():
                return None
        order: AnyOrder = _orders.decode(frame)
        return order

    def receive_reports(self) -> list[AnyReport] | None:
        """All reports that have arrived, after waiting for at least some bytes; None when the rank is gone.

        All, because a selector does not wake for what has been read from the socket already.
        """
        if not self._receive():
            return None
        reports = []
        while (frame := self._frame()) is not None:
            reports.append(_reports.decode(frame))
        return reports

    def _receive(self) -> bool:
        """Wait for more bytes; False when the other end is gone."""
        try:
            data = self._sock.recv(READ_BYTES)
        except OSError:
            return False
        self._data += data
        return bool(data)

    def _frame(self) -> bytes | None:
        """The next complete frame, if there is one."""
        if len(self._data) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._data)
        if length > FRAME_LIMIT:
            raise MalformedFrame(f"a control frame of {length} bytes")
        end = LENGTH.size + length
        if len(self._data) < end:
            return None
        frame = bytes(self._data[LENGTH.size : end])
        del self._data[:end]
        return frame

    def close(self) -> None:
        """Hang up."""
        self._sock.close()
