"""Frames: how messages are cut out of, and put into, a byte stream.

A frame is a 4-byte little-endian length and a msgpack array [id, body]; a request's id comes back with its reply, and
id 0 marks what needs none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import msgspec

from .commands import Command
from .errors import FrameTooLarge, HoldfastError, MalformedFrame
from .wire import Reply, Request

LENGTH: Final = struct.Struct("<I")


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """What a client sends."""

    id: int
    body: Request


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What the daemon sends."""

    id: int
    body: Reply | Command


_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Envelope)
_answers = msgspec.msgpack.Decoder(Answer)


def encode(message: Envelope | Answer) -> bytes:
    """The whole frame. Raises MalformedFrame for a text that is no Unicode, or a number that is too large."""
    try:
        data = _encoder.encode(message)
    except (UnicodeEncodeError, OverflowError) as error:
        raise MalformedFrame(f"it cannot be sent: {error}") from error
    return LENGTH.pack(len(data)) + data


def decode_request(data: bytes | memoryview) -> Envelope:
    """Raises MalformedFrame."""
    try:
        return _requests.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, HoldfastError) as error:
        raise MalformedFrame(f"a frame of {len(data)} bytes does not decode: {error}") from error


def decode_answer(data: bytes | memoryview) -> Answer:
    """Raises MalformedFrame."""
    try:
        return _answers.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, HoldfastError) as error:
        raise MalformedFrame(f"a frame of {len(data)} bytes does not decode: {error}") from error


class FrameBuffer:
    """Cuts a byte stream into frames of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Frames completed by these bytes. Raises FrameTooLarge as soon as a length says so."""
        self._data += data
        while len(self._data) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._data)
            if length > self.limit:
                raise FrameTooLarge(f"a frame of {length} bytes exceeds the limit of {self.limit}")
            end = LENGTH.size + length
            if len(self._data) < end:
                return
            frame = bytes(self._data[LENGTH.size : end])
            del self._data[:end]
            yield frame
