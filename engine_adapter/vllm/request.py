"""Request: what the connector looks at of the engine's requests, and what is asked about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ...kvstore.keys import Extras


class Request(Protocol):
    """What we look at of the engine's request."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_in_flight_tokens: int
    num_preemptions: int
    skip_reading_prefix_cache: bool
    kv_transfer_params: dict[str, Any] | None

    @property
    def num_tokens(self) -> int: ...

    @property
    def all_token_ids(self) -> Sequence[int]: ...


Blocks = tuple[list[int], ...]  # of one request, by KV cache group
ExtrasOf = Callable[[Any, int, int], Extras | None]
