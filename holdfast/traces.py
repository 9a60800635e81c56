"""Traces of KV-prefix accesses: one JSON object a line, sorted by time, plain or gzip (`.gz`).

    {"ts": ms since the start, "in": input tokens, "out": output tokens, "sid": session id or -1, "runs": [s, n, ...]}

`runs` are the ids of the prompt's 512-token blocks as (start, length) pairs. Ids are prefix-unique: equal id, equal
whole prefix. Units of B = 512 j tokens are made by joining: every j ids are one unit, named by the last of them; what
remains at the end of a request is a part-filled unit of its own, named -1 - its last id. A request may have no block.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import msgspec

from .eviction.replay import Request
from .eviction.use import UnitId, Use
from .kvstore.errors import InvalidRequest

TRACE_BLOCK_TOKENS: Final = 512
LINE_BYTES_MAX: Final = 16 << 20
BLOCKS_MAX: Final = 1 << 20  # of one request: half a billion tokens
NS_PER_MS: Final = 1_000_000
SUFFIXES: Final = (".gz", ".jsonl")


class TraceLine(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the file has it."""

    ts_ms: float = msgspec.field(name="ts")
    input_tokens: int = msgspec.field(name="in")
    output_tokens: int = msgspec.field(name="out", default=0)
    session: int = msgspec.field(name="sid", default=-1)
    runs: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request in units of the replay. `input_tokens` may be more or less than its blocks hold."""

    request: Request
    input_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A whole trace in units of `block_tokens`. `unit_count` is the number of different units in it."""

    path: Path
    block_tokens: int
    requests: Sequence[TraceRequest]
    unit_count: int

    @property
    def chains(self) -> Iterator[Sequence[UnitId]]:
        """Of the uses that a policy is told of, which is what an offline one looks ahead at."""
        return (one.request.use.chain for one in self.requests if one.request.use.chain)

    @property
    def touched_units(self) -> int:
        """Units of all requests together, each time counted."""
        return sum(len(one.request.use.chain) for one in self.requests)


def read_trace(path: Path, block_tokens: int, hold_seconds_per_token: float = 0.0) -> Trace:
    """Read a trace. Every request is held for its output tokens times `hold_seconds_per_token`.

    Raises InvalidRequest, which names file and line.
    """
    join, rest = divmod(block_tokens, TRACE_BLOCK_TOKENS)
    if rest or join < 1:
        near = max(1, round(block_tokens / TRACE_BLOCK_TOKENS)) * TRACE_BLOCK_TOKENS
        raise InvalidRequest(
            f"units of {block_tokens} tokens cannot be made of a trace's blocks of {TRACE_BLOCK_TOKENS}; say {near}"
        )
    requests: list[TraceRequest] = []
    before: dict[UnitId, UnitId | None] = {}
    now_ns = 0
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if line.ts_ms * NS_PER_MS < now_ns:
            raise InvalidRequest(f"{where}: earlier than the line before it; sort the file by ts")
        now_ns = round(line.ts_ms * NS_PER_MS)
        blocks = expand(line.runs, where)
        chain = joined(blocks, join)
        _check_prefixes(chain, before, where)
        use = Use(
            chain=chain,
            token_count=_tokens_held(line.input_tokens, len(blocks)),
            unit_tokens=block_tokens,
            now_ns=now_ns,
            session=line.session if line.session >= 0 else None,
        )
        hold_ns = round(line.output_tokens * hold_seconds_per_token * 1e9)
        requests.append(TraceRequest(request=Request(use=use, hold_ns=hold_ns), input_tokens=line.input_tokens))
    if not before:
        raise InvalidRequest(f"{path}: no request in it has a block")
    return Trace(path=path, block_tokens=block_tokens, requests=requests, unit_count=len(before))


def stem(path: Path) -> str:
    """A file's name without what says its format."""
    name = path.name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def read_lines(path: Path) -> Iterator[tuple[int, TraceLine]]:
    """Number and content of each line that is not empty. Raises InvalidRequest."""
    decoder = msgspec.json.Decoder(TraceLine)
    number = 0
    try:
        with _opened(path) as file:
            while raw := file.readline(LINE_BYTES_MAX + 1):
                number += 1
                if len(raw) > LINE_BYTES_MAX:
                    raise InvalidRequest(f"{path}:{number}: a line of more than {LINE_BYTES_MAX >> 20} MiB")
                if not raw.strip():
                    continue
                line = decoder.decode(raw)
                if line.input_tokens < 0 or line.output_tokens < 0 or not 0 <= line.ts_ms < 1e15:
                    raise InvalidRequest(f"{path}:{number}: needs ts, in and out of at least 0")
                yield number, line
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{path}:{number}: {error}; holdfast policy simulate --help shows the format") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidRequest(f"{path}: damaged after line {number} ({error}); fetch it again") from error
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror or error}; say where a trace is") from error


def _opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def expand(runs: Sequence[int], where: str) -> list[int]:
    """Block ids of (start, length) pairs. Raises InvalidRequest."""
    starts, lengths = runs[::2], runs[1::2]
    if len(runs) % 2 or any(start < 0 for start in starts) or any(length < 1 for length in lengths):
        raise InvalidRequest(f"{where}: runs are pairs of a start >= 0 and a length >= 1")
    if sum(lengths) > BLOCKS_MAX:
        raise InvalidRequest(f"{where}: {sum(lengths)} blocks in one request, more than {BLOCKS_MAX}")
    blocks: list[int] = []
    for start, length in zip(starts, lengths, strict=True):
        blocks.extend(range(start, start + length))
    return blocks


def runs_of(blocks: Sequence[int]) -> list[int]:
    """The shortest (start, length) pairs that `expand` makes these of."""
    runs: list[int] = []
    for block in blocks:
        if runs and runs[-2] + runs[-1] == block:
            runs[-1] += 1
        else:
            runs += (block, 1)
    return runs


def joined(blocks: Sequence[int], join: int) -> tuple[UnitId, ...]:
    """Units of `join` blocks each, named by their last; what remains is named apart."""
    full = len(blocks) // join * join
    units = tuple(blocks[join - 1 : full : join])
    return units if full == len(blocks) else (*units, -1 - blocks[-1])


def blocks_of(unit: UnitId, stop_tokens: int, block_tokens: int) -> tuple[int, int]:
    """A unit as other programs know it: the id of its last 512-token block, and of how many it is made.

    `stop_tokens` is the length of the chain up to its end.
    """
    assert isinstance(unit, int), unit
    if unit >= 0:
        return unit, block_tokens // TRACE_BLOCK_TOKENS
    filled_tokens = (stop_tokens - 1) % block_tokens + 1
    return -1 - unit, -(-filled_tokens // TRACE_BLOCK_TOKENS)


def _tokens_held(input_tokens: int, block_count: int) -> int:
    """Tokens in the blocks: the last may be part-filled or, where a trace dropped what did not fill one, is full."""
    least = (block_count - 1) * TRACE_BLOCK_TOKENS + 1
    return max(0, least, min(input_tokens, block_count * TRACE_BLOCK_TOKENS))


def _check_prefixes(chain: Sequence[UnitId], before: dict[UnitId, UnitId | None], where: str) -> None:
    previous: UnitId | None = None
    for unit in chain:
        if before.setdefault(unit, previous) != previous:
            raise InvalidRequest(f"{where}: {unit} follows another prefix than before; ids must chain")
        previous = unit
