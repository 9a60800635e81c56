"""What a spec refuses, and that its fingerprint sees everything."""

from dataclasses import fields, replace

import pytest
from holdfast.kvstore.errors import InvalidSpec
from holdfast.kvstore.spec import GroupKind, KVSpec, LayerGroup, sized

GROUP = LayerGroup(layers=(0, 1), kv_heads=2, key_dim=8, value_dim=8)
SPEC = KVSpec(groups=(GROUP,), dtype="float32", model="m@1", vocabulary_size=100, extent_blocks=4)
OTHER = {
    "groups": (replace(GROUP, kv_heads=4),),
    "dtype": "float16",
    "model": "m@2",
    "vocabulary_size": 101,
    "rope": "theta=1e6",
    "adapter": "lora",
    "quantisation": "k8",
    "page_format": "pages/1:tokens=64",
    "block_tokens": 16,
    "extent_blocks": 8,
}


@pytest.mark.parametrize("field", [field.name for field in fields(KVSpec)])
def test_the_fingerprint_sees_every_field(field):
    """Two models that differ in anything never share KV."""
    other = replace(SPEC, **{field: OTHER[field]})
    assert other.fingerprint() != SPEC.fingerprint()
    assert len(other.fingerprint()) == 16
    assert replace(SPEC).fingerprint() == SPEC.fingerprint()


GROUP_CHANGES = [
    {"kind": GroupKind.SLIDING, "window": 8},
    {"layers": (0, 2)},
    {"key_dim": 16},
    {"value_dim": 16},
    {"kind": GroupKind.MLA, "value_dim": 0},
]


@pytest.mark.parametrize("change", GROUP_CHANGES)
def test_the_fingerprint_sees_every_field_of_a_group(change):
    """The shape of the layers is part of the model's identity."""
    assert replace(SPEC, groups=(replace(GROUP, **change),)).fingerprint() != SPEC.fingerprint()


BAD = [
    {"dtype": "int3"},
    {"groups": ()},
    {"model": ""},
    {"vocabulary_size": 0},
    {"page_format": "a" * 129},
    {"page_format": "a\n"},
    {"page_format": "a", "groups": (replace(GROUP, kind=GroupKind.OPAQUE),)},
    {"block_tokens": 0},
    {"extent_blocks": 0},
    {"extent_blocks": 3},
    {"groups": (GROUP, GROUP)},
    {"groups": (replace(GROUP, kv_heads=0),)},
    {"groups": (replace(GROUP, key_dim=-1),)},
    {"groups": (replace(GROUP, value_dim=0),)},
    {"groups": (replace(GROUP, layers=()),)},
    {"groups": (replace(GROUP, window=8),)},
    {"groups": (replace(GROUP, kind=GroupKind.SLIDING),)},
    {"groups": (replace(GROUP, kind=GroupKind.SLIDING, window=0),)},
]


@pytest.mark.parametrize("change", BAD)
def test_impossible_specs_are_refused(change):
    """A spec that describes no KV never comes into being."""
    with pytest.raises(InvalidSpec):
        replace(SPEC, **change)


@pytest.mark.parametrize("target_bytes", [1, 1 << 14, 100_000, 8 << 20])
def test_sizing_aims_at_the_target(target_bytes):
    """As many blocks, in powers of two, as fit the target in the largest group, and at least one."""
    large = replace(GROUP, layers=(2, 3, 4), kv_heads=4)
    made = sized(replace(SPEC, groups=(GROUP, large)), target_bytes)
    block_bytes = 64 * 3 * 4 * 16 * 4
    assert made.extent_blocks == 1 or made.extent_blocks * block_bytes <= target_bytes
    assert 2 * made.extent_blocks * block_bytes > target_bytes
    assert made.extent_tokens == 64 * made.extent_blocks


def test_bytes_per_token_sums_the_groups():
    """Layers x heads x (key + value) x element size, over all groups."""
    latent = LayerGroup(kind=GroupKind.MLA, layers=(2,), kv_heads=1, key_dim=576, value_dim=0)
    assert replace(SPEC, groups=(GROUP, latent)).bytes_per_token == (2 * 2 * 16 + 576) * 4


@pytest.mark.parametrize(("page_tokens", "target_bytes"), [(16, 1), (48, 1 << 20), (96, 8 << 20)])
def test_native_and_canonical_specs_of_one_model_have_one_canonical_form(page_tokens, target_bytes):
    """Whatever the pages' and the extents' sizes, and only for the same model."""
    native = sized(replace(SPEC, page_format="pages/1", block_tokens=page_tokens), target_bytes)
    assert native.canonical() == SPEC.canonical() == sized(SPEC)
    assert native.fingerprint() != native.canonical().fingerprint()
    assert replace(native, model="m@2").canonical() != SPEC.canonical()
    assert native.bytes_per_token == SPEC.bytes_per_token
