"""Growth: a document becomes longer under its name, as a conversation does. Its versions share all full extents.

Whoever reads the version before keeps reading it. The catalog names one version; until it has heard of the new one,
the last extents of the one that it names stay the document's, so that a crash in between leaves that one whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .document import Document
from .extent import ExtentId, cut
from .keys import NO_EXTRAS, ROOT, Extras, Tokens, block_keys
from .spec import KVSpec
from .state import DocumentRecord, ShardKey
from .store import Store


def continues(
    known: Document, tokens: Tokens, keys: Sequence[bytes], spec: KVSpec, secret: bytes, extras: Extras = NO_EXTRAS
) -> bool:
    """Whether these tokens, whose block keys these are, begin with all tokens of the document, and are more."""
    count = known.token_count
    if known.fingerprint != spec.fingerprint() or count >= len(tokens):
        return False
    whole = count // spec.block_tokens
    front = list(keys[:whole])
    rest = tokens[whole * spec.block_tokens : count]
    front += block_keys(rest, spec, secret, front[-1] if front else ROOT, extras, whole)
    return tuple(extent.id for extent in cut(front, count, spec, known.id.tenant)) == known.extents


def may_continue(known: Document, document: Document, spec: KVSpec) -> bool:
    """The same as far as the extents' names tell: those that are full are the first of the longer document's."""
    groups = len(spec.groups)
    if known.fingerprint != document.fingerprint or known.token_count >= document.token_count:
        return False
    full = known.token_count // spec.extent_tokens
    ours, theirs = len(known.extents) // groups, len(document.extents) // groups
    return all(
        known.extents[group * ours : group * ours + full] == document.extents[group * theirs : group * theirs + full]
        for group in range(groups)
    )


def superseded(known: DocumentRecord, document: Document) -> tuple[ExtentId, ...]:
    """Extents of the version that the catalog has, or may be about to have, and that the new version is without."""
    named = known.document.extents if known.durable or not known.volatile else ()
    kept = set(document.extents)
    return tuple(extent for extent in (*known.before, *named) if extent not in kept)


def replaced(store: Store, known: DocumentRecord, document: Document) -> DocumentRecord:
    """The record of the next version, which has joined its extents, in the place of the one before."""
    before, count = superseded(known, document), known.use_count
    grown = DocumentRecord(document=document, told=known.told, before=before, use_count=count)
    store.records.documents[document.id] = grown
    kept = {*document.extents, *grown.before}
    _leave(store, document, [extent for extent in known.document.extents if extent not in kept])
    present = ShardKey(document.id, document.token_count)
    versions = [shard for shard in store.records.shards() if shard.document == document.id]
    store.records.retired += [s for s in versions if s.key != present and s not in store.records.retired]
    return grown


def cataloged(store: Store, owner: DocumentRecord) -> None:
    """The catalog has this version: nothing of an earlier one is needed any more."""
    if store.records.documents.get(owner.document.id) is owner:
        before, owner.before = owner.before, ()
        _leave(store, owner.document, before)


def _leave(store: Store, document: Document, extents: Iterable[ExtentId]) -> None:
    for extent in extents:
        record = store.records.extents[extent]
        record.leave(document.id)
        store.reap(record)


def close_retired(store: Store) -> None:
    """Free the rows of earlier versions that nobody reads any more."""
    waiting, store.records.retired = store.records.retired, []
    for shard in waiting:
        if any(copy.holds for copy in shard.copies.values()):
            store.records.retired.append(shard)
        elif shard.copies:  # else its group is gone
            store.close_shard(shard)
