"""Link: two ranks of one host, joined by a socket and, each way, a few slots of shared memory.

A message is cut into chunks. The sender copies a chunk into a free slot and says so on the socket;
the receiver copies it out and gives the slot back. Slots are few, so that a chunk is still in the
cache when it is copied out: two copies then cost what one would. Frames on the socket:

    C, slots given back, bytes in the next slot (0: none)
    A, reason      the sender has failed or was told to abort
    B              the sender leaves, having all it needs

The kernel orders them after the bytes they speak of, wakes who sleeps, and ends the stream when a
process dies, however it dies. There are never more frames under way than slots, so none blocks.
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

SLOTS: Final = 4
SLOT_BYTES: Final = 512 << 10  # smaller ones cost more frames, larger ones fall out of the second-level cache
MAPPED_BYTES: Final = SLOTS * SLOT_BYTES  # of each of the two ways

_CHUNK: Final = struct.Struct("<cBxxI")
_FRAME_BYTES: Final = 1024


def new_slots() -> int:
    """A descriptor of memory for one way of a link; without a name, so that nothing outlives its users."""
    descriptor = os.memfd_create("holdfast-link", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, MAPPED_BYTES)
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

    def passed(self, count_bytes: int) -> None:
        """Go on behind a chunk."""
        assert count_bytes <= self.left_bytes, "both sides know the length of a message"
        self.address += count_bytes
        self.left_bytes -= count_bytes


class _Slots:
    """One way's memory, used round and round; next() is the address of the next slot."""

    def __init__(self, descriptor: int, protection: int) -> None:
        self._mapping = np.frombuffer(mmap.mmap(descriptor, MAPPED_BYTES, prot=protection), np.uint8)
        self._address = int(self._mapping.ctypes.data)
        self._number = 0

    def next(self) -> int:
        address = self._address + self._number % SLOTS * SLOT_BYTES
        self._number += 1
        return address


class Link:
    """This rank's end. It never waits: `advance` does what can be done, `read` takes a frame that is there."""

    def __init__(self, peer: int, sock: socket.socket, outgoing: int, incoming: int) -> None:
        """Takes the connected SEQPACKET socket; the descriptors of the slots stay the caller's."""
        self.peer = peer
        self.sock = sock
        self.sends: deque[Transfer] = deque()
        self.receives: deque[Transfer] = deque()
        self._out = _Slots(outgoing, mmap.PROT_READ | mmap.PROT_WRITE)
        self._in = _Slots(incoming, mmap.PROT_READ)
        self._free = SLOTS
        self._arrived: deque[int] = deque()  # bytes in each filled slot that comes in
        self._owed = 0  # slots read and not given back yet
        self._left = False
        sock.settimeout(0)

    def advance(self) -> bool:
        """Move at most one chunk each way; whether one moved. Raises LinkLost."""
        moved = False
        if self.receives and self._arrived:
            self._take(self.receives[0], self._arrived.popleft())
            moved = True
        if self.sends and self._free:
            self._put(self.sends[0])
            moved = True
        if self._owed >= SLOTS // 2:
            self._tell(0)
        if self._left and (self.sends or (self.receives and not self._arrived)):
            raise LinkLost(f"rank {self.peer} has left the group")
        return moved

    def _take(self, transfer: Transfer, count_bytes: int) -> None:
        address = transfer.address
        transfer.passed(count_bytes)
        ctypes.memmove(address, self._in.next(), count_bytes)
        self._owed += 1
        if not transfer.left_bytes:
            self.receives.popleft()

    def _put(self, transfer: Transfer) -> None:
        count_bytes = min(transfer.left_bytes, SLOT_BYTES)
        ctypes.memmove(self._out.next(), transfer.address, count_bytes)
        self._free -= 1
        transfer.passed(count_bytes)
        self._tell(count_bytes)
        if not transfer.left_bytes:
            self.sends.popleft()

    def _tell(self, count_bytes: int) -> None:
        self._send(_CHUNK.pack(b"C", self._owed, count_bytes))
        self._owed = 0

    def _send(self, frame: bytes) -> None:
        # A peer that is gone has left its last words, or the end of the stream, for `read`.
        with suppress(OSError):
            self.sock.send(frame)

    def read(self) -> None:
        """Take one frame. Raises LinkLost."""
        try:
            frame = self.sock.recv(_FRAME_BYTES)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        match frame[:1]:
            case b"C":
                _, given_back, count_bytes = _CHUNK.unpack(frame)
                self._free += given_back
                if count_bytes:
                    self._arrived.append(count_bytes)
            case b"B":
                self._left = True
            case b"A":
                raise LinkLost(frame[1:].decode(errors="replace"))
            case _:
                if not self._left:
                    raise LinkLost(f"rank {self.peer} died")

    @property
    def left(self) -> bool:
        """Whether the peer has left in order: there is nothing more to read."""
        return self._left

    def close(self, reason: str) -> None:
        """Leave, with a reason if the group has failed. Wakes a thread that polls the socket."""
        self._send(b"A" + reason.encode()[: _FRAME_BYTES - 1] if reason else b"B")
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
