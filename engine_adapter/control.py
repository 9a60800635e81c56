"""Control: the messages between the driver of a group and its rank processes, over a socket.

Framed as in kvstore.wire. KV never travels here; logits do, for they are small.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import Final

import msgspec

from ..kvstore.calibration import RingRate
from ..kvstore.errors import GroupFailed, MalformedFrame
from ..kvstore.frames import LENGTH
from ..kvstore.layouts import LayoutMessage, ShardMessage
from .rank_config import RankConfig

FRAME_LIMIT: Final = 256 << 20  # tokens and logits of one call; ranks are our own processes
READ_BYTES: Final = 1 << 20
SEND_SECONDS: Final = 30.0
TIMEVAL: Final = struct.Struct("ll")


class Order(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of what the driver says."""


class Start(Order, frozen=True):
    """Load the model, take the seat, join the process group."""

    config: RankConfig


class Prefill(Order, frozen=True):
    """Compute a document's KV into the rows of a shard, behind `cached_tokens` that the daemon loads."""

    shard: ShardMessage
    cached_tokens: int
    chunk_tokens: int
    tokens: bytes
    deadline_seconds: float


class Asked(msgspec.Struct, frozen=True, array_like=True):
    """A question over a shard."""

    shard: ShardMessage
    tokens: list[int]
    new_tokens: int
    eos: list[int]
    keeps_tail: bool


class Ask(Order, frozen=True):
    """Answer questions together. `call` names what the ranks keep of them."""

    call: int
    questions: list[Asked]
    deadline_seconds: float


class Grow(Order, frozen=True):
    """Copy what `document` and a tail of the last call hold, from `from_token` on, into the shard of both."""

    into: ShardMessage
    document: ShardMessage
    call: int
    index: int
    from_token: int
    deadline_seconds: float


class Recompute(Order, frozen=True):
    """Answer a question over a document without the cache, in memory of the rank's own."""

    tokens: bytes
    chunk_tokens: int
    question: list[int]
    new_tokens: int
    deadline_seconds: float


class Measure(Order, frozen=True):
    """Measure the group: its ring, and prefills of several lengths."""


class Cancel(Order, frozen=True):
    """Nobody wants to know how the call that is under way ends: end it soon. To rank 0 only; not answered."""


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


class Joining(Report, frozen=True):
    """The first word of a rank that somebody else has started."""

    rank: int


class Progress(Report, frozen=True):
    """Tokens prefilled so far."""

    tokens: int


class Token(Report, frozen=True):
    """The next token of the answer to one of the call's questions."""

    question: int
    token: int


class Prefilled(Report, frozen=True):
    """Measured chunks: (cached tokens, new tokens, nanoseconds)."""

    points: list[tuple[int, int, int]]


class AnswerMessage(msgspec.Struct, frozen=True, array_like=True):
    """An answer; `logits` float32 [tokens, vocabulary] from rank 0, of the first tokens; empty from the others.

    `strategy` is how the ranks exchanged KV for the question, and `strategy_reason` why. `tail`: who has which tokens
    of question and answer, if they are kept.
    """

    tokens: list[int]
    logits: bytes
    prefill_ns: int
    decode_ns: int
    exposed_ns: int
    strategy: str
    strategy_reason: str
    tail: LayoutMessage | None


class Answered(Report, frozen=True):
    """The answers to all questions, in their order."""

    answers: list[AnswerMessage]


class Measured(Report, frozen=True):
    """What the group was measured to do, None for a single rank; prefills as (cached tokens, new tokens, seconds)."""

    rate: RingRate | None
    prefills: list[tuple[int, int, float]]


class Grown(Report, frozen=True):
    """The rows are filled."""


class Rejoined(Report, frozen=True):
    """The rank is in the new process group."""


class Failed(Report, frozen=True):
    """The call failed on this rank."""

    code: str
    message: str


AnyOrder = Start | Prefill | Ask | Grow | Recompute | Measure | Cancel | Rejoin | Quit
AnyReport = Joining | Ready | Progress | Token | Prefilled | Answered | Grown | Measured | Rejoined | Failed

_encoder = msgspec.msgpack.Encoder()
_orders = msgspec.msgpack.Decoder(AnyOrder)
_reports = msgspec.msgpack.Decoder(AnyReport)


class Channel:
    """One end of a connected socket; whole messages, in order.

    No send takes longer than SEND_SECONDS: a peer that is stuck is as good as gone.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        seconds, fraction = divmod(SEND_SECONDS, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(int(seconds), int(fraction * 1e6)))
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

    @property
    def has_more(self) -> bool:
        """Whether something has arrived that was not received, if only the other end's end."""
        return bool(self._data) or bool(select.select([self._sock], [], [], 0.0)[0])

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
