"""Tokenizers: bytes for models with a vocabulary of 256, tokenizer.json for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ..kvstore.errors import InvalidSpec, MissingExtra
from .identity import FETCH_AGAIN

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

BYTE_VOCABULARY: Final = 256


class Tokenizer(Protocol):
    """Text to token ids and back.

    No special tokens are added and no chat template is applied: a document and a question are continued as they stand.
    """

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. What reads like a special token in it becomes that token."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special ones; what is not text becomes U+FFFD."""
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
        """Raises MissingExtra when `tokenizers` is not installed, InvalidSpec for a file that it cannot read."""
        try:
            from tokenizers import Tokenizer as RustTokenizer
        except ImportError as error:
            raise MissingExtra("tokenizer.json needs tokenizers: pip install 'holdfast[runner]'") from error
        try:
            self._tokenizer: RustTokenizer = RustTokenizer.from_file(str(path))
        except Exception as error:
            raise InvalidSpec(f"{path} cannot be read as a tokenizer ({error}); {FETCH_AGAIN}") from error

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """See Tokenizer."""
        return str(self._tokenizer.decode(list(tokens)))


def load_tokenizer(directory: Path, vocabulary_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint with that vocabulary: its tokenizer.json, else bytes. Raises InvalidSpec."""
    path = directory / "tokenizer.json"
    if path.exists():
        found = JsonTokenizer(path)
        if found.vocabulary_size > vocabulary_size:
            raise InvalidSpec(
                f"{path} makes token ids up to {found.vocabulary_size - 1}, and the model knows {vocabulary_size} "
                "tokens: use the tokenizer that the model was trained with"
            )
        return found
    if vocabulary_size != BYTE_VOCABULARY:
        raise InvalidSpec(
            f"{directory} has no tokenizer.json, and its vocabulary is {vocabulary_size}, not 256 (bytes): copy the "
            "model's tokenizer.json there; transformers' AutoTokenizer.save_pretrained makes one of older formats"
        )
    return ByteTokenizer()
