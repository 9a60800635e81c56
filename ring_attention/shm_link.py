"""Link: two ranks of one host, joined by a socket and, each way, a ring of shared memory.

A message is cut into chunks. The sender copies a chunk into the ring and says so on the socket; the
receiver copies it out and gives its units back. A ring holds two large chunks, so that a chunk is
still in the cache when it is copied out: two copies then cost little more than one. Frames:

    C, units given back, bytes of the next chunk (0: none)
    A, reason      the sender has failed or was told to abort
    B              the sender leaves, having all it needs

The kernel orders them after the bytes they speak of, wakes who sleeps, and ends the stream when a
process dies, however it dies. There are never more frames under way than units, so none blocks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import Tensor

UNIT_BYTES: Final = 32 << 10  # a small message takes one
CHUNK_UNITS: Final = 32  # smaller chunks cost more frames, larger ones fall out of the cache
RING_UNITS: Final = 2 * CHUNK_UNITS
RING_BYTES: Final = RING_UNITS * UNIT_BYTES  # of each of the two ways

_CHUNK: Final = struct.Struct("<cxHI")
_FRAME_BYTES: Final = 1024


def new_ring() -> int:
    """A descriptor of memory for one way of a link; without a name, so that nothing outlives its users."""
    descriptor = os.memfd_create("holdfast-link", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, RING_BYTES)
    return descriptor


class LinkLost(Exception):
    """The peer is gone; the reason."""


@dataclass(slots=True)
class Transfer:
    """What is left of one message's way out of or into `tensor`."""

    tensor: Tensor
    address: int
    left_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Transfer:
        """All of a contiguous tensor."""
        assert tensor.device.type == "cpu", tensor.device
        return cls(tensor, tensor.data_ptr(), tensor.numel() * tensor.element_size())

    def passed(self, count_bytes: int) -> bool:
        """Go on behind a chunk; whether it was the last."""
        self.address += count_bytes
        self.left_bytes -= count_bytes
        return not self.left_bytes


class _Ring:
    """One way's memory; both ends walk through it alike."""

    def __init__(self, descriptor: int, protection: int) -> None:
        mapping = mmap.mmap(descriptor, RING_BYTES, prot=protection)
        self._mapping = np.frombuffer(mapping, np.uint8)
        self._address = int(self._mapping.ctypes.data)
        self._unit = 0

    def chunk(self, left_bytes: int) -> tuple[int, int]:
        """Bytes and units of the next chunk of a message with that much left."""
        units = min(-(-left_bytes // UNIT_BYTES), CHUNK_UNITS, RING_UNITS - self._unit)
        return min(left_bytes, units * UNIT_BYTES), units

    def pass_(self, units: int) -> int:
        """The address of the next chunk, which is that long; the one after it is next."""
        address = self._address + self._unit * UNIT_BYTES
        self._unit = (self._unit + units) % RING_UNITS
        return address


class Link:
    """This rank's end. It never waits: `advance` does what can be done, `read` takes a frame that is there."""

    def __init__(self, peer: int, sock: socket.socket, outgoing: int, incoming: int) -> None:
        """Takes the connected SEQPACKET socket; the descriptors of the rings stay the caller's."""
        self.peer = peer
        self.sock = sock
        self.sends: deque[Transfer] = deque()
        self.receives: deque[Transfer] = deque()
        self.left = False  # the peer has left in order: there is nothing more to read
        self._out = _Ring(outgoing, mmap.PROT_READ | mmap.PROT_WRITE)
        self._in = _Ring(incoming, mmap.PROT_READ)
        self._free_units = RING_UNITS
        self._owed_units = 0  # of the peer's ring: read and not given back yet
        self._arrived: deque[int] = deque()  # bytes of each chunk that has come
        sock.settimeout(0)

    def advance(self) -> bool:
        """Move at most one chunk each way; whether one moved. Raises LinkLost."""
        moved = False
        if self.receives and self._arrived:
            self._take(self.receives[0])
            moved = True
        if self.sends and self._put(self.sends[0]):
            moved = True
        if self._owed_units >= CHUNK_UNITS:
            self._tell(0)
        if self.left and (self.sends or (self.receives and not self._arrived)):
            raise LinkLost(f"rank {self.peer} has left the group")
        return moved

    def _take(self, transfer: Transfer) -> None:
        count_bytes, units = self._in.chunk(transfer.left_bytes)
        assert count_bytes == self._arrived.popleft(), "both sides know the length of a message"
        ctypes.memmove(transfer.address, self._in.pass_(units), count_bytes)
        self._owed_units += units
        if transfer.passed(count_bytes):
            self.receives.popleft()

    def _put(self, transfer: Transfer) -> bool:
        count_bytes, units = self._out.chunk(transfer.left_bytes)
        if units > self._free_units:
            return False
        ctypes.memmove(self._out.pass_(units), transfer.address, count_bytes)
        self._free_units -= units
        self._tell(count_bytes)
        if transfer.passed(count_bytes):
            self.sends.popleft()
        return True

    def _tell(self, count_bytes: int) -> None:
        self._send(_CHUNK.pack(b"C", self._owed_units, count_bytes))
        self._owed_units = 0

    def _send(self, frame: bytes) -> None:
        # A peer that is gone has left its last words, or the end of the stream, for `read`.
        with suppress(OSError):
            self.sock.send(frame)

    def read(self) -> None:
        """Take one frame. Raises LinkLost."""
        try:
            frame = self.sock.recv(_FRAME_BYTES)
        except (BlockingIOError, ConnectionResetError):
            return  # reset: the peer left frames of ours unread; its last words are still to come
        except OSError:
            frame = b""
        match frame[:1]:
            case b"C":
                _, given_back, count_bytes = _CHUNK.unpack(frame)
                self._free_units += given_back
                if count_bytes:
                    self._arrived.append(count_bytes)
            case b"B":
                self.left = True
            case b"A":
                raise LinkLost(frame[1:].decode(errors="replace"))
            case _:
                if not self.left:
                    raise LinkLost(f"rank {self.peer} died")

    def close(self, reason: str) -> None:
        """Leave, with a reason if the group has failed. Wakes a thread that polls the socket."""
        self._send(b"A" + reason.encode()[: _FRAME_BYTES - 1] if reason else b"B")
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
