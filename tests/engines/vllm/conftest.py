"""What tests of the connector in a real vLLM share: a checkpoint whose answers depend on all of its KV, and daemons."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers stand beside the tests

from daemon_process import DaemonProcess

CACHE_SIZES = {
    "ddr__capacity_bytes": "320 MiB",
    "ddr__slab_bytes": "16 MiB",
    "nvme__capacity_bytes": "512 MiB",
    "nvme__segment_bytes": "32 MiB",
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """float32, 8 KiB of KV a token.

    In bfloat16 the best two tokens of a random model are often as good as each other, and vLLM computes a little
    differently when any connector is there.
    """
    from holdfast.ring_attention.synthetic import DEMO, write_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, DEMO)
    return directory


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(**CACHE_SIZES) as process:
        yield process.start()
