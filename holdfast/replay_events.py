"""The events of a replay, for other programs to recompute its result by: JSON lines, gzip where the name ends in .gz.

The first line says what was replayed: `trace, policy, capacity, capacity_blocks, block_tokens`. Then one line for each
request of the trace, in its order:

    {"request": 0, "hit_blocks": 3, "hit_tokens": 1536, "evicted": [[id, n], ...], "inserted": [[id, n], ...]}

`hit_blocks` counts blocks of `block_tokens` that were resident in front of the request, without a gap; `hit_tokens` are
the tokens they hold, at most the request's input. Then the blocks of `evicted` left, one after the other, and those of
`inserted` came. A block is named by the id (as in the trace) of the last of its 512-token blocks, and n is how many of
those it holds: block_tokens / 512, or fewer at the end of a request. What a request used and is in neither list was
resident already, or never came. After every event at most `capacity_blocks` are resident, and what left was a leaf: no
resident block followed it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .eviction.cache import Unit
from .eviction.replay import Step
from .json_lines import JsonLines
from .traces import blocks_of, stem


class EventsFile(JsonLines):
    """Written while a replay runs."""

    def __init__(self, path: Path, heading: dict[str, Any]) -> None:
        """Raises InvalidRequest when the file cannot be made."""
        super().__init__(path)
        self._block_tokens: int = heading["block_tokens"]
        self.write(heading)

    def saw(self, number: int, hit_tokens: int, step: Step) -> None:
        """One request."""
        self.write(
            {
                "request": number,
                "hit_blocks": step.hit_units,
                "hit_tokens": hit_tokens,
                "evicted": self._names(step.evicted),
                "inserted": self._names(step.inserted),
            }
        )

    def _names(self, units: Iterable[Unit]) -> list[tuple[int, int]]:
        return [blocks_of(unit.id, unit.stop_tokens, self._block_tokens) for unit in units]


def events_path(path: Path, trace_stem: str, policy: str, capacity: str) -> Path:
    """Where one of several replays writes: x.jsonl.gz becomes x.agentic_a.lru.5pct.jsonl.gz."""
    ending = path.name.removeprefix(stem(path))
    return path.with_name(f"{stem(path)}.{trace_stem}.{policy}.{capacity.replace('%', 'pct').replace(' ', '')}{ending}")
