"""Recordings: a live daemon's uses as a trace of 512-token blocks, without anything that names a document or its text.

Block number k of a use covers its tokens [512 k, 512 (k + 1)), or up to its end. It is the same block as that of
another use if k and the extent that holds its last token are the same: extents name their whole prefix. So two
documents share what the daemon can share of them: whole extents. Blocks and documents are numbered in the order of
their appearance, and times are milliseconds since the first use. `in` are the tokens of the document's front that was
used, `out` those of the answers that were reported until the line was written; publishing a document is a use without
an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Final

from .json_lines import JsonLines
from .kvstore.errors import Unavailable
from .rest import Rest
from .traces import TRACE_BLOCK_TOKENS, runs_of

POLL_SECONDS: Final = 0.5
SETTLED_NS: Final = 30_000_000_000  # how long an answer is waited for before its line is written
BLOCKS_MAX: Final = 20_000_000  # different ones: what is remembered to number them takes some gigabytes by then
NS_PER_MS: Final = 1_000_000

Use = Mapping[str, Any]  # as GET /v1/uses shows it
Page = Mapping[str, Any]  # what that answers


class Past(Enum):
    """What of the time before the recording is in it: nothing, or what the daemon still remembers."""

    NOTHING = 0
    REMEMBERED = 1


class Numbering:
    """Makes trace lines of uses."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, int], int] = {}
        self._documents: dict[str, int] = {}
        self._first_ns: int | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def line(self, use: Use) -> dict[str, Any]:
        """One use as a line of a trace."""
        if self._first_ns is None:
            self._first_ns = use["at_ns"]
        return {
            "ts": (use["at_ns"] - self._first_ns) // NS_PER_MS,
            "in": use["token_count"],
            "out": use["answer_tokens"],
            "sid": self._documents.setdefault(use["document"], len(self._documents)),
            "runs": runs_of([self._block(use, number) for number in range(_block_count(use))]),
        }

    def _block(self, use: Use, number: int) -> int:
        last_token = min((number + 1) * TRACE_BLOCK_TOKENS, use["token_count"]) - 1
        extent = use["extents"][last_token // use["extent_tokens"]]
        return self._blocks.setdefault((extent, number), len(self._blocks))


def _block_count(use: Use) -> int:
    return int(-(-use["token_count"] // TRACE_BLOCK_TOKENS))


class Recorder:
    """Follows a daemon's uses. Answers come after their use, so a line waits a while for its answer.

    `requests` were written; `lost` uses were forgotten by the daemon before they were read.
    """

    def __init__(self, rest: Rest, file: JsonLines, requests_max: int | None) -> None:
        self._rest = rest
        self._file = file
        self._requests_max = requests_max
        self._numbering = Numbering()
        self._life: int | None = None
        self._cursor = 0
        self._newest = 0
        self.requests = 0
        self.lost = 0

    @property
    def blocks(self) -> int:
        """Different ones."""
        return len(self._numbering)

    @property
    def has_enough(self) -> bool:
        """Whether all that is wanted has happened, written or not; or no more blocks can be numbered."""
        happened = self.requests + self._newest - self._cursor
        return self.blocks >= BLOCKS_MAX or (self._requests_max is not None and happened >= self._requests_max)

    def begin(self, past: Past) -> None:
        """Raises Unavailable."""
        page = self._ask(None)
        if past is Past.REMEMBERED:
            uses = self._ask(0)["uses"]
            self._cursor = uses[0]["number"] if uses else page["next_cursor"]
        else:
            self._cursor = page["next_cursor"]

    def poll(self) -> None:
        """Write what has settled since the last time. Raises Unavailable."""
        self._read(lambda use, now_ns: not use["open"] or now_ns - use["at_ns"] >= SETTLED_NS)

    def finish(self) -> None:
        """Write the rest, as it is now. Raises Unavailable."""
        self._read(lambda _, __: True)

    def _read(self, settled: Callable[[Use, int], bool]) -> None:
        while (page := self._ask(self._cursor))["uses"]:
            self.lost += page["lost"]
            for use in page["uses"]:
                self._cursor = use["number"]
                if not settled(use, page["now_ns"]) or self._is_full:
                    return
                self._file.write(self._numbering.line(use))
                self.requests += 1
                self._cursor += 1

    @property
    def _is_full(self) -> bool:
        return self.blocks >= BLOCKS_MAX or (self._requests_max is not None and self.requests >= self._requests_max)

    def _ask(self, cursor: int | None) -> Page:
        page = self._rest.get("/v1/uses", {} if cursor is None else {"cursor": str(cursor)})
        if self._life not in (None, page["life"]):
            raise Unavailable("the daemon was restarted; what it told before that has been written")
        self._life, self._newest = page["life"], page["newest"]
        return page


def record(rest: Rest, path: Path, seconds: float, requests_max: int | None, past: Past) -> Recorder:
    """Record until so many seconds are over, or so many requests have come, or somebody interrupts.

    Raises Unavailable when the daemon goes away; what it told until then is in the file.
    """
    rest.get("/v1/uses", {})  # where nobody answers, a file of that name stays as it is
    with JsonLines(path) as file:
        recorder = Recorder(rest, file, requests_max)
        recorder.begin(past)
        deadline = time.monotonic() + seconds
        with suppress(KeyboardInterrupt):
            recorder.poll()
            while not recorder.has_enough and (left := deadline - time.monotonic()) > 0:
                time.sleep(min(POLL_SECONDS, left))
                recorder.poll()
        recorder.finish()
        return recorder
