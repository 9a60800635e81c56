"""What an operator says of Holdfast in `--l2-adapter`: the "adapter_params"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

import msgspec

from ...kvstore.document import WritePolicy
from ...kvstore.errors import ConfigError

Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`chunk_tokens`: LMCache's --chunk-size, which an object's loss costs. `qualifier` keeps apart what LMCache mixes.

    Without `socket` and `data_dir` the daemon is where its defaults put it.
    """

    socket: str | None = None
    data_dir: str | None = None
    tenant: str = "default"
    write_policy: WritePolicy = WritePolicy.AUTO
    chunk_tokens: Annotated[int, msgspec.Meta(ge=0)] = 256
    qualifier: str = ""
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2  # for stores, and as many for lookups and loads
    find_seconds: Seconds = 2.0
    load_seconds: Seconds = 30.0
    store_seconds: Seconds = 30.0
    lock_seconds: Seconds = 60.0  # between a lookup and the end of its load

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Self:
        """Raises ConfigError."""
        try:
            return msgspec.convert(dict(params), cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"adapter_params of Holdfast's L2 adapter: {error}") from error
