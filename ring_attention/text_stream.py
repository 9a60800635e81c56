"""TextStream: an answer's text while its tokens come.

A token need not be text: it may end within a character (bytes, byte-level BPE, byte fallback), and some decoders drop
a space from the front of whatever they are given. So tokens are decoded behind a few that were told before, and what
may still become a character is kept back.
"""

from __future__ import annotations

from typing import Final

from .tokenizer import Tokenizer

UNDECODED: Final = "\ufffd"
UNFINISHED_MAX: Final = 3  # bytes of a character without its last; byte fallback shows each as one U+FFFD


class TextStream:
    """Tokens in, text out: all that was told, joined, is the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # told already, and decoded again for what comes next
        self._fresh: list[int] = []
        self._told = 0  # characters of the fresh tokens' text

    def push(self, token: int) -> str:
        """The text that has become certain with this token; often it is empty."""
        self._fresh.append(token)
        text = self._text()
        kept_back = len(text) - len(text.rstrip(UNDECODED))
        told = self._tell(text[: len(text) - min(kept_back, UNFINISHED_MAX)])
        if text and not kept_back:
            self._context, self._fresh, self._told = self._fresh, [], 0
        return told

    def flush(self) -> str:
        """What was kept back, at the end; what is not text comes as U+FFFD. The stream begins anew."""
        told = self._tell(self._text())
        self._context, self._fresh, self._told = [], [], 0
        return told

    def _text(self) -> str:
        """Of the fresh tokens. Byte fallback takes back a character when bytes after it are no text: we cannot."""
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode([*self._context, *self._fresh])
        return text[len(before) :] if text.startswith(before) else self._tokenizer.decode(self._fresh)

    def _tell(self, certain: str) -> str:
        told = certain[self._told :]
        self._told = max(self._told, len(certain))
        return told
