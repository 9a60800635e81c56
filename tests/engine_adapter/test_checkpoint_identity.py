"""A checkpoint's identity: the runner's own spec, the weights read once, and again whenever a file may have changed."""

import json
import os
import threading
from dataclasses import replace

import pytest
from holdfast.engine_adapter import checkpoint_identity
from holdfast.engine_adapter.checkpoint_identity import checkpoint_digest, checkpoint_spec, model_spec
from holdfast.engine_adapter.namespaces import model_identity
from holdfast.kvstore.errors import InvalidSpec
from holdfast.ring_attention.checkpoint import load_model
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.synthetic import raw_config, write_checkpoint

CONFIG = ModelConfig(
    vocabulary_size=64, hidden_size=32, intermediate_size=32, layers=2, heads=4, kv_heads=2, head_dim=8
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint_identity, "SETTLED_NS", 0)
    return tmp_path / "cache" / "holdfast" / "checkpoints.json"


@pytest.fixture
def model(tmp_path):
    write_checkpoint(tmp_path / "model", CONFIG)
    return tmp_path / "model"


@pytest.fixture
def reads(monkeypatch):
    """The directories whose weights were read."""
    found = []
    inner = checkpoint_identity.digest_of
    monkeypatch.setattr(checkpoint_identity, "digest_of", lambda path: (found.append(path), inner(path))[1])
    return found


def test_it_is_the_runners_spec(model):
    assert checkpoint_spec(model) == load_model(model).spec
    assert checkpoint_spec(str(model)).fingerprint() == checkpoint_spec(model, "float32").fingerprint()
    assert checkpoint_spec(model, "bfloat16").dtype == "bfloat16"
    assert checkpoint_spec(model, "bfloat16").extent_blocks == 2 * checkpoint_spec(model).extent_blocks


def test_the_weights_are_read_once(model, reads, cache):
    first = checkpoint_spec(model)
    assert checkpoint_spec(model) == checkpoint_spec(model.parent / "model" / ".") == first
    assert reads == [model]
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def changed_weights(model):
    write_checkpoint(model, CONFIG, seed=1)


def changed_config(model):
    path = model / "config.json"
    path.write_text(path.read_text() + " ")


def same_size_and_time(model):
    """As `rsync --times` or a careless restore does: only ctime and the inode tell."""
    path = model / "model.safetensors"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [changed_weights, changed_config, same_size_and_time])
def test_a_changed_file_is_read_again(model, reads, change):
    before = checkpoint_spec(model)
    change(model)
    after = checkpoint_spec(model)
    assert len(reads) == 2
    assert after.model != before.model
    assert after == load_model(model).spec


def test_what_was_written_a_moment_ago_is_not_remembered(model, reads, monkeypatch):
    """Its clock may tick too coarsely to show the next change."""
    monkeypatch.setattr(checkpoint_identity, "SETTLED_NS", 10**18)
    assert checkpoint_spec(model) == checkpoint_spec(model)
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_refused(model, monkeypatch):
    inner = checkpoint_identity.digest_of
    monkeypatch.setattr(checkpoint_identity, "digest_of", lambda path: (inner(path), changed_weights(path))[0])
    with pytest.raises(InvalidSpec, match="changed while"):
        checkpoint_spec(model)


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"\xff" * 9, b'{"x": 1}', b'{"x": {"digest": "y"}}', b"[" * 100_000],
)
def test_a_damaged_memory_is_ignored_and_replaced(model, reads, cache, damage):
    expected = checkpoint_spec(model)
    cache.write_bytes(damage)
    assert checkpoint_spec(model) == checkpoint_spec(model) == expected
    assert len(reads) == 2


def test_a_digest_that_is_none_is_not_believed(model, cache):
    expected = checkpoint_spec(model)
    entries = json.loads(cache.read_text())
    for entry in entries.values():
        entry["digest"] = "../x"
    cache.write_text(json.dumps(entries))
    assert checkpoint_spec(model) == expected


def test_without_a_place_to_remember_it_works(model, monkeypatch, cache, reads):
    cache.parent.parent.write_text("a file where the directory should be")
    assert checkpoint_spec(model) == checkpoint_spec(model)
    monkeypatch.setattr(checkpoint_identity, "_memory", lambda: None)
    checkpoint_spec(model)
    assert len(reads) == 3


def test_the_memory_is_bounded(tmp_path, monkeypatch, cache, reads):
    monkeypatch.setattr(checkpoint_identity, "REMEMBERED_MAX", 2)
    for seed in (0, 1, 2):
        write_checkpoint(tmp_path / str(seed), CONFIG, seed=seed)
        checkpoint_digest(tmp_path / str(seed))
    assert len(json.loads(cache.read_text())) == 2
    checkpoint_digest(tmp_path / "2")
    checkpoint_digest(tmp_path / "0")
    assert [path.name for path in reads] == ["0", "1", "2", "0"]


def test_those_who_ask_at_once_read_it_once(model, reads):
    threads = [threading.Thread(target=checkpoint_spec, args=(model,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert reads == [model]


UNKNOWN = {**raw_config(CONFIG), "architectures": ["NovelForCausalLM"], "hidden_act": "gelu"}


def test_a_model_that_the_runner_does_not_know_has_a_spec_by_its_generic_fields(model):
    (model / "config.json").write_text(json.dumps(UNKNOWN))
    spec = checkpoint_spec(model)
    assert spec == replace(model_spec(raw_config(CONFIG), checkpoint_digest(model)), rope="")
    nested = {"architectures": ["SeeingModel"], "text_config": raw_config(CONFIG)}
    assert replace(model_spec(nested, "x"), model=spec.model) == spec
    heads = {name: value for name, value in UNKNOWN.items() if name not in ("num_key_value_heads", "head_dim")}
    assert model_spec(heads, "x").groups[0].kv_heads == 4


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"head_dim": None, "hidden_size": None}, "head_dim"),
        ({"kv_lora_rank": 512}, "latents"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ],
)
def test_a_config_that_does_not_tell_its_kv_is_refused(fields, named):
    with pytest.raises(InvalidSpec, match=named) as refused:
        model_spec({**UNKNOWN, **fields}, "x")
    assert "NovelForCausalLM" in refused.value.message


def test_what_is_no_checkpoint_is_refused(tmp_path, model):
    with pytest.raises(InvalidSpec, match="no directory"):
        checkpoint_spec("organisation/model")
    with pytest.raises(InvalidSpec, match=r"config\.json"):
        checkpoint_spec(tmp_path)
    with pytest.raises(InvalidSpec, match="int3"):
        checkpoint_spec(model, "int3")
    (model / "model.safetensors").unlink()
    with pytest.raises(InvalidSpec, match="neither"):
        checkpoint_spec(model)


def test_weights_that_cannot_be_read_are_no_checkpoint_and_end_no_engine(model):
    weights = next(model.glob("*.safetensors"))
    weights.unlink()
    weights.mkdir()  # whoever runs the tests may read everything
    with pytest.raises(InvalidSpec, match=f"{weights.name} cannot be read|{model} cannot be read"):
        checkpoint_digest(model)
    assert model_identity(str(model)) != str(model)  # SGLang starts, and tells these weights from others by their files
