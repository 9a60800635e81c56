import json

import pytest
import torch
from holdfast.kvstore.errors import InvalidSpec
from holdfast.ring_attention.checkpoint import load_model
from holdfast.ring_attention.config import parse_config
from holdfast.ring_attention.identity import digest_of, read_config, spec_of
from holdfast.ring_attention.local import run_ranks
from holdfast.ring_attention.rope import frequencies
from holdfast.ring_attention.runner import ContextParallelRunner
from holdfast.ring_attention.weight_share import share_of
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_helpers import tokens_of
from runner_helpers import prefilled_shard
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
WINDOWED = {"use_sliding_window": True, "sliding_window": 40}
MIXED = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "llama-bias": (LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama-rope3": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=LLAMA3, max_position_embeddings=256)),
    "llama-linear": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=LINEAR, head_dim=24)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32)),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True)),
    "mistral-window": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=24)),
    "mistral-wide": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=400)),
    "mistral-narrow": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=1)),
    "qwen2-mixed": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, **WINDOWED, layer_types=MIXED)),
    "qwen2-late": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, **WINDOWED, max_window_layers=1)),
    "qwen3-mixed": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, **WINDOWED, head_dim=32, layer_types=MIXED)),
}
# (query heads, kv heads, head dim): MHA, MQA and GQA with odd groups
HEADS = [(4, 4, 32), (4, 1, 64), (6, 2, 80), (3, 1, 96), (8, 4, 128), (2, 1, 256)]
TOKENS = tokens_of(150, vocabulary=96)


def randomised(kind):
    """A model whose biases and norms are not the zeros and ones they start as."""
    return made(*MODELS[kind])


def made(make, config):
    torch.manual_seed(0)
    model = make(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def logits_of(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


@pytest.mark.parametrize("kind", MODELS)
def test_logits_equal_transformers(kind, tmp_path):
    """Dense logits within 1e-4 of the library's own forward pass, windows included."""
    theirs = randomised(kind)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours.dense_logits(TOKENS, len(TOKENS)) - logits_of(theirs)).abs().max() < 1e-4


QUESTION = TOKENS[:5]


def group_answers(directory, cp, tp, count):
    """The greedy answer to QUESTION over TOKENS by every rank of a group of threads."""

    def rank(communicator):
        runner = ContextParallelRunner(load_model(directory, tp=tp, tp_rank=communicator.rank % tp), communicator)
        return runner.answer(prefilled_shard(runner, TOKENS), QUESTION, count)

    return run_ranks(cp * tp, rank)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("cp", "tp"), [(2, 1), (2, 2)])
def test_answers_of_groups_equal_transformers(kind, cp, tp, tmp_path):
    """Prefilled in chunks and answered greedily: the library's own tokens, and its logits within 1e-4."""
    theirs = randomised(kind)
    theirs.save_pretrained(tmp_path)
    all_answers = group_answers(tmp_path, cp, tp, 4)
    answer = all_answers[0]
    assert all(other.tokens == answer.tokens for other in all_answers)
    expected = logits_of(theirs, [*TOKENS, *QUESTION, *answer.tokens[:-1]])[-4:]
    assert (answer.logits - expected).abs().max() < 1e-4
    assert answer.tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_head_counts_and_dims(heads, kv_heads, head_dim, tmp_path):
    """MHA, MQA, GQA, dims of 32 to 256: an answer over three shards."""
    shape = SHAPE | {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 1,
        "hidden_size": 96,
    }
    theirs = made(LlamaForCausalLM, LlamaConfig(**shape, head_dim=head_dim))
    theirs.save_pretrained(tmp_path)
    answer = group_answers(tmp_path, 3, 1, 2)[0]
    expected = logits_of(theirs, [*TOKENS, *QUESTION, answer.tokens[0]])[-2:]
    assert (answer.logits - expected).abs().max() < 1e-4


def group_logits(directory, tp):
    """Logits [T, V] of TOKENS by every rank of a tensor-parallel group of threads."""
    ids, positions = torch.tensor(TOKENS), torch.arange(len(TOKENS))

    def rank(communicator):
        model = load_model(directory, tp=tp, tp_rank=communicator.rank)
        assert model.spec == load_model(directory).spec
        with torch.inference_mode():
            return model.logits(model.hidden(ids, positions, model._dense_attention, communicator.all_reduce))

    return run_ranks(tp, rank)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_ranks_compute_the_same_model(kind, tp, tmp_path):
    """Each rank its heads and columns, with more ranks than kv heads too: within 1e-4 of the library's logits."""
    theirs = randomised(kind)
    theirs.save_pretrained(tmp_path)
    logits = group_logits(tmp_path, tp)
    assert all(torch.equal(logits[0], other) for other in logits)
    expected = logits_of(theirs)
    assert (logits[0] - expected).abs().max() < 1e-4
    assert torch.equal(logits[0].argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama-bias", "mistral-window", "qwen2-mixed", "qwen3"])
def test_half_precision_is_as_near_to_the_truth_as_transformers(kind, dtype, tmp_path):
    """The truth: the same rounded weights in float32. All round after each step, but in unlike places.

    Equal bits are not to be had (a sum over ranks rounds once more), and a fixed distance would have to grow with
    depth; so the squared error may be a quarter larger than the library's own.
    """
    randomised(kind).to(dtype).save_pretrained(tmp_path)  # and read again: `to` rounded the rotary frequencies, too
    true_model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    their_model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    truth, theirs = logits_of(true_model), logits_of(their_model)
    allowed = 1.25 * (theirs - truth).square().mean()
    assert (load_model(tmp_path).dense_logits(TOKENS, len(TOKENS)) - truth).square().mean() < allowed
    assert (group_logits(tmp_path, 2)[0] - truth).square().mean() < allowed
    # An answer has few rows, so chance has a larger part in it.
    answer = group_answers(tmp_path, 2, 2, 24)[0]
    text = [*TOKENS, *QUESTION, *answer.tokens[:-1]]
    truth, theirs = (logits_of(model, text)[-24:] for model in (true_model, their_model))
    assert (answer.logits - truth).square().mean() < 1.5 * (theirs - truth).square().mean()


@pytest.mark.parametrize(("tp", "tp_rank"), [(3, 0), (8, 0), (0, 0), (2, 2)])
def test_a_degree_that_does_not_divide_is_refused_with_those_that_do(tp, tp_rank, tmp_path):
    """4 heads, 2 kv heads: 1, 2 or 4 ranks."""
    randomised("llama").save_pretrained(tmp_path)
    with pytest.raises(InvalidSpec, match="use a tp of 1, 2, 4"):
        load_model(tmp_path, tp=tp, tp_rank=tp_rank)


def test_a_sharded_checkpoint_is_the_same_model(tmp_path):
    """Several weight files behind an index read as one; the digest covers each of them."""
    theirs = randomised("llama")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 1
    whole, sharded = load_model(tmp_path / "whole"), load_model(tmp_path / "parts")
    assert torch.equal(whole.dense_logits(TOKENS, 3), sharded.dense_logits(TOKENS, 3))

    before = digest_of(tmp_path / "parts")
    content = bytearray(parts[-1].read_bytes())
    content[-1] ^= 1
    parts[-1].write_bytes(content)
    assert digest_of(tmp_path / "parts") != before
    parts[-1].unlink()
    with pytest.raises(InvalidSpec, match=parts[-1].name):
        load_model(tmp_path / "parts")


def test_the_spec_names_the_model(tmp_path):
    """Shape, dtype and digest of the checkpoint; other weights or another adapter are another spec."""
    randomised("qwen3").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    group = model.spec.groups[0]
    assert (group.layers, group.kv_heads, group.key_dim, group.value_dim) == ((0, 1), 2, 32, 32)
    assert model.spec.model == digest_of(tmp_path)
    assert model.spec.dtype == "float32"
    config = read_config(tmp_path)
    prints = {spec_of(config, *names).fingerprint() for names in [("a",), ("b",), ("a", "lora")]}
    assert len(prints) == 3


def test_configs_of_older_transformers_are_read():
    """rope_theta and rope_scaling at the top, torch_dtype, `type` for `rope_type`."""
    raw = json.loads(MODELS["llama"][1].to_json_string(use_diff=False))
    del raw["rope_parameters"]
    raw |= {"architectures": ["LlamaForCausalLM"], "dtype": None, "torch_dtype": "bfloat16", "rope_theta": 5000.0}
    raw["rope_scaling"] = {"type": "linear", "factor": 4.0}
    config = parse_config(raw)
    assert config.dtype == "bfloat16"
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (5000.0, "linear", 4.0)
    assert frequencies(config.rope, 16)[0] == 0.25


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "none"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window 0"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8, "layer_types": MIXED}, "sliding_attention"),
        ({"use_sliding_window": True, "sliding_window": 128}, "sliding_window 128 in Llama"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": MIXED}, "sliding_window None"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]}, "with 2 layers"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"dtype": "float64"}, "float64"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "3 kv heads"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_named(change, named):
    """An InvalidSpec says which part of config.json is the trouble."""
    raw = json.loads(MODELS["llama"][1].to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(InvalidSpec, match=named):
        parse_config(raw | change)


FIELDS = sorted(
    {name for make, config in MODELS.values() for name in config.to_dict()}
    | {"rope_theta", "rope_scaling", "partial_rotary_factor", "quantization_config", "architectures", "torch_dtype"}
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.sampled_from(["", "llama3", "linear"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*LLAMA3, "type"]), inner, max_size=4)
    ),
    max_leaves=5,
)


@given(st.sampled_from(sorted(MODELS)), st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2))
@settings(deadline=None, max_examples=200)
def test_any_config_is_read_or_refused(kind, change):
    """Whatever the file says: a config of sound numbers, or an InvalidSpec."""
    make, config = MODELS[kind]
    raw = config.to_dict() | {"architectures": [make.__name__], "dtype": "float32"}
    try:
        config = parse_config(raw | change)
    except InvalidSpec:
        return
    assert len(config.windows) == config.layers
    assert frequencies(config.rope, config.head_dim).shape == (config.head_dim // 2,)
    share_of(config, 1, 0)


def test_missing_files_and_unknown_tensors_are_named(tmp_path):
    """No config, no weights, not JSON, a tensor too many."""
    with pytest.raises(InvalidSpec, match="does not exist"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidSpec, match="not JSON"):
        load_model(tmp_path)
    model = randomised("qwen3")
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(InvalidSpec, match="k_norm"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidSpec, match=r"model\.safetensors"):
        load_model(tmp_path)


def test_damaged_files_are_named(tmp_path):
    """A truncated weight file, an index that names nothing, a tensor of another shape than config.json says."""
    randomised("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-8], content[:100], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(InvalidSpec, match=r"model\.safetensors cannot be read.*fetch or copy"):
            load_model(tmp_path)
    weights.write_bytes(content)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"intermediate_size": 100}))
    with pytest.raises(InvalidSpec, match=r"gate_proj.weight' has shape \[112, 64\].*says \[100, 64\]"):
        load_model(tmp_path)
    weights.unlink()
    for index in ({}, {"weight_map": []}, {"weight_map": {"a": 1}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InvalidSpec, match="weight_map"):
            load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(InvalidSpec, match=r"lacks weight files: b\.safetensors"):
        load_model(tmp_path)


def test_loading_tells_how_far_it_is(tmp_path):
    """Bytes hashed, then elements loaded: both end at their whole, for a rank that reads a part as well."""
    randomised("qwen2").save_pretrained(tmp_path, max_shard_size="60KB")
    for tp in (1, 2):
        seen = []
        load_model(tmp_path, tp=tp, progress=lambda *told, seen=seen: seen.append(told))
        hashed, loaded = ([told[1:] for told in seen if told[0] == stage] for stage in ("hashed", "loaded"))
        assert len(hashed) + len(loaded) == len(seen)
        for steps in (hashed, loaded):
            assert len(steps) > 5
            assert steps == sorted(steps)
            assert steps[-1][0] == steps[-1][1]


def test_a_rank_keeps_its_share_of_the_weights(tmp_path):
    """Heads and columns are dealt out; embedding, head and norms are everybody's."""
    randomised("llama").save_pretrained(tmp_path)

    def kept(model):
        storages = {}
        for layer in model._layers:
            for tensor in (*layer.query_key_value, *layer.output, *layer.gate_up, *layer.down):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    elements = 2 * ((4 + 2 + 2) * 16 * 64 + 4 * 16 * 64 + 3 * 112 * 64)
    assert kept(load_model(tmp_path, tp=2, tp_rank=1)) == 4 * elements // 2


def test_the_ends_of_an_answer_are_read(tmp_path):
    """From generation_config.json, else from config.json; one, several or none. No part of the model's identity."""
    for raw, generation, expected in [
        ({}, None, ()),
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [2, 3]}, {}, (2, 3)),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 7]}, (5, 7)),
        ({"eos_token_id": None}, {"eos_token_id": 5}, (5,)),
    ]:
        config = MODELS["qwen2"][1].to_dict() | {"architectures": ["Qwen2ForCausalLM"], "dtype": "float32"}
        del config["eos_token_id"]
        (tmp_path / "config.json").write_text(json.dumps(config | raw))
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        assert read_config(tmp_path).eos == expected


def test_windows_are_read_as_transformers_reads_them(tmp_path):
    """Layer by layer; a model with another window is another model."""
    windows = {
        "mistral": (None, None),
        "mistral-window": (24, 24),
        "qwen2": (None, None),
        "qwen2-mixed": (40, None),
        "qwen2-late": (None, 40),
        "qwen3-mixed": (40, None),
        "llama": (None, None),
    }
    for kind, expected in windows.items():
        raw = MODELS[kind][1].to_dict() | {"architectures": [MODELS[kind][0].__name__], "dtype": "float32"}
        assert parse_config(raw).windows == expected
    qwen = json.loads(MODELS["qwen2-late"][1].to_json_string(use_diff=False)) | {"architectures": ["Qwen2ForCausalLM"]}
    del qwen["layer_types"]
    assert parse_config(qwen).windows == (None, 40)
    mistral = {**SHAPE, "architectures": ["MistralForCausalLM"]}
    assert parse_config(mistral).windows == (4096, 4096)
    randomised("mistral-window").save_pretrained(tmp_path)
    first = load_model(tmp_path).spec.fingerprint()
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"sliding_window": 25}))
    assert load_model(tmp_path).spec.fingerprint() != first
