"""What an engine's KV is called: everything that changes it, and nothing that does not; and what is refused."""

import os
from dataclasses import replace
from types import SimpleNamespace as Plain

import pytest
from holdfast.engine_adapter.checkpoint_identity import checkpoint_spec
from holdfast.engine_adapter.vllm.describe import describe
from holdfast.engine_adapter.vllm.identity import CacheGroup, Engine, ready
from holdfast.engine_adapter.vllm.settings import Settings
from holdfast.kvstore.errors import ConfigError
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.synthetic import write_checkpoint

CONFIG = ModelConfig(
    vocabulary_size=64,
    hidden_size=32,
    intermediate_size=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=32,
    dtype="bfloat16",
)
GROUP = CacheGroup(kind="full", layers=(0, 1), block_tokens=32, heads=1, key_dim=32, value_dim=32)

SIZES = (
    "pipeline_parallel_size",
    "tensor_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, CONFIG)
    return directory


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))


@pytest.fixture
def engine(checkpoint):
    return Engine(
        model=str(checkpoint),
        dtype="bfloat16",
        vocabulary_size=64,
        groups=(GROUP,),
        format_name="vllm-cpu-vec/1",
        backend="CPU_ATTN vec",
        overrides={},
    )


def found(engine, model=None, accept="verified"):
    return ready(engine, model=model, accept=accept)


def test_a_checkpoint_in_a_directory_is_the_runners(engine, checkpoint):
    one = found(engine)
    assert one.canonical
    assert one.spec.page_format == "vllm-cpu-vec/1:tokens=32"
    assert one.spec.canonical() == checkpoint_spec(checkpoint)


DIFFERENT = {
    "quantised": {"quantisation": "fp8"},
    "overrides": {"overrides": {"rope_theta": 5.0}},
    "part": {"rank": 0, "ranks": 2},
    "other part": {"rank": 1, "ranks": 2},
    "block size": {"groups": (replace(GROUP, block_tokens=64),)},
    "dtype": {"dtype": "float16"},
    "media": {"media": {"mm_processor_kwargs": {"max_pixels": 9}}},
    "rope": {"rope_type": "dynamic", "max_tokens": 4096},
    "length": {"rope_type": "dynamic", "max_tokens": 8192},
}


def test_whatever_changes_kv_changes_the_fingerprint(engine):
    made = [engine, *(replace(engine, **changed) for changed in DIFFERENT.values())]
    fingerprints = [found(one).spec.fingerprint() for one in made]
    fingerprints += [found(engine, model="other").spec.fingerprint()]
    assert len(set(fingerprints)) == len(fingerprints)


def test_only_what_others_make_as_well_is_canonical(engine):
    canonical = {name for name, changed in DIFFERENT.items() if found(replace(engine, **changed)).canonical}
    assert canonical == {"block size", "dtype"}


def test_the_engines_length_changes_nothing_where_the_rope_does_not_depend_on_it(engine):
    assert found(engine) == found(replace(engine, max_tokens=99))


def test_layers_of_several_groups_are_one_model(engine):
    """As the runner has them; the shortest window is known."""
    even = replace(GROUP, layers=(0,))
    odd = replace(GROUP, layers=(1,), kind="sliding", window=128)
    one = found(replace(engine, groups=(even, odd)))
    assert one.spec == found(engine).spec
    assert one.canonical
    assert one.window == 128


def test_hub_models_are_named_by_their_users(engine):
    hub = replace(engine, model="somebody/model")
    assert "holdfast.model" in found(hub).reason
    named = found(hub, model="somebody/model@abc")
    assert named.spec.model == "somebody/model@abc"
    assert not named.canonical


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"overrides": None}, "hf_overrides"),
        ({"format_name": None}, "laid out"),
        ({"dtype": "uint8"}, "dtype"),
        ({"refusals": ("because",)}, "because"),
        ({"groups": (replace(GROUP, kind="MambaSpec"),)}, "MambaSpec"),
        ({"groups": (GROUP, replace(GROUP, layers=(2,), heads=2))}, "different shapes"),
        ({"format_name": "vllm-flash-nhd/1"}, "never compared"),
    ],
)
def test_what_cannot_be_told_or_served_is_refused_with_a_reason(engine, changed, reason):
    refused = found(replace(engine, **changed))
    assert refused.spec is None
    assert reason in refused.reason


def test_pages_that_nobody_else_can_read_are_kept_for_engines_of_their_kind(engine):
    one = found(replace(engine, format_name="vllm-cpu-amx/1"))
    assert one.spec.page_format == "vllm-cpu-amx/1:tokens=32"
    assert not one.canonical


def test_unverified_formats_are_taken_when_asked_for(engine):
    assert found(replace(engine, format_name="vllm-flash-nhd/1"), accept="any").spec is not None


# Settings --------------------------------------------------------------------------------------


def test_settings_are_checked_when_the_engine_starts():
    extra = {"holdfast.tenant": "me", "holdfast.load_seconds": 3, "holdfast.store": False, "other.key": object()}
    assert Settings.of(extra) == Settings(tenant="me", load_seconds=3.0, store=False)
    assert Settings.of({}) == Settings()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sockets", "x"),
        ("store", 1),
        ("load_seconds", "1"),
        ("load_seconds", 0),
        ("tenant", None),
        ("write_policy", "x"),
    ],
)
def test_what_means_nothing_is_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        Settings.of({f"holdfast.{key}": value})


def vllm_config(load_format="auto", hf_config_path=None):
    """As much of a VllmConfig as is looked at where there are no layers."""
    parallel = dict.fromkeys(SIZES, 1)
    return Plain(
        model_config=Plain(
            model="/m",
            hf_config_path=hf_config_path,
            hf_text_config=Plain(),
            hf_overrides={},
            quantization=None,
            max_model_len=99,
            runner_type="generate",
            get_vocab_size=lambda: 999,
        ),
        parallel_config=Plain(rank=0, **parallel),
        load_config=Plain(load_format=load_format),
        cache_config=Plain(cache_dtype="auto"),
        speculative_config=None,
    )


@pytest.mark.parametrize(
    ("given", "why"),
    [({}, None), ({"load_format": "dummy"}, "made up"), ({"hf_config_path": "/other"}, "/other")],
    ids=["whole", "weights", "config"],
)
def test_weights_that_are_made_up_and_a_config_from_elsewhere_are_not_the_checkpoints(given, why):
    engine, _ = describe(vllm_config(**given), Plain(kv_cache_groups=[], num_blocks=9, kv_cache_layout=None), {})
    assert len(engine.refusals) == (why is not None)
    assert why is None or why in engine.refusals[0]
