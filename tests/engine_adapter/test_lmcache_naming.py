"""Names of LMCache's objects: told apart by all that matters, and read back."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from holdfast.engine_adapter.lmcache import naming
from holdfast.engine_adapter.lmcache.naming import Shard
from holdfast.kvstore.document import checked_name
from hypothesis import given
from hypothesis import strategies as st

MODELS = st.text("abcXYZ019/-_.", min_size=1, max_size=60)
SALTS = st.text(st.characters(codec="utf-8", exclude_characters="@/\\\0"), max_size=128)
HASHES = st.binary(min_size=4, max_size=32)
SHARDS = st.builds(Shard, MODELS, st.integers(0, 2**32 - 1), st.integers(0, 300))


def key(chunk_hash=b"\1" * 32, model="llama/8b", kv_rank=0x01000100, group=0, salt=""):
    return SimpleNamespace(
        chunk_hash=chunk_hash, model_name=model, kv_rank=kv_rank, object_group_id=group, cache_salt=salt
    )


@given(SHARDS, SHARDS)
def test_a_namespace_says_which_shard_it_holds(one, other):
    name = naming.namespace_of(one, "bf16")
    checked_name(name)
    assert naming.shard_in(name) == one
    assert (name == naming.namespace_of(other, "bf16")) == (one == other)


def test_other_namespaces_are_nobodys():
    assert naming.shard_in("vllm-llama-0123456789abcdef") is None
    assert naming.shard_in("lmcache-x") is None


def test_what_changes_the_bytes_changes_the_namespace():
    shard = Shard("llama", 0, 0)
    forms = [naming.form_of([(2, 4, 256, 64)], [dtype]) for dtype in ("torch.bfloat16", "torch.float16")]
    forms += [naming.form_of([(2, 4, 128, 128)], ["torch.bfloat16"])]
    names = {naming.namespace_of(shard, form, qualifier) for form in forms for qualifier in ("", "fp8")}
    assert len(names) == 6


def test_other_weights_in_the_same_directory_are_another_model(tmp_path):
    shard = Shard(str(tmp_path), 0, 0)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = naming.namespace_of(shard, "bf16")
    assert naming.namespace_of(shard, "bf16") == before
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    naming.weights_of.cache_clear()  # LMCache's server was started again
    assert naming.namespace_of(shard, "bf16") != before


@given(HASHES, SALTS, HASHES, SALTS)
def test_keys_are_told_apart_and_read_back(one_hash, one_salt, other_hash, other_salt):
    one, other = naming.key_of(key(one_hash, salt=one_salt)), naming.key_of(key(other_hash, salt=other_salt))
    assert (one == other) == ((one_hash, one_salt) == (other_hash, other_salt))
    assert 1 <= len(one) <= 128
    assert one.startswith(naming.salt_prefix(one_salt))
    if len(one_salt.encode()) <= naming.SALT_MAX:
        assert naming.salt_and_hash(one) == (one_salt, one_hash)
    else:
        assert naming.salt_and_hash(one) is None


def test_keys_are_the_same_in_every_process():
    assert naming.key_of(key(bytes(range(4)), salt="alice")).hex() == b"alice@\0\1\2\3".hex()
    assert naming.namespace_of(Shard("hub/llama", 0x01000100, 0), "bf16") == (
        "lmcache-hub@llama-01000100-0-" + naming.namespace_of(Shard("hub/llama", 0x01000100, 0), "bf16")[-16:]
    )


@pytest.mark.parametrize(("shape", "dtype", "packed"), [((9,), "torch.uint8", True), ((2, 9), "torch.uint8", False)])
def test_bytes_of_a_codec_are_known(shape, dtype, packed):
    assert naming.is_packed(naming.form_of([shape], [dtype])) is packed
