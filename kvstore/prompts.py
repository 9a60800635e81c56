"""Prompts: unnamed prefixes by where they end, so that a longer one finds those that it continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from .document import PROMPT, Document, DocumentId, prompt_id
from .extent import Extent
from .fronts import Index
from .keys import KEY_BYTES, Extras, Tokens, block_keys
from .spec import KVSpec

CANDIDATES_MAX: Final = 64  # prompts that are compared: bounds what an ingest may take


class Prompts:
    """By the key of their last full block; those without one are not found."""

    def __init__(self) -> None:
        self._ends: Index[tuple[DocumentId, int]] = Index()  # with the tokens behind that block

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, document: Document, tail: Extent, spec: KVSpec) -> None:
        """Find it from now on, if it is an unnamed prefix; `tail` is its last extent."""
        key = _last_full(document, tail, spec)
        if key:
            self._ends.add(key, (document.id, document.token_count % spec.block_tokens))

    def discard(self, document: Document, tail: Extent, spec: KVSpec) -> None:
        """Find it no more."""
        key = _last_full(document, tail, spec)
        if key:
            self._ends.discard(key, (document.id, document.token_count % spec.block_tokens))

    def continued(
        self, document: DocumentId, tokens: Tokens, keys: Sequence[bytes], spec: KVSpec, secret: bytes, extras: Extras
    ) -> Iterator[DocumentId]:
        """Unnamed prefixes with which these tokens begin, all of them and their extra parts, to go on.

        `keys` are the tokens' block keys; `document` is their own name, which is none of these.
        """
        found = ((index, end) for index, key in enumerate(keys) if key in self._ends for end in self._ends.of(key))
        for index, (prompt, rest) in islice(found, CANDIDATES_MAX):
            key, start = keys[index], (index + 1) * spec.block_tokens
            if rest and start + rest < len(tokens):
                (key,) = block_keys(tokens[start : start + rest], spec, secret, key, extras, index + 1)
            if prompt == prompt_id(document.tenant, key) and prompt != document:
                yield prompt


def _last_full(document: Document, tail: Extent, spec: KVSpec) -> bytes:
    """The key of its last full block; empty where it has none, or where a restart has left none of it."""
    if document.id.namespace != PROMPT:
        return b""
    blocks = tail.valid_tokens // spec.block_tokens
    if blocks:
        return tail.block_keys[(blocks - 1) * KEY_BYTES : blocks * KEY_BYTES]
    return bytes.fromhex(tail.previous.partition(":")[0]) if tail.previous is not None else b""
