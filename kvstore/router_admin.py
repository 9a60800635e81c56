"""Router lookup over REST: how much of a prompt is here, how near, and what it would take: for routers that choose.

A router asks every daemon that it knows, sends the prompt where most of it is, and never needs our keys: they are made
of the tenant's secret. Looking leases nothing, and eviction learns nothing from it.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import numpy as np
from aiohttp import web

from .errors import InvalidRequest, NotFound
from .extent import extent_count
from .geometry import extent_geometry
from .keying import keys_of, sent_tokens
from .keys import Tokens
from .ledger import Hop
from .opaque import is_opaque
from .prefix import Prefix
from .prefix_wire import EXTRA_BYTES_MAX, EXTRAS_MAX
from .problems import body, reply
from .residency import Tier
from .service import NS, Service
from .spec import KVSpec

BODY_BYTES_MAX: Final = 64 << 20  # a few million tokens
DEFAULT_TENANT: Final = "default"

Part = Annotated[bytes, msgspec.Meta(max_length=EXTRA_BYTES_MAX)]


class LookupRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt: `tokens`, or `token_data` (base64 of little-endian uint32), which is quicker for long ones.

    `model` is the model's identity, or the fingerprint of one spec, as /v1/models shows them. `extras` are what KV
    depends on besides tokens: [block index, base64].
    """

    model: str
    tenant: str = DEFAULT_TENANT
    tokens: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]] | None = None
    token_data: bytes | None = None
    extras: Annotated[list[tuple[int, Part]], msgspec.Meta(max_length=EXTRAS_MAX)] = []


class LookupView(msgspec.Struct, frozen=True, kw_only=True):
    """The longest prefix that is here, of all specs of the model.

    `tier_tokens`: how many of its tokens are nearest in which tier. `load_seconds` is predicted for bringing it to DDR,
    `recompute_seconds` for computing it instead. `bypassed`: it is here, and nobody gets it (see `holdfast bypass`).
    """

    token_count: int
    tier_tokens: dict[str, int]
    fingerprint: str
    page_format: str
    block_tokens: int
    load_seconds: float
    recompute_seconds: float
    bypassed: bool


class RouterRoutes:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> list[web.RouteDef]:
        """Every route."""
        return [web.post("/v1/lookup", self.lookup)]

    async def lookup(self, request: web.Request) -> web.Response:
        """See LookupView."""
        wanted = await body(request.clone(client_max_size=BODY_BYTES_MAX), LookupRequest)
        tokens = _tokens(wanted)
        found: tuple[Prefix, KVSpec] | None = None
        for spec in self._specs(wanted.model):
            fingerprint = spec.fingerprint()
            keys = await keys_of(self.service, wanted.tenant, fingerprint, tokens, dict(wanted.extras))
            prefix = self.service.lookup(wanted.tenant, fingerprint, b"".join(keys))
            if found is None or prefix.token_count > found[0].token_count:
                found = prefix, spec
        assert found is not None, "an unknown model is refused"
        return reply(self._view(*found))

    def _specs(self, model: str) -> list[KVSpec]:
        """What the model's KV is stored as. Raises NotFound."""
        specs = self.service.state.specs
        found = [spec for name, spec in specs.items() if model in (spec.model, name.hex()) and not is_opaque(spec)]
        if not found:
            raise NotFound(f"no KV of a model {model!r} is known; GET /v1/models names them")
        return found

    def _view(self, prefix: Prefix, spec: KVSpec) -> LookupView:
        bypassed = self.service.state.bypass is not None
        prices = self.service.planner
        far = prefix.tiers.get(Tier.NVME, 0)
        move_bytes = max(extent_geometry(spec, group).size_bytes for group in range(len(spec.groups)))
        size_bytes = extent_count(far, spec) * move_bytes
        curve = prices.prefills.curve(spec.fingerprint())
        return LookupView(
            token_count=0 if bypassed else prefix.token_count,
            tier_tokens={} if bypassed else {tier.label: count for tier, count in prefix.tiers.items()},
            fingerprint=spec.fingerprint().hex(),
            page_format=spec.page_format,
            block_tokens=spec.block_tokens,
            load_seconds=prices.predicted_ns({Hop(Tier.NVME, Tier.DDR): size_bytes}, move_bytes) / NS,
            recompute_seconds=curve.marginal_prefill_ns(0, prefix.token_count) / NS,
            bypassed=bypassed,
        )


def _tokens(wanted: LookupRequest) -> Tokens:
    """The prompt. Raises InvalidRequest."""
    if (wanted.tokens is None) == (wanted.token_data is None):
        raise InvalidRequest("say `tokens` or `token_data`")
    if wanted.token_data is None:
        return np.array(wanted.tokens, dtype=np.uint32)
    return sent_tokens(wanted.token_data)
