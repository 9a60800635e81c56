"""What a Transformers model is: its checkpoint as long as it is that, else its parameters; any change is noticed."""

import json
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from holdfast.engine_adapter.checkpoint_identity import checkpoint_spec
from holdfast.engine_adapter.transformers import model_identity, spec_of_model
from holdfast.kvstore.errors import InvalidRequest, InvalidSpec, MissingExtra
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.synthetic import write_checkpoint
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

CONFIG = ModelConfig(
    vocabulary_size=64, hidden_size=32, intermediate_size=32, layers=2, heads=4, kv_heads=2, head_dim=8
)
SHAPES = {
    "llama": CONFIG,
    "qwen3-bfloat16": replace(CONFIG, architecture="Qwen3ForCausalLM", dtype="bfloat16"),
    "qwen2-tied": replace(CONFIG, architecture="Qwen2ForCausalLM", tied_embeddings=True),
    "mistral-window": replace(CONFIG, architecture="MistralForCausalLM", window=24),
}


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def directory(tmp_path):
    write_checkpoint(tmp_path / "model", CONFIG)
    return tmp_path / "model"


@pytest.fixture
def model(directory):
    return load(directory)


@pytest.fixture
def readings(monkeypatch):
    """How often a model's weights were read."""
    found = []
    for name in ("_of_checkpoint", "_of_parameters"):
        inner = getattr(model_identity, name)
        monkeypatch.setattr(
            model_identity, name, lambda model, inner=inner, name=name: (found.append(name), inner(model))[1]
        )
    return found


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_loaded_model_is_its_checkpoint(shape, tmp_path):
    write_checkpoint(tmp_path / "model", SHAPES[shape])
    assert spec_of_model(load(tmp_path / "model")) == checkpoint_spec(tmp_path / "model")
    assert spec_of_model(load(tmp_path / "model", dtype=torch.float16)) == checkpoint_spec(
        tmp_path / "model", "float16"
    )


def test_its_weights_are_read_once(model, readings):
    assert spec_of_model(model) == spec_of_model(model)
    assert readings == ["_of_checkpoint"]


def trained(model):
    torch.nn.init.normal_(model.model.layers[0].self_attn.k_proj.weight)


def merged(model):
    """As PEFT merges a LoRA: through `.data`, which no version tells."""
    model.model.layers[1].mlp.up_proj.weight.data += 0.01 * torch.ones(32, 1) @ torch.ones(1, 32)


def replaced(model):
    model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone() * 2)


def cast(model):
    """Not the checkpoint in float16: the rotary frequencies are rounded, too."""
    model.half()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float16


def reconfigured(model):
    model.config.rms_norm_eps = 1e-3


def adapted(model):
    """As PEFT's layers are: a module in the module's place, with parameters and state of its own."""
    layer = model.model.layers[0].self_attn.q_proj
    layer.scaling = {"default": 2.0}
    layer.active_adapters = ["default"]
    layer.lora_A = torch.nn.Linear(32, 2, bias=False)


CHANGES = [trained, merged, replaced, cast, reconfigured, adapted]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_another_and_no_checkpoint(model, directory, change):
    before = spec_of_model(model)
    change(model)
    after = spec_of_model(model)
    assert before == checkpoint_spec(directory)
    assert after.model != before.model
    assert after == spec_of_model(model)


def test_an_adapter_counts_as_it_is_applied(model):
    adapted(model)
    layer = model.model.layers[0].self_attn.q_proj
    found = {spec_of_model(model).model}
    layer.active_adapters = ["other"]
    found.add(spec_of_model(model).model)
    layer.scaling = {"default": 1.0}
    found.add(spec_of_model(model).model)
    layer.disable_adapters = True
    found.add(spec_of_model(model).model)
    assert len(found) == 4


def test_what_was_loaded_otherwise_than_the_directory_says_is_not_it(directory):
    """The weights are the same; their meaning is not."""
    given = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    assert spec_of_model(load(directory, rope_parameters=given)).model != checkpoint_spec(directory).model


def test_a_directory_that_has_changed_since_is_not_the_model(model, directory):
    write_checkpoint(directory, CONFIG, seed=1)
    assert spec_of_model(model).model != checkpoint_spec(directory).model
    (directory / "config.json").unlink()
    assert spec_of_model(load_in_memory()).model != spec_of_model(model).model


def load_in_memory(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, **changes))


def test_a_model_in_memory_is_its_parameters_and_its_config():
    """Equal ones share, as a model does with itself in the next process."""
    spec = spec_of_model(load_in_memory())
    assert spec == spec_of_model(load_in_memory())
    others = [load_in_memory(1), load_in_memory(rms_norm_eps=1e-3), load_in_memory().to(torch.bfloat16)]
    assert len({spec.fingerprint(), *(spec_of_model(other).fingerprint() for other in others)}) == 4
    json.dumps(spec.model)


def test_other_architectures_are_told_by_the_usual_names_of_their_fields():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64))
    (group,) = spec_of_model(model).groups
    assert (len(group.layers), group.kv_heads, group.key_dim) == (3, 4, 8)


def test_what_cannot_be_told_is_refused(model):
    latent = load_in_memory()
    latent.config.kv_lora_rank = 8
    latent.config.architectures = ["DeepseekV3ForCausalLM"]
    with pytest.raises(InvalidSpec, match="latents"):
        spec_of_model(latent)
    with torch.device("meta"), pytest.raises(InvalidRequest, match="offloaded"):
        spec_of_model(load_in_memory())


def test_without_transformers_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("holdfast.engine_adapter.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match="pip install"):
        import_module("holdfast.engine_adapter.transformers")
