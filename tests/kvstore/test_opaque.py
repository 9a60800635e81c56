"""Opaque objects as values: size classes, specs, ids, what one is worth."""

import pytest
from holdfast.kvstore.document import DocumentId
from holdfast.kvstore.errors import DocumentTooLarge, EmptyDocument, InvalidName, InvalidSpec
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.opaque import (
    CLASSES_PER_OCTAVE,
    OBJECT_BYTES_MAX,
    OBJECT_KEY_MAX,
    checked_namespace,
    class_bytes,
    is_opaque,
    object_extent_id,
    object_id,
    object_key,
    opaque_spec,
    prefilled,
    rounded,
    worth_tokens,
)
from holdfast.kvstore.spec import GroupKind, KVSpec, LayerGroup
from hypothesis import given
from hypothesis import strategies as st

from fakes import tiny_spec

PAGE = 4096
SECRET = bytes(range(32))


@given(st.integers(1, OBJECT_BYTES_MAX))
def test_a_class_takes_its_objects_in_whole_pages_with_little_padding(size_bytes):
    taken = class_bytes(size_bytes)
    assert taken >= size_bytes
    assert taken % PAGE == 0
    pages = -(-size_bytes // PAGE)
    assert (taken // PAGE - pages) * CLASSES_PER_OCTAVE < pages
    assert class_bytes(taken) == taken


@given(st.integers(1, OBJECT_BYTES_MAX), st.integers(1, OBJECT_BYTES_MAX))
def test_classes_are_in_the_order_of_sizes(one, other):
    assert (class_bytes(one) <= class_bytes(other)) or one > other


def test_there_are_few_classes():
    classes = {rounded(pages) for pages in range(1, 1 << 14)}
    assert len(classes) <= CLASSES_PER_OCTAVE * 14
    assert {1 << power for power in range(14)} <= classes, "powers of two are padded"


def test_no_class_takes_nothing_or_too_much():
    with pytest.raises(EmptyDocument):
        class_bytes(0)
    with pytest.raises(DocumentTooLarge):
        class_bytes(OBJECT_BYTES_MAX + 1)


@given(st.integers(1, 1 << 26))
def test_a_spec_is_one_plane_of_a_class(size_bytes):
    spec, fingerprint = opaque_spec("ns", size_bytes, 0)
    assert fingerprint == spec.fingerprint()
    geometry = extent_geometry(spec)
    assert is_opaque(spec)
    assert geometry.plane_count == 1
    assert geometry.size_bytes == spec.extent_tokens == class_bytes(size_bytes)


def test_specs_of_namespaces_sizes_and_worths_differ_and_no_more():
    same = opaque_spec("ns", 5000, 256)[1]
    assert opaque_spec("ns", 8192, 256)[1] == same
    others = [opaque_spec("other", 5000, 256), opaque_spec("ns", 9000, 256), opaque_spec("ns", 5000, 0)]
    assert same not in {fingerprint for _, fingerprint in others}
    assert not is_opaque(tiny_spec())


def test_opaque_bytes_stand_alone():
    opaque = LayerGroup(kind=GroupKind.OPAQUE, layers=(0,), kv_heads=1, key_dim=1, value_dim=0)
    beside = LayerGroup(layers=(1,), kv_heads=1, key_dim=8, value_dim=8)
    with pytest.raises(InvalidSpec, match="beside"):
        KVSpec(groups=(opaque, beside), dtype="float32", model="m", vocabulary_size=1, extent_blocks=1)


def test_bytes_are_never_taken_for_tokens():
    assert worth_tokens(opaque_spec("ns", 1 << 20, 256)[0], 1 << 20) == 256
    unsaid, _ = opaque_spec("ns", 1 << 20, 0)
    assert worth_tokens(unsaid, 1 << 20) == 8
    assert worth_tokens(unsaid, 1) == 1
    assert prefilled(unsaid, 0, 1 << 20) == (0, 8)
    assert prefilled(tiny_spec(), 32, 64) == (32, 64)


@given(st.binary(min_size=1, max_size=OBJECT_KEY_MAX))
def test_a_key_is_in_its_documents_name(key):
    document = object_id("t", "ns", key)
    assert (document.tenant, document.namespace, object_key(document)) == ("t", "ns", key)
    assert document.family == "t/ns"


@pytest.mark.parametrize("key", [b"", bytes(OBJECT_KEY_MAX + 1)])
def test_what_is_no_key(key):
    with pytest.raises(InvalidName):
        object_id("t", "ns", key)


@pytest.mark.parametrize("namespace", ["", "a/b", "..", "prompt", " a", "x" * 256])
def test_what_is_no_namespace(namespace):
    with pytest.raises(InvalidName):
        checked_namespace(namespace)


def test_a_name_of_a_user_is_in_no_namespace():
    assert DocumentId("t", "report").namespace is None
    assert DocumentId("t", "report").family == "t"


def test_extent_ids_tell_all_that_differs():
    document = object_id("t", "ns", b"key")
    first = object_extent_id(document, None, SECRET)
    others = {
        object_extent_id(object_id("t", "other", b"key"), None, SECRET),
        object_extent_id(object_id("t", "ns", b"kez"), None, SECRET),
        object_extent_id(document, first, SECRET),
        object_extent_id(document, None, bytes(32)),
        object_extent_id(document, None, SECRET, 1),
    }
    assert len(others) == 5
    assert first not in others
    assert first == object_extent_id(document, None, SECRET)
