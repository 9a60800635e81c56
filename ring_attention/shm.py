"""ShmCommunicator: ranks are processes of one host that exchange CPU tensors through shared memory.

Copying is the ranks' own work: what fits into a link's rings is copied when a transfer starts, the
rest while somebody waits. A rank that waits sleeps in poll; nothing spins. A link's memory is bounded:
shm_link.RING_BYTES each way and pair, and only what was used of it.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kvstore.clock import Clock, SystemClock
from ..kvstore.errors import GroupFailed
from .collectives import Collectives, Message
from .communicator import part_of
from .shm_join import join_links
from .shm_link import Link, LinkLost, Transfer


class _Group:
    """One rank's links to all others, and why the group failed."""

    def __init__(self, rank: int, links: dict[int, Link], deadline_s: float, clock: Clock) -> None:
        self.rank = rank
        self.links = links
        self.deadline_s = deadline_s
        self._clock = clock
        self._failure = ""
        self._poll = select.poll()
        self._polled = {link.sock.fileno(): link for link in links.values()}
        for descriptor in self._polled:
            self._poll.register(descriptor, select.POLLIN)

    def check(self) -> None:
        """Raise GroupFailed if the group has failed."""
        if self._failure:
            raise GroupFailed(self._failure)

    def start(self, sends: Sequence[tuple[int, Transfer]], receives: Sequence[tuple[int, Transfer]]) -> None:
        """Queue transfers with ranks of the whole group, and do what needs no waiting. Raises GroupFailed."""
        self.check()
        for peer, transfer in sends:
            self.links[peer].sends.append(transfer)
        for peer, transfer in receives:
            self.links[peer].receives.append(transfer)
        try:
            self._advance()
        except LinkLost as error:
            self._give_up(str(error))

    def finish(self, transfers: Sequence[Transfer]) -> None:
        """Return when these are done; everything else goes on meanwhile.

        Raises GroupFailed, at the deadline if nothing comes any more.
        """
        deadline_ns = self._clock.monotonic_ns() + int(self.deadline_s * 1e9)
        try:
            while True:
                self.check()
                self._advance()
                if not any(transfer.left_bytes for transfer in transfers):
                    return
                left_ns = deadline_ns - self._clock.monotonic_ns()
                # What came while this process was itself suspended still counts, however late it is.
                if not self._listen(max(0, left_ns // 1_000_000 + 1)) and left_ns <= 0:
                    self._give_up(f"rank {self.rank} waited {self.deadline_s} s for {self._awaited()}")
        except LinkLost as error:
            self._give_up(str(error))

    def _advance(self) -> None:
        """Copy all that can be copied now, in turns, so that no peer waits for another's message."""
        links = [link for link in self.links.values() if link.sends or link.receives]
        while links:
            links = [link for link in links if link.advance()]

    def _listen(self, timeout_ms: int) -> bool:
        """Take a frame of each peer that sent one, waiting for the first; whether there was any."""
        events = self._poll.poll(timeout_ms)
        for descriptor, _ in events:
            link = self._polled[descriptor]
            link.read()
            if link.left:
                self._poll.unregister(descriptor)
        return bool(events)

    def _awaited(self) -> str:
        peers = [str(peer) for peer, link in self.links.items() if link.sends or link.receives]
        return f"rank {', '.join(peers)}"

    def _give_up(self, reason: str) -> None:
        self.leave(reason)
        self.check()

    def leave(self, reason: str) -> None:
        """End all links, telling the others; `reason` is why every later operation fails."""
        if self._failure:
            return
        self._failure = reason or "the group was left; form a new one"
        for link in self.links.values():
            link.close(reason)


@dataclass(frozen=True, slots=True)
class _ShmWork:
    group: _Group
    transfers: list[Transfer]

    def wait(self) -> None:
        """See Work."""
        self.group.finish(self.transfers)


class _Part(Collectives):
    """The whole or a part of a group; `members` are ranks of the whole, by rank of the part."""

    def __init__(self, group: _Group, members: Sequence[int]) -> None:
        self.name = "shm"
        self.rank = list(members).index(group.rank)
        self.size = len(members)
        self.device = torch.device("cpu")
        self._group = group
        self._members = members

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> _ShmWork:
        # Parts need no links of their own: two ranks start all their transfers in the same order.
        outgoing = [(self._members[peer], Transfer.of(tensor)) for peer, tensor in sends]
        incoming = [(self._members[peer], Transfer.of(tensor)) for peer, tensor in receives]
        self._group.start(outgoing, incoming)
        return _ShmWork(self._group, [transfer for _, transfer in (*outgoing, *incoming)])

    def split(self, parts: Sequence[Sequence[int]]) -> _Part:
        """See Communicator."""
        self._group.check()
        assert self.size == len(self._group.links) + 1, "only a whole group splits"
        return _Part(self._group, parts[part_of(self.rank, self.size, parts)])

    def abort(self, reason: str) -> None:
        """See Communicator."""
        self._group.leave(f"rank {self._group.rank}: {reason}")

    def close(self) -> None:
        """Leave the group, having all one needs. Afterwards every operation raises GroupFailed."""
        self._group.leave("")


class ShmCommunicator(_Part):
    """See Communicator. A peer that dies fails the others at once, whatever they wait for."""

    def __init__(
        self, rank: int, size: int, rendezvous: Path, deadline_s: float = 60.0, clock: Clock | None = None
    ) -> None:
        """Join the group; blocks until all ranks have.

        `rendezvous` is a directory that the ranks make and that is gone when all have joined: a new path for every
        group. Raises GroupFailed when the others do not come before the deadline.
        """
        clock = clock or SystemClock()
        links = join_links(rank, size, rendezvous, deadline_s, clock)
        super().__init__(_Group(rank, links, deadline_s, clock), range(size))
