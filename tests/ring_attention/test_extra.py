import subprocess
import sys

CODE = """
import sys
sys.modules["torch"] = None
from holdfast.kvstore.errors import MissingExtra
try:
    import holdfast.ring_attention
except MissingExtra as error:
    print(error)
"""


def test_without_torch_the_extra_is_named():
    """Importing the room where torch is absent says what to install."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True)
    assert "pip install 'holdfast[runner]'" in done.stdout
