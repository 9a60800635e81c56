"""Messages about hints: documents whose queries are known before they run."""

from __future__ import annotations

from .hint_views import HintView
from .message import Count, Line, Message, Seconds


class PrefetchDocument(Message, frozen=True):
    """So many queries on a document are coming: bring it to DDR, or to a group, before they are here.

    `deadline_seconds`: until when it is wanted, where that is known. The same connection's next hint on the document
    and target, of the same owner, replaces this one; an attach, or the connection's end, ends it.
    """

    name: str
    group: str | None = None
    queries: Count = 1
    deadline_seconds: Seconds | None = None
    owner: Line = ""


class CancelPrefetch(Message, frozen=True):
    """They are not coming after all; done, too, where there is no such hint any more."""

    name: str
    group: str | None = None
    owner: Line = ""


class Hinted(Message, frozen=True):
    """The hint, as it stands."""

    hint: HintView
