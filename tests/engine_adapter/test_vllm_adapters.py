"""LoRA adapters are told apart by what their files hold, and those that cannot be are named once."""

import json
import logging
import os

import pytest
from holdfast.engine_adapter.vllm.adapters import Adapters


def adapter(directory, rank=8, weights=b"weights"):
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return str(directory)


def test_the_same_files_are_the_same_adapter_wherever_they_lie_and_whatever_lies_beside_them(tmp_path):
    one, other = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    (tmp_path / "b" / "optimizer.pt").write_bytes(b"of its training")
    assert Adapters().digest(one) == Adapters().digest(other)


@pytest.mark.parametrize("given", [{"weights": b"WEIGHTS"}, {"rank": 9}])
def test_other_weights_or_config_are_another_adapter(tmp_path, given):
    """Also of the same size and age: that is how images are built."""
    made = [adapter(tmp_path / "a"), adapter(tmp_path / "b", **given)]
    for path in tmp_path.glob("*/*"):
        os.utime(path, (0, 0))
    assert len({Adapters().digest(path) for path in made}) == 2


def test_an_adapter_that_changes_under_its_path_is_not_told_any_more(tmp_path, caplog):
    """The engine may have the old weights or the new ones."""
    adapters, path = Adapters(), adapter(tmp_path / "a")
    assert adapters.digest(path) == adapters.digest(path) is not None
    adapter(tmp_path / "a", weights=b"other weights")
    with caplog.at_level(logging.WARNING):
        assert [adapters.digest(path) for _ in range(3)] == [None] * 3
    assert [record.message.count("has changed") for record in caplog.records] == [1]
    assert Adapters().digest(path) is not None  # another engine has the new ones


@pytest.mark.parametrize("path", ["somebody/adapter", "empty"])
def test_what_is_no_local_adapter_is_not_told(tmp_path, monkeypatch, caplog, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    adapters = Adapters()
    with caplog.at_level(logging.WARNING):
        assert [adapters.digest(path) for _ in range(3)] == [None] * 3
    (line,) = [record.message for record in caplog.records]
    assert path in line
    assert "give its path" in line
