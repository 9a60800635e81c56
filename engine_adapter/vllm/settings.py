"""Settings: what `kv_connector_extra_config` may say to the connector, checked when the engine starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

from ...kvstore.document import WritePolicy
from ...kvstore.errors import ConfigError

PREFIX: Final = "holdfast."


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One field per key `holdfast.<field>`.

    `socket`, `data_dir`: where the daemon is; neither: where the defaults put it. `model` names the weights where they
    are no local directory, or instead of their digest. `store` and `load`: what is done of itself; `save_generated`
    also stores what was generated, at a request's end. `unverified_formats` admits page formats that no real engine's
    pages were compared with.

    `lookup_seconds`: a request waits so long at most to hear what is cached; `load_seconds`: for its KV to come;
    `save_seconds`: a save takes at most so long, `hold_seconds` at most so long beyond its request's end.
    """

    socket: str | None = None
    data_dir: str | None = None
    tenant: str = "default"
    model: str | None = None
    store: bool = True
    load: bool = True
    save_generated: bool = False
    unverified_formats: bool = False
    write_policy: str = WritePolicy.AUTO
    lookup_seconds: float = 1.0
    load_seconds: float = 20.0
    save_seconds: float = 60.0
    hold_seconds: float = 5.0

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Self:
        """Settings by their keys; other keys than `holdfast.*` are somebody else's. Raises ConfigError."""
        known = {field.name: field for field in fields(cls)}
        given: dict[str, Any] = {}
        for key, value in extra.items():
            if not key.startswith(PREFIX):
                continue
            name = key.removeprefix(PREFIX)
            if name not in known:
                raise ConfigError(f"unknown key {key!r} in kv_connector_extra_config; known: {', '.join(known)}")
            given[name] = _checked(key, value, str(known[name].type))
        settings = cls(**given)
        if settings.write_policy not in list(WritePolicy):
            raise ConfigError(f"{PREFIX}write_policy is one of {', '.join(WritePolicy)}, not {settings.write_policy!r}")
        return settings

    @property
    def directory(self) -> Path | None:
        """The daemon's data directory, where one is named."""
        return Path(self.data_dir) if self.data_dir is not None else None


def _checked(key: str, value: Any, kind: str) -> Any:
    if kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is true or false, not {value!r}")
    elif kind == "float":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 86400:
            raise ConfigError(f"{key} is a number of seconds, not {value!r}")
        return float(value)
    elif not isinstance(value, str) and not (value is None and "None" in kind):
        raise ConfigError(f"{key} is a text, not {value!r}")
    return value
