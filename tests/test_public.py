"""The public surface: names, the example, and README's commands."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from holdfast.kvstore.errors import InvalidRequest

import holdfast
from daemon_process import DaemonProcess

ROOT = Path(__file__).parent.parent


def test_public_names_exist_and_are_sorted():
    """`__all__` is what can be imported, in order."""
    assert holdfast.__all__ == sorted(holdfast.__all__)
    assert all(getattr(holdfast, name) is not None for name in holdfast.__all__)
    with pytest.raises(AttributeError):
        holdfast.nothing_of_the_kind  # noqa: B018


def test_importing_holdfast_does_not_import_torch():
    """The front door stays light."""
    code = "import sys, holdfast; holdfast.connect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_readme_commands_exist():
    """Every `holdfast ...` and `make ...` that README shows is a command."""
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", readme, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    shown = re.findall(r"^\.venv/bin/holdfast ([a-z ]+)", readme, re.MULTILINE)
    assert len(shown) >= 8
    for words in shown:
        command = [sys.executable, "-m", "holdfast", *words.split(), "--help"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert ran.returncode == 0, (words, ran.stderr)


def test_a_write_that_cannot_be_meant_is_refused():
    """Tokens beyond the document, what is no array, and a block that has ended; the connection lives on."""
    group = holdfast.LayerGroup(layers=(0,), kv_heads=1, key_dim=8, value_dim=8)
    spec = holdfast.KVSpec(groups=(group,), dtype="float32", model="m@1", vocabulary_size=256, extent_blocks=1)
    sizes = {"ddr__capacity_bytes": "64 MiB", "ddr__slab_bytes": "8 MiB", "nvme__segment_bytes": "8 MiB"}
    tokens = list(range(100))
    array = np.zeros((1, 100, 8), np.float32)
    with (
        DaemonProcess(**sizes, nvme__capacity_bytes="64 MiB").start() as daemon,
        holdfast.connect(data_dir=daemon.data_dir) as store,
    ):
        with store.ingest("a", holdfast.sized(spec), tokens) as writer:
            for start in (-1, 1, 10**9):
                with pytest.raises(InvalidRequest, match="not in this document of 100 tokens"):
                    writer.write(0, start, array, array)
            with pytest.raises(InvalidRequest, match=r"builtins\.list"):
                writer.write(0, 0, array.tolist(), array)
            with pytest.raises(InvalidRequest, match=r"float32 \(1, tokens, 8\)"):
                writer.write(0, 0, array[0], array[0])
            writer.write(0, 0, array, array)
        with pytest.raises(InvalidRequest, match="has ended"):
            writer.write(0, 0, array, array)
        with (
            pytest.raises(InvalidRequest, match="one row"),
            store.ingest("b", holdfast.sized(spec), np.ones((2, 3), int)),
        ):
            pass
        assert [document.name for document in store.documents()] == ["a"]
