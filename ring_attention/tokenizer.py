"""Tokenizers: bytes for models with a vocabulary of 256, tokenizer.json for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ..kvstore.errors import InvalidSpec, MissingExtra

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

BYTE_VOCABULARY: Final = 256


class Tokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; what is not text becomes U+FFFD."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte."""

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """See Tokenizer."""
        return bytes(tokens).decode(errors="replace")


class JsonTokenizer:
    """A Hugging Face tokenizer.json."""

    def __init__(self, path: Path) -> None:
        """Raises MissingExtra when `tokenizers` is not installed."""
        try:
            from tokenizers import Tokenizer as RustTokenizer
        except ImportError as error:
            raise MissingExtra("tokenizer.json needs tokenizers: pip install 'holdfast[runner]'") from error
        self._tokenizer: RustTokenizer = RustTokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """See Tokenizer."""
        return str(self._tokenizer.decode(list(tokens)))


def load_tokenizer(directory: Path, vocabulary_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint: its tokenizer.json, else bytes. Raises InvalidSpec."""
    path = directory / "tokenizer.json"
    if path.exists():
        return JsonTokenizer(path)
    if vocabulary_size != BYTE_VOCABULARY:
        raise InvalidSpec(f"{directory} has no tokenizer.json, and its vocabulary is {vocabulary_size}, not 256")
    return ByteTokenizer()
