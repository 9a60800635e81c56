"""vLLM and Transformers over one store: each goes on from what the other has computed, with the same tokens.

In float32, where two engines' rounding decides no token.
"""

import pytest
import torch
import vllm  # noqa: F401 - without it these tests are skipped
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.pages import vllm_cpu_vec
from holdfast.engine_adapter.transformers import attach, cached, spec_of_model
from holdfast.kvstore.client import Client
from holdfast.ring_attention.synthetic import DEMO, write_checkpoint
from transformers import AutoModelForCausalLM
from vllm_engine import Engine, Prompt

from daemon_process import until

pytestmark = pytest.mark.timeout(600)  # engines take their time to start on a busy machine
PAGE, COUNT, NEW = 32, 300, 8
WHOLE = COUNT // PAGE * PAGE


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "model", DEMO)
    return tmp_path / "model"


def prompt(seed):
    return torch.randint(0, DEMO.vocabulary_size, (1, COUNT), generator=torch.Generator().manual_seed(seed))


def answer(model, ids, cache=None):
    given = {} if cache is None else {"past_key_values": cache}
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **given)[0, ids.shape[1] :].tolist()


def test_each_goes_on_from_what_the_other_has_computed(directory, daemon):
    model = AutoModelForCausalLM.from_pretrained(directory)
    unnamed, named, ours = prompt(1), prompt(2), prompt(3)
    shape = spec_of_model(model).groups[0]
    page_format = vllm_cpu_vec(PAGE, shape.kv_heads, shape.key_dim, shape.value_dim)
    with (
        Engine(directory, daemon.socket, options={"dtype": "float32", "block_size": PAGE}) as engine,
        Store(Client(daemon.socket)) as store,
    ):
        asked = [Prompt(unnamed[0], count=NEW), Prompt(named[0], params={"document": "contract"}, count=NEW)]
        for ids, found in zip((unnamed, named), engine.ask(asked), strict=True):
            assert found.tokens == answer(model, ids)
        until(lambda: [view.name for view in store.documents()] == ["contract"], "vLLM has stored its document")
        for ids, options in ((unnamed, {"page_formats": [page_format]}), (named, {"name": "contract"})):
            with attach(store, model, ids, trouble="raise", **options) as cache:
                assert cache.reused_tokens >= WHOLE  # a named document may end anywhere
                assert answer(model, ids, cache) == answer(model, ids)
        with cached(store, model, ours, trouble="raise") as cache:
            expected = answer(model, ours, cache)
        (found,) = engine.ask([Prompt(ours[0], count=NEW)])
        assert found.tokens == expected
        assert found.cached == WHOLE
