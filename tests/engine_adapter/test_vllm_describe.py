"""What is read of vLLM's configuration, by objects of its shape: tests/engines/vllm has the real ones."""

from types import SimpleNamespace

import pytest
import torch
from holdfast.engine_adapter.vllm.describe import describe
from holdfast.engine_adapter.vllm.identity import CacheGroup

BLOCKS = 9


class FullAttentionSpec(SimpleNamespace):
    block_size, num_kv_heads, head_size, head_size_v = 32, 2, 64, 64


class SlidingWindowSpec(FullAttentionSpec):
    sliding_window = 128


class MambaSpec(SimpleNamespace):
    block_size = 32


def layer(backend="CPU_ATTN", **given):
    return SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend), **given)


class Vllm:
    """A small model: `groups` are (spec, layer names)."""

    def __init__(self, *groups, **layers):
        groups = groups or ((FullAttentionSpec(), ["model.layers.0.attn", "model.layers.1.attn"]),)
        names = [name for _, group in groups for name in group]
        self.caches = {name: torch.zeros(BLOCKS, 2, 32, 128, dtype=torch.bfloat16) for name in names}
        self.cache_config = SimpleNamespace(
            num_blocks=BLOCKS,
            kv_cache_layout="LBHNC",
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=group) for spec, group in groups],
        )
        self.config = SimpleNamespace(
            model_config=SimpleNamespace(
                model="/models/m",
                quantization=None,
                hf_overrides={},
                hf_text_config=SimpleNamespace(rope_parameters={"rope_type": "llama3", "rope_theta": 1.0}),
                max_model_len=4096,
                runner_type="generate",
                hf_config_path=None,
                get_vocab_size=lambda: 1000,
            ),
            parallel_config=SimpleNamespace(
                rank=0,
                tensor_parallel_size=1,
                pipeline_parallel_size=1,
                decode_context_parallel_size=1,
                prefill_context_parallel_size=1,
            ),
            cache_config=SimpleNamespace(cache_dtype="auto"),
            load_config=SimpleNamespace(load_format="auto"),
            speculative_config=None,
            compilation_config=SimpleNamespace(
                static_forward_context={name: layer(**({"isa": "vec"} | layers)) for name in names}
            ),
        )

    def described(self):
        return describe(self.config, self.cache_config, self.caches)


def test_a_plain_model():
    engine, tensors = Vllm().described()
    assert engine.groups == (
        CacheGroup(kind="full", layers=(0, 1), block_tokens=32, heads=2, key_dim=64, value_dim=64),
    )
    assert (engine.format_name, engine.dtype, engine.vocabulary_size) == ("vllm-cpu-vec/1", "bfloat16", 1000)
    assert (engine.rope_type, engine.overrides, engine.quantisation, engine.refusals) == ("llama3", {}, "", ())
    assert {index: group for index, (group, _) in tensors.items()} == {0: 0, 1: 0}


def test_groups_have_tables_and_windows_of_their_own():
    vllm = Vllm((FullAttentionSpec(), ["layers.1.attn"]), (SlidingWindowSpec(), ["layers.0.attn"]))
    engine, tensors = vllm.described()
    assert [(group.kind, group.window) for group in engine.groups] == [("full", None), ("sliding", 128)]
    assert {index: group for index, (group, _) in tensors.items()} == {1: 0, 0: 1}


@pytest.mark.parametrize(
    ("given", "layout", "name"),
    [
        ({"isa": "vec16"}, "LBHNC", "vllm-cpu-vec/1"),
        ({"isa": "amx"}, "LBHNC", "vllm-cpu-amx/1"),
        ({"isa": "neon"}, "LBHNC", None),
        ({"backend": "FLASH_ATTN", "isa": ""}, "LBNHC", "vllm-flash-nhd/1"),
        ({"backend": "FLASH_ATTN", "isa": ""}, "LBHNC", "vllm-flash-hnd/1"),
        ({"backend": "FLASH_ATTN", "isa": ""}, "BHLNC", None),
        ({"backend": "FLASHINFER", "isa": ""}, "LBNHC", None),
    ],
)
def test_page_formats_are_those_of_backends(given, layout, name):
    vllm = Vllm(**given)
    vllm.cache_config.kv_cache_layout = layout
    assert vllm.described()[0].format_name == name


PICTURES = SimpleNamespace(
    language_model_only=False,
    mm_processor_cache_gb=4,
    mm_processor_kwargs=None,
    media_io_kwargs={},
    mm_encoder_attn_dtype=None,
    video_pruning_rate=None,
    video_pruning_method="evs",
)


@pytest.mark.parametrize(
    ("given", "media"),
    [
        ({}, {}),
        ({"mm_processor_kwargs": {"max_pixels": 9}}, {"mm_processor_kwargs": {"max_pixels": 9}}),
        ({"video_pruning_rate": 0.5}, {"video_pruning_rate": 0.5, "video_pruning_method": "evs"}),
    ],
)
def test_how_pictures_are_prepared_is_told_as_far_as_the_engine_was_told(given, media):
    """Hashes of pictures do not cover it."""
    vllm = Vllm()
    vllm.config.model_config.multimodal_config = SimpleNamespace(**vars(PICTURES) | given)
    engine, _ = vllm.described()
    assert (engine.media, engine.refusals) == (media, ())


@pytest.mark.parametrize(
    ("given", "caching", "refused"),
    [
        ({"mm_processor_cache_gb": 0}, False, True),
        ({"mm_processor_cache_gb": 0}, True, False),
        ({}, False, False),
        ({"mm_processor_cache_gb": 0, "language_model_only": True}, False, False),
    ],
)
def test_an_engine_that_numbers_its_pictures_is_refused(given, caching, refused):
    """Without its caches vLLM hashes none: in every engine the first picture has the first number."""
    vllm = Vllm()
    vllm.config.model_config.multimodal_config = SimpleNamespace(**vars(PICTURES) | given)
    vllm.config.cache_config.enable_prefix_caching = caching
    assert [bool("pictures" in text) for text in vllm.described()[0].refusals] == [True] * refused


def change(path, value):
    def apply(vllm):
        *way, last = path.split(".")
        target = vllm
        for step in way:
            target = getattr(target, step)
        setattr(target, last, value)

    return apply


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (change("config.parallel_config.pipeline_parallel_size", 2), "pipeline"),
        (change("config.parallel_config.decode_context_parallel_size", 2), "decode_context"),
        (change("config.speculative_config", SimpleNamespace(method="eagle")), "eagle"),
        (change("config.weight_transfer_config", SimpleNamespace()), "weights"),
        (change("config.load_config.load_format", "dummy"), "made up"),
        (change("config.model_config.hf_config_path", "/other"), "/other"),
        (change("config.model_config.runner_type", "pooling"), "pooling"),
        (change("config.cache_config.cache_dtype", "fp8"), "fp8"),
        (change("cache_config.num_blocks", 3), "block-size"),
        (lambda vllm: vllm.caches.popitem(), "elsewhere"),
        (lambda vllm: vllm.caches.update({"model.layers.1.attn": [torch.zeros(BLOCKS, 4)]}), "a state"),
    ],
)
def test_what_cannot_be_served_is_named(changed, reason):
    vllm = Vllm()
    changed(vllm)
    assert reason in " ".join(vllm.described()[0].refusals)


def test_layers_that_cannot_be_told_apart_are_refused():
    vllm = Vllm((FullAttentionSpec(), ["a.0.b.1.attn"]), (FullAttentionSpec(), ["layers.0.attn"]))
    assert "names" in vllm.described()[0].refusals[0]


def test_drafts_without_kv_overrides_that_are_functions_and_other_layers():
    vllm = Vllm((MambaSpec(), ["layers.0.mixer"]))
    vllm.config.speculative_config = SimpleNamespace(method="ngram")
    vllm.config.model_config.hf_overrides = lambda config: config
    vllm.config.parallel_config.tensor_parallel_size, vllm.config.parallel_config.rank = 2, 3
    engine, _ = vllm.described()
    assert engine.groups[0].kind == "MambaSpec"
    assert (engine.refusals, engine.overrides, engine.rank, engine.ranks) == ((), None, 1, 2)
