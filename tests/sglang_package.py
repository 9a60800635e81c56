"""SGLang's published package without its `__init__`, which imports the whole engine: for tests of single modules of it.

Importing this makes `import sglang.srt...` find the modules of the installed or unpacked wheel.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def _without_init() -> None:
    spec = importlib.util.find_spec("sglang")
    if spec is None or "sglang" in sys.modules:
        return
    package = ModuleType("sglang")
    package.__spec__ = spec
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["sglang"] = package


_without_init()
