"""Ingesting: an open ingest, from its first slot to its publication. See ingest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from .document import Document, DocumentId
from .errors import HoldfastError
from .extent import Extent
from .keys import Tokens
from .layout import Layout
from .loading import Loading
from .passage import Passage
from .residency import Placement
from .room import Reservation
from .state import Shard, ShardKey
from .writing import Turn

Done = Callable[[HoldfastError | None], None]


class Stage(StrEnum):
    """Where an ingest is."""

    WAITING = "waiting"
    FILLING = "filling"
    LOADING = "loading"  # to be committed as soon as the cached front has arrived
    FAILED = "failed"  # it cannot become complete, but its writer may still be writing to slots, or to a group's rows
    SAVING = "saving"
    SEALING = "sealing"
    CATALOGING = "cataloging"  # what is on NVMe already gets its rows
    BEHIND = "behind"  # complete, but the disk has to catch up first (nvme.when_behind = wait)
    ENDED = "ended"


@dataclass(eq=False, slots=True, kw_only=True)
class Ingest:
    """An open ingest. `missing` are the extents that its writer fills; `cached_tokens` lead and are there already.

    `grows`: a shorter version of the document, which its tokens begin with, is there. `absorbs`: unnamed documents that
    an unnamed one continues, so that it takes their place.
    """

    id: int
    client: int
    document: Document
    extents: tuple[Extent, ...]
    missing: tuple[Extent, ...]
    cached_tokens: int
    group: str | None
    layout: Layout | None
    grows: bool = False
    absorbs: tuple[DocumentId, ...] = ()
    stage: Stage = Stage.WAITING
    passage: Passage | None = None
    held: list[Placement] = field(default_factory=list)
    loading: Loading | None = None
    reservation: Reservation | None = None
    deadline_ns: int | None = None  # of its commit
    ttl_ns: int | None = None  # of the document, from its publication
    turn: Turn | None = None
    tokens: Tokens | None = None  # where somebody follows what comes and goes
    error: HoldfastError | None = None
    granted: Done | None = None
    committed: Done | None = None

    @property
    def key(self) -> ShardKey:
        """The version of the document that is made."""
        return ShardKey(self.document.id, self.document.token_count)

    @property
    def filled(self) -> dict[str, Placement]:
        """The private copies in DDR, by extent."""
        return self.passage.filled if self.passage is not None else {}

    @property
    def shard(self) -> Shard | None:
        """The shard in the group, once there is one."""
        return self.loading.shard if self.loading is not None else None
