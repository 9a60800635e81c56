"""Models over REST: whose KV is stored, and forgetting all of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from aiohttp import web

from .errors import NotFound
from .model_clearing import Scope, Selection, cleared, selected
from .problems import query, reply
from .service import Service
from .spec import GroupKind, KVSpec


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """KV of one spec. `page_format` is empty for canonical KV; `unnamed` are documents that no user has named.

    `resident_bytes` counts copies by tier, shared ones once; without HBM.
    """

    model: str
    fingerprint: str
    page_format: str
    dtype: str
    adapter: str
    bytes_per_token: int
    documents: int
    unnamed: int
    resident_bytes: dict[str, int]


class ClearQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose, which, and whether to do it."""

    tenant: str | None = None
    scope: Scope = Scope.ALL
    dry_run: bool = False


class ClearView(msgspec.Struct, frozen=True, kw_only=True):
    """How many documents went, or would go, and how many cannot; of those the first, with the reason."""

    state: str
    deleted: int
    kept_count: int
    kept: dict[str, str]


@dataclass(slots=True)
class _Tally:
    documents: int = 0
    unnamed: int = 0


class ModelRoutes:
    """The handlers. `must_be_ready` raises while the daemon starts or drains."""

    def __init__(self, service: Service, must_be_ready: Callable[[], None]) -> None:
        self.service = service
        self.must_be_ready = must_be_ready

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        return [web.get("/v1/models", self.show), web.delete("/v1/models/{model}", self.clear)]

    async def show(self, request: web.Request) -> web.Response:
        """Every spec that a document has, those of one model together. Objects are listed by /v1/objects."""
        state = self.service.state
        tallies: dict[bytes, _Tally] = {}
        for name, record in state.documents.items():
            tally = tallies.setdefault(record.document.fingerprint, _Tally())
            tally.documents += name.namespace is None
            tally.unnamed += name.namespace is not None
        sizes: dict[bytes, dict[str, int]] = {}
        for held in state.extents.values():
            by_tier = sizes.setdefault(held.extent.fingerprint, {})
            for copy in held.placements():
                by_tier[copy.tier.label] = by_tier.get(copy.tier.label, 0) + copy.size_bytes
        views = [
            _view(state.specs[fingerprint], tally, sizes.get(fingerprint, {}))
            for fingerprint, tally in tallies.items()
            if state.specs[fingerprint].groups[0].kind is not GroupKind.OPAQUE
        ]
        return reply({"models": sorted(views, key=lambda view: (view.model, view.page_format, view.fingerprint))})

    async def clear(self, request: web.Request) -> web.Response:
        """Forget all that was stored for a model, or for one spec of it (by its fingerprint)."""
        self.must_be_ready()
        model, wanted = request.match_info["model"], query(request, ClearQuery)
        specs = self.service.state.specs
        exact = frozenset(fingerprint for fingerprint in specs if fingerprint.hex() == model)
        if not exact and all(spec.model != model for spec in specs.values()):
            raise NotFound(f"no KV of a model {model!r} is known; GET /v1/models, or `holdfast model ls`, names them")
        chosen = Selection(model=None if exact else model, fingerprints=exact, tenant=wanted.tenant, scope=wanted.scope)
        if wanted.dry_run:
            count = len(selected(self.service, chosen))
            return reply(ClearView(state="planned", deleted=count, kept_count=0, kept={}))
        found = await cleared(self.service, chosen)
        kept = {str(name): why for name, why in found.kept.items()}
        return reply(ClearView(state="done", deleted=found.deleted, kept_count=found.kept_count, kept=kept))


def _view(spec: KVSpec, tally: _Tally, sizes: dict[str, int]) -> ModelView:
    return ModelView(
        model=spec.model,
        fingerprint=spec.fingerprint().hex(),
        page_format=spec.page_format,
        dtype=spec.dtype,
        adapter=spec.adapter,
        bytes_per_token=spec.bytes_per_token,
        documents=tally.documents,
        unnamed=tally.unnamed,
        resident_bytes=sizes,
    )
