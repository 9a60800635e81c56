"""Before any test imports a module of SGLang: see sglang_package."""

import sglang_package  # noqa: F401
