"""Problems: what the admin API says when it refuses, as RFC 9457 documents, and the reading of what it is sent.

A problem's `code` is that of the error (see `errors`); the table of HTTP statuses lives here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from . import errors
from .errors import DeadlineExceeded, HoldfastError, InvalidRequest
from .holders import Holder

BODY_SECONDS_MAX: Final = 10.0

STATUS: Final[dict[type[HoldfastError], int]] = {
    errors.InvalidRequest: 400,
    errors.FrameTooLarge: 413,
    errors.DocumentTooLarge: 413,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.NoCapacity: 507,
    errors.Unavailable: 503,
    errors.DeadlineExceeded: 504,
    errors.CorruptExtent: 500,
    errors.StorageFailed: 500,
    errors.StorageFull: 507,
    errors.DataDirectoryBusy: 500,
    errors.MissingExtra: 501,
}
HTTP_CODES: Final = {
    404: "no-such-route",
    405: "method-not-allowed",
    413: "body-too-large",
    415: "unsupported-media-type",
}

Done = Callable[[HoldfastError | None], None]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """RFC 9457, and the code once more on its own. `holders`: who would have to let go, where that is the reason."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    holders: tuple[Holder, ...] = ()


def status_of(kind: type[HoldfastError]) -> int:
    """The HTTP status of an error: its own, or that of the nearest ancestor in the table; 500 for none."""
    return next((STATUS[base] for base in kind.__mro__ if base in STATUS), 500)


async def ended(start: Callable[[Done], object]) -> HoldfastError | None:
    """What a command's callback hears."""
    heard: asyncio.Future[HoldfastError | None] = asyncio.get_running_loop().create_future()

    def done(error: HoldfastError | None) -> None:
        if not heard.done():  # the handler may have been cancelled
            heard.set_result(error)

    start(done)
    return await heard


async def told(start: Callable[[Done], object]) -> None:
    """Start a command and wait until it says that it is over. Raises what it says went wrong."""
    if (error := await ended(start)) is not None:
        raise error


def reply(value: object, status: int = 200) -> web.Response:
    """Answer with JSON."""
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def problem(
    request: web.Request, status: int, code: str, title: str, detail: str, holders: tuple[Holder, ...] = ()
) -> web.Response:
    """Answer with a problem document."""
    body = Problem(
        type=f"urn:holdfast:error:{code}",
        title=title,
        status=status,
        detail=detail,
        instance=request.rel_url.raw_path,
        code=code,
        holders=holders,
    )
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/problem+json")


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn typed errors and aiohttp's refusals into problems."""
    try:
        return await handler(request)
    except HoldfastError as error:
        title = error.code.replace("-", " ").capitalize()
        response = problem(request, status_of(type(error)), error.code, title, error.message, error.holders)
        if response.status == 503:
            response.headers["Retry-After"] = "1"
        return response
    except web.HTTPException as error:
        if error.status < 400:
            raise
        code = HTTP_CODES.get(error.status, error.reason.lower().replace(" ", "-"))
        response = problem(request, error.status, code, error.reason, error.text or error.reason)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response


def query(request: web.Request, kind: type[T]) -> T:
    """The query string as a record. Raises InvalidRequest."""
    try:
        return msgspec.convert(dict(request.query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"query: {error}") from error


async def body(request: web.Request, kind: type[T]) -> T:
    """The JSON body as a record. Raises InvalidRequest, DeadlineExceeded, HTTP 413 or 415."""
    if request.content_type != "application/json":
        # Also what keeps a web page from posting here: such a request needs a preflight, which nobody answers.
        raise web.HTTPUnsupportedMediaType(text=f"send application/json, not {request.content_type}")
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            raw = await request.read()
    except TimeoutError as error:
        raise DeadlineExceeded(f"the body did not arrive within {BODY_SECONDS_MAX:g} s") from error
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"body: {error}") from error
