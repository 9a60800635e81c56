"""Changes: extents whose copies came or went since somebody looked last. Kept only while somebody follows."""

from __future__ import annotations

from collections.abc import Iterable

from .extent import Extent, ExtentId
from .keys import Tokens


class Changes:
    """What was touched, once each, in the order of its first touch; no more than there are extents."""

    def __init__(self) -> None:
        self._touched: dict[ExtentId, Tokens | None] | None = None

    @property
    def are_followed(self) -> bool:
        """Whether anybody wants to know."""
        return self._touched is not None

    def follow(self) -> None:
        """Keep them from now on."""
        self._touched = {}

    def note(self, extent: ExtentId) -> None:
        """A copy of it came, became readable, or went."""
        if self._touched is not None:
            self._touched.setdefault(extent)

    def published(self, extents: Iterable[Extent], tokens: Tokens) -> None:
        """These extents of a document with these tokens were published: the one moment at which tokens are known."""
        if self._touched is not None:
            for extent in extents:
                self._touched[extent.id] = tokens[extent.start : extent.stop]

    def take(self, most: int) -> list[tuple[ExtentId, Tokens | None]]:
        """The first of them, and their tokens where they are known; they are forgotten here."""
        if not self._touched:
            return []
        taken = [(extent, self._touched[extent]) for extent, _ in zip(self._touched, range(most), strict=False)]
        for extent, _ in taken:
            del self._touched[extent]
        return taken
