import sys
from pathlib import Path

import pytest
import torch

# Helpers stand beside the tests, and are also run as scripts in rank processes.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread_per_rank():
    """Ranks are threads here: let each compute on its own, not with a team of threads each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
