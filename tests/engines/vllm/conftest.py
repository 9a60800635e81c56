"""What tests of the connector in a real vLLM share: a checkpoint whose answers depend on all of its KV, and daemons."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers stand beside the tests

from daemon_process import DaemonProcess

CACHE_SIZES = {
    "ddr__capacity_bytes": "160 MiB",
    "ddr__slab_bytes": "16 MiB",
    "nvme__capacity_bytes": "256 MiB",
    "nvme__segment_bytes": "32 MiB",
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """bfloat16, 4 KiB of KV a token."""
    from holdfast.ring_attention.synthetic import DEMO, write_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, replace(DEMO, dtype="bfloat16"))
    return directory


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(**CACHE_SIZES) as process:
        yield process.start()
