"""What a request's KV depends on besides its tokens, by vLLM's own account, and what that leaves out."""

from __future__ import annotations

import json

import pytest
from holdfast.engine_adapter.vllm.adapters import Adapters
from holdfast.engine_adapter.vllm.connector import extras_of
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.request import Request

PAGE = 16


def request(**given):
    return Request("r", list(range(3 * PAGE)), SamplingParams(max_tokens=1), None, **given)


@pytest.fixture
def adapter(tmp_path):
    """Writes a LoRA's weights, and gives a request for it."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8}))

    def make(weights):
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        return request(lora_request=LoRARequest("tuned", 1, str(tmp_path)))

    return make


def test_a_plain_request_has_none():
    assert extras_of(Adapters(), request(), PAGE, 3 * PAGE) == {}


def test_a_salt_is_in_the_first_page():
    assert set(extras_of(Adapters(), request(cache_salt="s"), PAGE, 3 * PAGE)) == {0}


def test_an_adapter_that_was_trained_on_under_its_name_and_path_is_another(adapter):
    """vLLM's hashes are the same in the next engine: they name it only."""
    first, second = (extras_of(Adapters(), adapter(weights), PAGE, 3 * PAGE) for weights in (b"first", b"second"))
    assert set(first) == set(second) == {0, 1, 2}
    assert first[0] != second[0]


def test_an_adapter_of_a_hub_is_not_told():
    hub = request(lora_request=LoRARequest("tuned", 1, "somebody/adapter"))
    assert extras_of(Adapters(), hub, PAGE, 3 * PAGE) is None
