"""The examples run as they stand, against a daemon of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from daemon_process import DaemonProcess

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {
    "ddr__capacity_bytes": "128 MiB",
    "ddr__slab_bytes": "8 MiB",
    "nvme__segment_bytes": "8 MiB",
    "nvme__capacity_bytes": "128 MiB",
}
LINES_MAX = 45  # examples are to be read


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(**SIZES) as process:
        yield process.start()


def run(name, daemon):
    command = [sys.executable, str(EXAMPLES / name), str(daemon.data_dir)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_store_and_read(daemon):
    assert run("store_and_read.py", daemon).count("is the same") == 4


def test_reuse_a_prefix(daemon):
    out = run("reuse_a_prefix.py", daemon)
    assert out.splitlines() == [
        "0 of 3017 tokens were known",
        "2944 of 3017 tokens were known",
    ]


def test_read_async(daemon):
    assert run("read_async.py", daemon) == "means [0.0, 1.0, 2.0, 3.0, 4.0]\n"


def test_generate_with_transformers(daemon):
    """In two processes, and two lives of the daemon."""
    first = run("generate_with_transformers.py", daemon).splitlines()
    daemon.restart()
    second = run("generate_with_transformers.py", daemon).splitlines()
    assert first[0] == "read 0 of 3000 tokens"
    assert second[0] == "read 2999 of 3000 tokens"
    assert first[1] == second[1]
    assert first[1].startswith("answer [")


def test_they_are_short():
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) >= 4
    assert [path.name for path in scripts if len(path.read_text().splitlines()) > LINES_MAX] == []
