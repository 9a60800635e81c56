import json

import pytest
import tokenizers
from holdfast.kvstore.errors import InvalidSpec
from holdfast.ring_attention.text_stream import TextStream
from holdfast.ring_attention.tokenizer import ByteTokenizer, load_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st


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


def test_a_tokenizer_that_does_not_suit_the_model_is_refused(tmp_path):
    """One that makes ids which the model has no embedding for, added tokens included; and a file that is none."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    size = load_tokenizer(tmp_path, 10_000).vocabulary_size
    assert load_tokenizer(tmp_path, size).decode([size - 1]) == ""
    with pytest.raises(InvalidSpec, match=f"up to {size - 1}.*knows {size - 1} tokens"):
        load_tokenizer(tmp_path, size - 1)
    for damaged in ("{", '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(InvalidSpec, match=r"tokenizer\.json cannot be read"):
            load_tokenizer(tmp_path, 10_000)


def test_no_special_tokens_are_added(tmp_path):
    """Not even where tokenizer.json asks for them; those written in the text are taken for what they are."""
    made = byte_level()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<end> $A <end>", special_tokens=[("<end>", made.token_to_id("<end>"))]
    )
    assert made.encode("ray").tokens[0] == "<end>"
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    tokenizer = load_tokenizer(tmp_path, 10_000)
    assert tokenizer.decode(tokenizer.encode("ray")) == "ray"
    assert made.token_to_id("<end>") not in tokenizer.encode("ray")
    assert tokenizer.encode("ray<end>")[-1] == made.token_to_id("<end>")


TEXT = "Größe ∞, lumière, 光の屈折, радуга, 🌈👩‍🔬 and  two spaces.\n\tA tab; \ufffd itself."


def byte_level():
    """A byte-level BPE, as GPT-2's and Llama 3's, so small that it splits characters."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    made.add_special_tokens(["<added>"])
    return made


def byte_fallback():
    """A BPE with a space before the first word and bytes for what it does not know, as Llama 2's."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyzAG", "é"]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.add_special_tokens(["<s>"])
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


class Held:
    """A tokenizers.Tokenizer as ours."""

    def __init__(self, made):
        self._made = made

    def decode(self, tokens):
        return self._made.decode(list(tokens))


BYTE_LEVEL = Held(byte_level())
KINDS = {"bytes": None, "byte_level": byte_level, "byte_fallback": byte_fallback}


def of_kind(kind, directory):
    if KINDS[kind] is not None:
        KINDS[kind]().save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory, 10_000 if KINDS[kind] else 256)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return of_kind(request.param, tmp_path_factory.mktemp(request.param))


def streamed(tokenizer, tokens):
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in tokens), stream.flush()]


def test_a_stream_tells_characters_when_they_are_whole(tokenizer):
    """Of text in many scripts no half character is told, and each as soon as its last token has come."""
    tokens = tokenizer.encode(TEXT)
    pieces = streamed(tokenizer, tokens)
    assert "" in pieces[:-1]  # some characters took several tokens
    assert "".join(pieces) == TEXT
    for count in range(len(tokens)):
        certain = tokenizer.decode(tokens[: count + 1]).rstrip("\ufffd")
        assert "".join(pieces[: count + 1]).startswith(certain)


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=150)
def test_a_stream_tells_any_text(tokenizer, text):
    """Joined, what was told is the text."""
    assert "".join(streamed(tokenizer, tokenizer.encode(text))) == tokenizer.decode(tokenizer.encode(text))


@given(st.lists(st.one_of(st.integers(0, 255), st.integers(0x80, 0xFF)), max_size=24))
@settings(deadline=None, max_examples=300)
def test_a_stream_tells_any_tokens_of_bytes(tokens):
    """A model may make bytes that are no text: what was told is what a decoder makes of them all."""
    assert "".join(streamed(ByteTokenizer(), tokens)) == ByteTokenizer().decode(tokens)


@given(st.lists(st.integers(0, 256), max_size=24))
@settings(deadline=None, max_examples=300)
def test_a_stream_tells_any_tokens_of_byte_level_bpe(tokens):
    """The same for pieces of several bytes, special tokens among them."""
    assert "".join(streamed(BYTE_LEVEL, tokens)) == BYTE_LEVEL.decode(tokens)


def test_endless_garbage_is_told_as_it_comes():
    """What cannot become a character is not kept back for ever."""
    pieces = streamed(ByteTokenizer(), [0xFF] * 40)
    assert pieces[:3] == ["", "", ""]
    assert set(pieces[3:-1]) == {"\ufffd"}
    assert "".join(pieces) == "\ufffd" * 40


def test_a_space_behind_a_special_token_is_told(tmp_path):
    """What has no text leaves the context as it was: else the decoder would drop the space, as at a beginning."""
    tokenizer = of_kind("byte_fallback", tmp_path)
    tokens = tokenizer.encode("ray<s>light")  # the normaliser sets a space before each part
    assert tokenizer.decode(tokens) == "ray light"
    assert "".join(streamed(tokenizer, tokens)) == "ray light"


def test_a_stream_can_be_used_again():
    """After flush it knows nothing of what was before."""
    stream = TextStream(ByteTokenizer())
    assert [stream.push(token) for token in "é".encode()[:1]] == [""]
    assert stream.flush() == "\ufffd"
    assert [stream.push(token) for token in "é".encode()] == ["", "é"]
    assert stream.flush() == ""
