"""Drafting: what an ingest is to make: which document, of which extents, what of it is there, who has which tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .attach import prefill_layout
from .document import Document, DocumentId, WritePolicy, checked_name, prompt_id, ttl_ns_of
from .errors import NoCapacity
from .extent import cut
from .growth import continues
from .ingest import Ingests
from .ingesting import Ingest
from .keys import Extras, Tokens, block_keys, document_tokens
from .layout import Layout, chunked, zigzag
from .sections import LimitsConfig
from .spec import KVSpec


class Drafts:
    """Reads state. `secret` gives a tenant's key secret."""

    def __init__(self, ingests: Ingests, limits: LimitsConfig, secret: Callable[[str], bytes]) -> None:
        self._ingests = ingests
        self._store = ingests.store
        self._state = ingests.store.records
        self._limits = limits
        self._secret = secret

    def draft(
        self,
        client: int,
        document: DocumentId,
        spec: KVSpec,
        tokens: Tokens,
        write_policy: WritePolicy,
        group: str | None,
        chunk_tokens: int,
        keys: Sequence[bytes],
        layout: Layout | None,
        ttl_seconds: float | None,
        extras: Extras,
    ) -> Ingest:
        """An ingest that has not begun. See Service.begin_ingest, which raises the same."""
        tokens, secret = document_tokens(tokens, spec), self._secret(document.tenant)
        keys = keys or block_keys(tokens, spec, secret, extras=extras)
        document = self._named(document, keys)
        extents = cut(keys, len(tokens), spec, document.tenant)
        missing = tuple(extent for extent in extents if not self._ingests.present(extent))
        cached = min((extent.start for extent in missing), default=len(tokens))  # in front of any layer group's first
        placed = None
        if group is not None:
            seats = self._state.group(group)
            made = layout or chunked(zigzag(cached, seats.cp, seats.tp), len(tokens), chunk_tokens)
            placed = prefill_layout(self._state, group, spec, len(tokens), made)
        known = self._state.documents.get(document)
        grows = known is not None and continues(known.document, tokens, keys, spec, secret, extras)
        if known is not None and write_policy is WritePolicy.AUTO:
            write_policy = known.document.write_policy  # its owner named it before
        absorbs = self._state.prompts.continued(document, tokens, keys, spec, secret, extras)
        wall_ns = self._store.clock.wall_ns()
        return Ingest(
            id=self._store.new_id(),
            client=client,
            document=Document(
                id=document,
                fingerprint=spec.fingerprint(),
                token_count=len(tokens),
                extents=tuple(extent.id for extent in extents),
                write_policy=write_policy,
                created_wall_ns=max(wall_ns, known.document.created_wall_ns + 1 if known else 0),
            ),
            extents=extents,
            missing=missing,
            cached_tokens=cached,
            group=group,
            layout=placed,
            grows=grows,
            absorbs=tuple(absorbs) if document.namespace is not None else (),
            ttl_ns=ttl_ns_of(ttl_seconds),
            tokens=tokens if self._state.changes.are_followed else None,
        )

    def _named(self, document: DocumentId, keys: Sequence[bytes]) -> DocumentId:
        """Its name, or the one of an unnamed prefix. Raises InvalidName, or NoCapacity where there are too many."""
        documents = self._state.documents
        if document.name:
            checked_name(document.name)
            known, limit, what = documents.named, self._limits.documents, "documents exist; delete some"
        else:
            document = prompt_id(document.tenant, keys[-1])
            known, limit, what = documents.unnamed, self._limits.unnamed, "unnamed documents exist"
        if len(known) >= limit and document not in known:
            key = "unnamed" if document.namespace is not None else "documents"
            raise NoCapacity(f"limits.{key} = {limit} {what}")
        return document
