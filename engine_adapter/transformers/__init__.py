"""Transformers' hook: a `Cache` that reads a document layer by layer, and saves one after prefill.

    with holdfast.connect() as store, cached(store, model, input_ids) as cache:
        answer = model.generate(input_ids, past_key_values=cache, max_new_tokens=100)

The second time the prompt, or another one that begins as it does, is read instead of computed. `attach` and `save` are
the two halves, for those who save at another moment or under a name; `spec_of_model` is the identity that they use.
"""

from __future__ import annotations

from ...kvstore.errors import MissingExtra

try:
    from .cache import HoldfastCache
    from .model_identity import spec_of_model
    from .reuse import Trouble, attach, cached, save
except ModuleNotFoundError as error:
    if error.name not in ("torch", "transformers"):
        raise
    raise MissingExtra("this hook needs Transformers: pip install torch 'transformers>=5.16'") from error

__all__ = ["HoldfastCache", "Trouble", "attach", "cached", "save", "spec_of_model"]
