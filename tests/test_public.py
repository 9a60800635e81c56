"""The public surface: names, the example, and README's commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_example_runs():
    """examples/store_and_read.py, against a daemon of its own."""
    sizes = {"ddr__capacity_bytes": "64 MiB", "ddr__slab_bytes": "8 MiB", "nvme__segment_bytes": "8 MiB"}
    with DaemonProcess(**sizes, nvme__capacity_bytes="64 MiB").start() as daemon:
        command = [sys.executable, str(ROOT / "examples" / "store_and_read.py"), str(daemon.data_dir)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("is the same") == 4
