from dataclasses import replace
from pathlib import Path

import pytest
import torch
from holdfast.ring_attention.checkpoint import load_model
from holdfast.ring_attention.config import RopeConfig
from holdfast.ring_attention.identity import digest_of, read_config
from holdfast.ring_attention.model import alone
from holdfast.ring_attention.synthetic import DEMO, Scales, random_tensors, write_checkpoint
from ring_helpers import answers, prefilled
from transformers import AutoModelForCausalLM

PROSE = (Path(__file__).parents[2] / "examples" / "opticks.txt").read_bytes()
DOCUMENT = list(PROSE[20_000:24_096])
QUESTION = list(b"What is the colour of the light?")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    write_checkpoint(directory)
    return load_model(directory)


def test_the_demo_model_shows_any_loss_in_its_cache(model):
    """Varied answers, 5e-5 from dense, and no sixteenth of the cache that can be lost unseen."""
    torch.set_num_threads(2)
    arenas, layout = prefilled(model, DOCUMENT, 1, 2048)
    answer = answers(model, arenas, layout, QUESTION, 32)[0]
    expected = model.dense_logits([*DOCUMENT, *QUESTION, *answer.tokens[:-1]], 32)
    assert (answer.logits - expected).abs().max() < 5e-5
    assert expected.argmax(-1).tolist() == answer.tokens
    assert len(set(answer.tokens)) >= 16

    for plane in (arenas[0].key, arenas[0].value):
        for start in range(0, len(DOCUMENT), 256):
            kept = plane[:, :, start : start + 256].clone()
            plane[:, :, start : start + 256] = 0
            damaged = answers(model, arenas, layout, QUESTION, 1)[0]
            plane[:, :, start : start + 256] = kept
            assert (damaged.logits[0] - answer.logits[0]).abs().max() > 1e-2, start


SMALL = replace(DEMO, hidden_size=192, intermediate_size=384, layers=3, kv_heads=2)
ROPE3 = RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, original_positions=128)
SHAPES = {
    "llama": SMALL,
    "llama-rope3": replace(SMALL, rope=ROPE3, eos=(3, 5)),
    "mistral": replace(SMALL, architecture="MistralForCausalLM"),
    "mistral-window": replace(SMALL, architecture="MistralForCausalLM", window=128),
    "qwen2": replace(SMALL, architecture="Qwen2ForCausalLM", tied_embeddings=True),
    "qwen2-mixed": replace(SMALL, architecture="Qwen2ForCausalLM", window=64, full_layers=(1,)),
    "qwen3": replace(SMALL, architecture="Qwen3ForCausalLM", head_dim=32, heads=4),
    "qwen3-mixed": replace(SMALL, architecture="Qwen3ForCausalLM", tied_embeddings=True, window=64, full_layers=(0, 2)),
}
TOKENS = list(PROSE[20_000:20_300])


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_a_hugging_face_checkpoint(shape, tmp_path):
    """It is read back as the config it was made of, and transformers finds the same model in it."""
    write_checkpoint(tmp_path, SHAPES[shape], seed=3)
    assert read_config(tmp_path) == SHAPES[shape]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs).__name__ == SHAPES[shape].architecture
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    assert (load_model(tmp_path).dense_logits(TOKENS, len(TOKENS)) - expected).abs().max() < 5e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_of_half_precision_holds_the_rounded_weights(dtype, tmp_path):
    """What float32 would have, rounded once."""
    config = replace(SHAPES["qwen2-mixed"], dtype=dtype)
    write_checkpoint(tmp_path, config)
    assert read_config(tmp_path) == config
    rounded = random_tensors(config, 0, Scales())
    for name, whole in random_tensors(SHAPES["qwen2-mixed"], 0, Scales()).items():
        assert torch.equal(rounded[name], whole.to(getattr(torch, dtype)))


def test_equal_seeds_give_equal_bytes(tmp_path):
    """So a checkpoint can be made again wherever one is needed."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_checkpoint(tmp_path / name, SHAPES["qwen3"], seed=seed)
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b") != digest_of(tmp_path / "c")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_shows_any_loss_in_its_cache(shape, tmp_path):
    """No sixteenth of what a layer with the widest view sees can be lost unseen; answers do not repeat one token."""
    config = SHAPES[shape]
    write_checkpoint(tmp_path, config)
    model = load_model(tmp_path)
    ids, positions = torch.tensor(TOKENS), torch.arange(len(TOKENS))

    def lost(start, stop):
        """Dense attention in which the last query finds nothing at [start, stop)."""

        def attention(layer, query, key, value):
            out = model._dense_attention(layer, query, key, value)
            key, value = key.clone(), value.clone()
            key[:, start:stop], value[:, start:stop] = 0, 0
            damaged = model._dense_attention(layer, query, key, value)
            out[:, -1] = damaged[:, -1]
            return out

        return attention

    with torch.inference_mode():
        hidden = model.hidden(ids, positions, model._dense_attention, alone)
        logits = model.logits(hidden)
        assert len(set(logits[-64:].argmax(-1).tolist())) >= 16
        assert (logits[-64:].argmax(-1) == ids[-64:]).sum() < 8
        seen = len(TOKENS) if None in config.windows else config.window
        step = seen // 16
        for start in range(len(TOKENS) - seen, len(TOKENS) - step, step):
            damaged = model.logits(model.hidden(ids, positions, lost(start, start + step), alone))
            assert (damaged[-1] - logits[-1]).abs().max() > 1e-2, start
