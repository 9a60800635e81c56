import json

import pytest
from holdfast.kvstore.errors import InvalidSpec
from holdfast.ring_attention.tokenizer import ByteTokenizer, load_tokenizer


def test_bytes_are_tokens():
    """UTF-8 in, the same text out; what is no text becomes the replacement character."""
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode(tokenizer.encode("Größe ∞")) == "Größe ∞"
    assert tokenizer.decode([0xFF]) == "\ufffd"


def test_tokenizer_json_is_used_when_there_is_one(tmp_path):
    """A word-level tokenizer.json, read by the tokenizers library."""
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"ray": 0, "light": 1, "?": 2}, "unk_token": "?"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path, 3)
    assert tokenizer.encode("light ray") == [1, 0]
    assert tokenizer.decode([1, 0]) == "light ray"


def test_without_a_tokenizer_only_bytes_fit(tmp_path):
    """A vocabulary of 256 is bytes; any other needs a tokenizer.json."""
    assert isinstance(load_tokenizer(tmp_path, 256), ByteTokenizer)
    with pytest.raises(InvalidSpec, match="32000"):
        load_tokenizer(tmp_path, 32_000)
