"""Link: a Store that may go away and come back, for adapters whose engine must not notice.

Nobody waits for a connection: while there is none, `use` raises at once, and a thread of the link's own tries again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from ..kvstore.errors import DaemonUnavailable, DeadlineExceeded, HoldfastError
from .api import Store, connect

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 1.0  # between attempts to connect
STOP_SECONDS: Final = 5.0  # it may be asking a daemon that does not answer
GONE: Final = "the daemon went away"
REST_SECONDS: Final = 2.0  # after a deadline: a slow daemon costs an engine one wait, not one a request


@dataclass(slots=True, eq=False)
class _Session:
    """One connection. It is closed when its last user has left: that tells the daemon that nobody reads its slots."""

    store: Store
    users: int = 0
    retired: bool = False


class Link:
    """Connections to one daemon, one after the other. Methods may be called from any thread.

    `connecting` makes a Store, or raises HoldfastError; it is called on the link's thread, at most once per
    `retry_seconds`. `on_change` hears on some thread of every change: None when connected, else why not.
    """

    def __init__(
        self,
        connecting: Callable[[], Store],
        *,
        on_change: Callable[[HoldfastError | None], None] | None = None,
        retry_seconds: float = RETRY_SECONDS,
        rest_seconds: float = REST_SECONDS,
    ) -> None:
        self._connecting = connecting
        self._on_change = on_change
        self._retry_seconds = retry_seconds
        self._rest_seconds = rest_seconds
        self._changed = threading.Condition()
        self._session: _Session | None = None
        self._rests_until = 0.0
        self._reason: HoldfastError | None = DaemonUnavailable("not connected yet; ask again in a moment")
        self._told_up: bool | None = None  # the last news; None before the first
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="holdfast-link", daemon=True)
        self._thread.start()

    @property
    def is_up(self) -> bool:
        """Whether `use` would be tried: connected, and not at rest."""
        with self._changed:
            return self._usable() is not None

    def wait(self, seconds: float) -> bool:
        """Wait until it is connected, at most so long; returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._usable() is not None, seconds)

    @contextmanager
    def use(self) -> Iterator[Store]:
        """The store. Raises DaemonUnavailable at once while the daemon is away, or was too slow a moment ago.

        DeadlineExceeded that passes through lets the link rest.
        """
        with self._changed:
            session = self._usable()
            if session is None:
                raise DaemonUnavailable(f"go on without the cache: {self._why_not()}")
            session.users += 1
        try:
            yield session.store
        except DeadlineExceeded:
            with self._changed:
                self._rests_until = time.monotonic() + self._rest_seconds
            raise
        finally:
            with self._changed:
                session.users -= 1
                last = session.retired and session.users == 0
                self._changed.notify_all()
            if last:
                session.store.close()

    def close(self) -> None:
        """Disconnect; whoever uses the store now closes it when it is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(STOP_SECONDS)

    def _usable(self) -> _Session | None:
        """Call with the condition held."""
        if self._session is None or not self._session.store.is_open or time.monotonic() < self._rests_until:
            return None
        return self._session

    def _why_not(self) -> str:
        """Why there is no usable session. Call with the condition held."""
        if self._session is None and self._reason is not None:
            return self._reason.message
        return "it was too slow a moment ago" if self._session is not None and self._session.store.is_open else GONE

    def _serve(self) -> None:
        while True:
            with self._changed:
                # A connection that ends tells nobody here: it is looked at as often as one would be made anew.
                self._changed.wait_for(lambda: self._closed, 0.0 if self._session is None else self._retry_seconds)
                if self._closed:
                    break
                session = self._session
                lost = session is not None and not session.store.is_open
            if lost:
                self._retire(DaemonUnavailable(GONE))
            elif session is None:
                self._connect()
        self._retire(DaemonUnavailable("the link is closed"))

    def _connect(self) -> None:
        try:
            store = self._connecting()
        except (HoldfastError, OSError, RuntimeError) as error:  # without descriptors or threads for now, too
            self._tell(error if isinstance(error, HoldfastError) else DaemonUnavailable(f"{error}; tried again soon"))
            with self._changed:
                self._changed.wait_for(lambda: self._closed, self._retry_seconds)
            return
        with self._changed:
            self._session = _Session(store)
            self._rests_until = 0.0
        self._tell(None)

    def _retire(self, reason: HoldfastError) -> None:
        with self._changed:
            session, self._session = self._session, None
            if session is not None:
                session.retired = True
            idle = session is not None and session.users == 0
        if session is not None:
            self._tell(reason)
            if idle:
                session.store.close()

    def _tell(self, reason: HoldfastError | None) -> None:
        """Remember why, and pass it on if it is news: a daemon that stays away is said once."""
        with self._changed:
            self._reason = reason
            told, self._told_up = self._told_up, reason is None
            news = told != (reason is None) and not self._closed  # our own goodbye is none
            self._changed.notify_all()
        if news and self._on_change is not None:
            self._on_change(reason)


def link_to(socket: str | None, data_dir: str | None, tenant: str) -> Link:
    """A link to a daemon on this machine, found as `connect` finds it. It logs each time it comes and goes."""

    def changed(reason: HoldfastError | None) -> None:
        if reason is not None:
            log.warning("this engine goes on without Holdfast's cache: %s", reason.message)
        else:
            log.info("Holdfast's cache can be used")

    return Link(lambda: connect(socket, data_dir=data_dir, tenant=tenant), on_change=changed)
