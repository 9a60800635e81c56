"""Object routes: namespaces of opaque objects over REST. Keys are hexadecimal there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from aiohttp import web

from .claims import Pin, PinKind, Refresh
from .errors import HoldfastError, InvalidRequest
from .object_requests import Answered, cleared
from .object_views import NamespaceView, namespace_views
from .problems import body, query, reply, told
from .residency import Tier
from .service import Service

T = TypeVar("T")
DEFAULT_PIN_SECONDS: Final = 3600.0  # a pin has an end unless told otherwise
KEYS_MAX: Final = 1000

Note = Annotated[str, msgspec.Meta(max_length=255)]
HexKeys = Annotated[list[str], msgspec.Meta(min_length=1, max_length=KEYS_MAX)]


class NamespacesQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose."""

    tenant: str | None = None


class NamespacesView(msgspec.Struct, frozen=True, kw_only=True):
    """Namespaces that have objects, by tenant and name."""

    namespaces: list[NamespaceView]


class ChosenRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Objects of these keys, or all whose keys begin so; all of the namespace where neither is said."""

    keys: HexKeys | None = None
    key_prefix: str | None = None


class PinObjectsRequest(ChosenRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pin objects: all that are meant, or none. See PinRequest."""

    tier: Literal["ddr", "nvme"] = "ddr"
    ttl_seconds: float | None = DEFAULT_PIN_SECONDS
    owner: Note = ""
    reason: Note = ""
    kind: PinKind = PinKind.HARD
    refresh: Refresh = Refresh.NEVER


class CountedView(msgspec.Struct, frozen=True, kw_only=True):
    """How many objects were pinned, unpinned or deleted, and the bytes of their slots where that is known."""

    objects: int
    size_bytes: int | None = None


class ObjectRoutes:
    """The handlers. `must_be_ready` raises while the daemon cannot serve."""

    def __init__(self, service: Service, must_be_ready: Callable[[], None]) -> None:
        self.service = service
        self.must_be_ready = must_be_ready

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        name = "/v1/objects/{tenant:[^/]+}/{namespace:[^/]+}"
        return [
            web.get("/v1/objects", self.namespaces),
            web.get(name, self.namespace),
            web.delete(name, self.clear),
            web.post(f"{name}/pin", self.pin),
            web.post(f"{name}/unpin", self.unpin),
        ]

    async def namespaces(self, request: web.Request) -> web.Response:
        """Namespaces that have objects."""
        return reply(
            NamespacesView(namespaces=await namespace_views(self.service, query(request, NamespacesQuery).tenant))
        )

    async def namespace(self, request: web.Request) -> web.Response:
        """One of them, whether it has any or not."""
        return reply((await namespace_views(self.service, *_named(request)))[0])

    async def clear(self, request: web.Request) -> web.Response:
        """Forget its objects; answered when the catalog has. What is leased, pinned or being stored stays."""
        self.must_be_ready()
        return reply(CountedView(objects=await cleared(_heard, self.service.objects, *_named(request))))

    async def pin(self, request: web.Request) -> web.Response:
        """Pin objects, or replace their pins; answered when the catalog has them."""
        self.must_be_ready()
        objects, wanted = self.service.objects, await body(request, PinObjectsRequest)
        documents = objects.chosen(*_named(request), *_chosen(wanted))
        floor = Tier[wanted.tier.upper()]
        pins: list[Pin] = []
        await told(
            lambda done: pins.extend(
                objects.pin(
                    documents,
                    floor,
                    wanted.ttl_seconds,
                    wanted.owner,
                    wanted.reason,
                    wanted.kind,
                    wanted.refresh,
                    done,
                )
            )
        )
        return reply(_counted(pins))

    async def unpin(self, request: web.Request) -> web.Response:
        """End pins of objects; answered when the catalog has forgotten them."""
        self.must_be_ready()
        objects, wanted = self.service.objects, await body(request, ChosenRequest)
        documents = objects.chosen(*_named(request), *_chosen(wanted))
        pins: list[Pin] = []
        await told(lambda done: pins.extend(objects.unpin(documents, done)))
        return reply(_counted(pins))


def _named(request: web.Request) -> tuple[str, str]:
    return request.match_info["tenant"], request.match_info["namespace"]


def _chosen(wanted: ChosenRequest) -> tuple[list[bytes] | None, bytes | None]:
    try:
        keys = None if wanted.keys is None else [bytes.fromhex(key) for key in wanted.keys]
        return keys, None if wanted.key_prefix is None else bytes.fromhex(wanted.key_prefix)
    except ValueError as error:
        raise InvalidRequest(f"keys are bytes in hexadecimal: {error}") from error


def _counted(pins: list[Pin]) -> CountedView:
    return CountedView(objects=len(pins), size_bytes=sum(pin.size_bytes for pin in pins))


async def _heard(start: Callable[[Answered[T]], object], late: Callable[[T], None] | None = None) -> T:
    """What a command's callback hears; nothing is granted that would have to be undone."""
    assert late is None
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def done(result: T | HoldfastError) -> None:
        if future.done():
            return
        if isinstance(result, HoldfastError):
            future.set_exception(result)
        else:
            future.set_result(result)

    start(done)
    return await future
