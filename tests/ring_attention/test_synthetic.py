from pathlib import Path

import pytest
import torch
from holdfast.ring_attention.checkpoint import load_model
from holdfast.ring_attention.synthetic import write_checkpoint
from ring_helpers import answers, prefilled

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
