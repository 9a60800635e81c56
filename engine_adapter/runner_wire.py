"""Runner wire: what a runner is asked over its unix socket, and what it says, one event after the other.

Framed as in kvstore.frames. A connection carries one request after the other; each is answered by events, of which the
last is `RunnerStatus`, `Ingested`, `Answered` or `Refused`. Content is text or token ids.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from ..kvstore.document import WritePolicy
from ..kvstore.errors import MalformedFrame
from ..kvstore.frames import LENGTH
from ..kvstore.views import DocumentView, SwapView

RUNNERS: Final = "runners"  # the folder of sockets in the daemon's data directory
FRAME_LIMIT: Final = 256 << 20
WAIT_SECONDS: Final = 600.0  # how long a request waits for its turn, unless it says otherwise
NEW_TOKENS: Final = 128
NEW_TOKENS_MAX: Final = 1 << 20

Content = str | list[int]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class RunnerRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of what a runner is asked."""


class StatusRequest(RunnerRequest, frozen=True, kw_only=True):
    """What it is, and what it does at the moment; answered at once."""


class IngestRequest(RunnerRequest, frozen=True, kw_only=True):
    """Prefill a document and store it under a name; it is deleted `ttl_seconds` after it is published (null: never)."""

    name: str
    content: Content
    write_policy: WritePolicy = WritePolicy.AUTO
    wait_seconds: Seconds = WAIT_SECONDS
    ttl_seconds: float | None = None


class AskRequest(RunnerRequest, frozen=True, kw_only=True):
    """Answer a question over a stored document.

    `extend`: the question and its answer become part of the document. `content` is the document's, for when the cache
    cannot serve and the runner does not remember it.
    """

    document: str
    question: Content
    new_tokens: Annotated[int, msgspec.Meta(ge=1, le=NEW_TOKENS_MAX)] = NEW_TOKENS
    extend: bool = False
    content: Content | None = None
    wait_seconds: Seconds = WAIT_SECONDS


class RunnerEvent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of what a runner says."""


class Waiting(RunnerEvent, frozen=True, kw_only=True):
    """The request waits for its turn; said again every second."""

    ahead: int


class Prefilling(RunnerEvent, frozen=True, kw_only=True):
    """How far an ingest is. The first `cached_tokens` were in the cache and are not computed."""

    done_tokens: int
    cached_tokens: int
    total_tokens: int


class Ingested(RunnerEvent, frozen=True, kw_only=True):
    """The document is complete and visible. `elapsed_ns` does not count the wait for its turn."""

    document: DocumentView
    cached_tokens: int
    elapsed_ns: int


class Recomputing(RunnerEvent, frozen=True, kw_only=True):
    """The cache cannot serve, for the reason given; the answer comes after all of the document was computed again."""

    code: str
    reason: str
    total_tokens: int


class Piece(RunnerEvent, frozen=True, kw_only=True):
    """More text of the answer."""

    text: str


class Answered(RunnerEvent, frozen=True, kw_only=True):
    """The whole answer. `swap` is None, and `reason` an error's code, when it was computed without the cache.

    `first_token_ns` is from the start of the attach to the first token. `strategy` says how the ranks exchanged KV for
    the question, and why. `document_tokens` is what the document has now, if it grew; `turn_reason` is the code of an
    error: why it did not, or why its end was prefilled again.
    """

    text: str
    tokens: list[int]
    swap: SwapView | None
    reason: str
    first_token_ns: int
    prefill_ns: int
    decode_ns: int
    exposed_ns: int
    strategy: str
    document_tokens: int | None
    turn_reason: str


class Refused(RunnerEvent, frozen=True, kw_only=True):
    """The request failed: an error's code and message."""

    code: str
    message: str


class RunnerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner is from start to end. Rows and bytes are per rank; `capacity_tokens` fit into the whole group.

    `kernel` and `communicator` are what was asked for; empty: the device chooses. 0 threads: a fair share.
    """

    group: str
    tenant: str
    pid: int
    model: str
    shape: str
    kv_bytes_per_token: int
    cp: int
    tp: int
    device: str
    threads: int
    kernel: str
    communicator: str
    strategy: str
    rows: int
    hbm_bytes: int
    capacity_tokens: int


class RunnerStatus(RunnerEvent, frozen=True, kw_only=True):
    """A runner at a glance. `problem` is empty while it can answer; `settings` are what its ranks chose at start."""

    facts: RunnerFacts
    settings: dict[str, str]
    problem: str
    busy: bool
    waiting: int
    answered: int
    ingested: int
    recomputed: int
    restarts: int


AnyRequest = StatusRequest | IngestRequest | AskRequest
AnyEvent = Waiting | Prefilling | Ingested | Recomputing | Piece | Answered | Refused | RunnerStatus
FINAL: Final = (RunnerStatus, Ingested, Answered, Refused)

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(AnyRequest)
_events = msgspec.msgpack.Decoder(AnyEvent)


def frame_of(message: AnyRequest | AnyEvent) -> bytes:
    """The whole frame."""
    data = _encoder.encode(message)
    return LENGTH.pack(len(data)) + data


def request_of(frame: bytes) -> AnyRequest:
    """Raises MalformedFrame, which says what was wrong with the request."""
    try:
        request: AnyRequest = _requests.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(error) from error
    return request


def event_of(frame: bytes) -> AnyEvent:
    """Raises MalformedFrame."""
    try:
        event: AnyEvent = _events.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(error) from error
    return event


def _malformed(error: Exception) -> MalformedFrame:
    return MalformedFrame(f"this is no message of a runner of this version ({error}); was one of both ends upgraded?")
