"""Config: one tree of frozen values, and where each of them came from.

Later sources win: defaults, a TOML file, environment variables HOLDFAST_SECTION__KEY, overrides
"section.key". A section or key we do not know is refused with its nearest neighbour, a value we
cannot use with its key, its origin and what is allowed.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Protocol, get_type_hints

from .errors import ConfigError
from .sizes import GIB, KIB, MIB, TIB, about_size, format_size, parse_size

PAGE_BYTES: Final = 4096  # slots are read and written directly, in whole pages
SOCKET_PATH_BYTES: Final = 107  # sun_path of Linux, less its final zero
ENVIRONMENT_PREFIX: Final = "HOLDFAST_"


# What a value may be. A rule turns what a file or a shell says into a value, or raises ValueError.


class Rule(Protocol):
    """How the values of one key are read, described and written."""

    @property
    def allowed(self) -> str: ...

    def read(self, raw: object) -> object: ...

    def write(self, value: Any) -> str: ...


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes, in multiples of `step`."""

    least: int
    most: int = 1024 * TIB
    step: int = 1

    @property
    def allowed(self) -> str:
        steps = f" in steps of {format_size(self.step)}" if self.step > 1 else ""
        limits = f"{format_size(self.least)} to {format_size(self.most)}"
        return f'bytes or a string such as "64 MiB" or "20 GB", {limits}{steps}'

    def read(self, raw: object) -> int:
        value = parse_size(raw)
        if not self.least <= value <= self.most or value % self.step:
            raise ValueError("out of range")
        return value

    def write(self, value: int) -> str:
        return f'"{format_size(value)}"'


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer."""

    least: int
    most: int

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def read(self, raw: object) -> int:
        if isinstance(raw, bool) or not isinstance(raw, int | str):
            raise ValueError("not a whole number")  # noqa: TRY004 - one kind of refusal
        value = int(raw)
        if not self.least <= value <= self.most:
            raise ValueError("out of range")
        return value

    def write(self, value: int) -> str:
        return str(value)


@dataclass(frozen=True, slots=True)
class Seconds:
    """A duration in seconds, fractions welcome."""

    least: float
    most: float

    @property
    def allowed(self) -> str:
        return f"seconds from {self.least:g} to {self.most:g}"

    def read(self, raw: object) -> float:
        if isinstance(raw, bool) or not isinstance(raw, int | float | str):
            raise ValueError("not a number")  # noqa: TRY004 - one kind of refusal
        value = float(raw)
        if not self.least <= value <= self.most:  # refuses NaN too
            raise ValueError("out of range")
        return value

    def write(self, value: float) -> str:
        return repr(value)


@dataclass(frozen=True, slots=True)
class Text:
    """A string that is not empty; one of `choices` where there are any."""

    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(self.choices)}" if self.choices else "a string, not empty"

    def read(self, raw: object) -> str:
        if not isinstance(raw, str) or not raw or "\0" in raw:
            raise ValueError("not a string")
        if self.choices and raw not in self.choices:
            raise ValueError("not a choice")
        return raw

    def write(self, value: object) -> str:
        # A TOML basic string is a JSON one, except that DEL must be escaped as well.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


@dataclass(frozen=True, slots=True)
class PathText(Text):
    """A path; "~/" is the home directory, a relative path starts at the working directory."""

    @property
    def allowed(self) -> str:
        return "a path, not empty"


AUTO: Final = "auto"


@dataclass(frozen=True, slots=True)
class PathOrAuto(PathText):
    """A path, or "auto": the daemon chooses."""

    @property
    def allowed(self) -> str:
        return f'a path, or "{AUTO}"'


# The tree. Keys without a default here get one in `_derived`, from other keys or the environment.


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """The process: where it keeps its state and how it is reached. Port 0 is any free port."""

    data_dir: Annotated[Path, PathText()]
    socket: Annotated[Path, PathText()]
    rest_host: Annotated[str, Text()] = "127.0.0.1"
    rest_port: Annotated[int, Whole(0, 65535)] = 8470
    log_level: Annotated[str, Text(("debug", "info", "warning", "error"))] = "info"
    drain_seconds: Annotated[float, Seconds(0, 3600)] = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DdrConfig:
    """The DDR tier: shared-memory slabs, all made at start; a clean stop leaves or frees them, as `on_stop` says.

    What is larger passes through in windows of `window_bytes`.
    """

    capacity_bytes: Annotated[int, Size(MIB)]
    slab_bytes: Annotated[int, Size(64 * KIB, 64 * GIB, PAGE_BYTES)] = 64 * MIB
    window_bytes: Annotated[int, Size(0)]
    directory: Annotated[Path | Literal["auto"], PathOrAuto()] = AUTO
    on_stop: Annotated[str, Text(("keep", "free"))] = "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeConfig:
    """The NVMe tier: preallocated segment files, read and written by `threads`.

    `backlog_bytes` bounds what waits to be written through; `when_behind` says what happens to a document beyond that:
    it stays in "memory" until the disk has caught up, or its commit has to "wait".
    """

    capacity_bytes: Annotated[int, Size(MIB)] = 4 * GIB
    segment_bytes: Annotated[int, Size(64 * KIB, TIB, PAGE_BYTES)] = 256 * MIB
    directory: Annotated[Path, PathText()]
    threads: Annotated[int, Whole(1, 64)] = 6
    backlog_bytes: Annotated[int, Size(0)]
    when_behind: Annotated[str, Text(("memory", "wait"))] = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionConfig:
    """Who leaves. The daemon knows which policies there are; ghosts are remembered accesses."""

    policy: Annotated[str, Text()] = "popularity"
    half_life_seconds: Annotated[float, Seconds(1, 31_536_000)] = 90.0
    ghost_entries: Annotated[int, Whole(1, 100_000_000)] = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """A limit on everything that can grow."""

    frame_bytes: Annotated[int, Size(64 * KIB, GIB)] = 16 * MIB
    connections: Annotated[int, Whole(1, 65_536)] = 256
    requests_per_connection: Annotated[int, Whole(1, 65_536)] = 64
    lease_seconds: Annotated[float, Seconds(0.001, 86_400)] = 300.0
    pin_bytes: Annotated[int, Size(0)]
    pending_reservations: Annotated[int, Whole(1, 1_000_000)] = 256
    swap_records: Annotated[int, Whole(1, 10_000_000)] = 1000
    documents: Annotated[int, Whole(1, 100_000_000)] = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole tree. `origins` maps "section.key" to where the value came from."""

    daemon: DaemonConfig
    ddr: DdrConfig
    nvme: NvmeConfig
    eviction: EvictionConfig
    limits: LimitsConfig
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


SECTIONS: Final[Mapping[str, type[Any]]] = {
    "daemon": DaemonConfig,
    "ddr": DdrConfig,
    "nvme": NvmeConfig,
    "eviction": EvictionConfig,
    "limits": LimitsConfig,
}


def _rules() -> dict[str, Rule]:
    """The rule of every "section.key", in the order of the tree."""
    found: dict[str, Rule] = {}
    for section, kind in SECTIONS.items():
        hints = get_type_hints(kind, include_extras=True)
        for entry in fields(kind):
            found[f"{section}.{entry.name}"] = hints[entry.name].__metadata__[0]
    return found


RULES: Final[Mapping[str, Rule]] = _rules()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """One value as somebody wrote it, and where."""

    key: str
    raw: object
    origin: str


def load_config(
    path: Path | None,
    environment: Mapping[str, str],
    overrides: Mapping[str, str],
    available_bytes: int | None = None,
) -> Config:
    """The effective configuration: defaults < file < environment < overrides.

    `available_bytes` is the memory that the DDR tier may take a part of by default; None where nobody asked.

    Raises ConfigError for a file that cannot be read or is not TOML, an unknown section or key, a
    value of the wrong type or range, and values that contradict each other.
    """
    settings = [
        *(_from_file(path) if path is not None else ()),
        *_from_environment(environment),
        *(_Setting(key=key, raw=raw, origin=f"flag {key}") for key, raw in overrides.items()),
    ]
    values = _defaults()
    origins = dict.fromkeys(values, "default")
    for setting in settings:
        values[setting.key] = _value(setting, environment)
        origins[setting.key] = setting.origin
    _derive(values, origins, environment, available_bytes)
    tree = {
        section: kind(**{entry.name: values[f"{section}.{entry.name}"] for entry in fields(kind)})
        for section, kind in SECTIONS.items()
    }
    config = Config(**tree, origins={key: origins[key] for key in RULES})
    _cross_check(config)
    return config


def render(config: Config) -> str:
    """The effective configuration as TOML, each value with its origin; loads to an equal Config."""
    lines = [f"# {len(RULES)} settings; the origin of each value stands behind it."]
    for section, kind in SECTIONS.items():
        lines += ["", f"[{section}]"]
        for entry in fields(kind):
            key = f"{section}.{entry.name}"
            value = RULES[key].write(getattr(getattr(config, section), entry.name))
            origin = config.origins.get(key, "default").replace("\n", " ")
            lines.append(f"{entry.name} = {value}  # {origin}")
    return "\n".join(lines) + "\n"


def _defaults() -> dict[str, Any]:
    """Every default that depends on nothing."""
    return {
        f"{section}.{entry.name}": entry.default
        for section, kind in SECTIONS.items()
        for entry in fields(kind)
        if entry.default is not MISSING
    }


def _from_file(path: Path) -> Iterator[_Setting]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML: both say where
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from error
    for section, content in table.items():
        if not isinstance(content, dict):
            raise ConfigError(f"{section!r} in {path} stands outside a section; sections are {', '.join(SECTIONS)}")
        if section not in SECTIONS:
            raise _unknown("section", section, str(path), list(SECTIONS))
        for key, raw in content.items():
            yield _Setting(key=f"{section}.{key}", raw=raw, origin=str(path))


def _from_environment(environment: Mapping[str, str]) -> Iterator[_Setting]:
    """HOLDFAST_SECTION__KEY; other HOLDFAST_ variables (without "__") are not settings."""
    for name in sorted(environment):
        section, separator, key = name.removeprefix(ENVIRONMENT_PREFIX).partition("__")
        if name.startswith(ENVIRONMENT_PREFIX) and separator:
            yield _Setting(key=f"{section}.{key}".lower(), raw=environment[name], origin=f"environment {name}")


def _value(setting: _Setting, environment: Mapping[str, str]) -> object:
    section, _, _ = setting.key.partition(".")
    if section not in SECTIONS:
        raise _unknown("section", section, setting.origin, list(SECTIONS))
    rule = RULES.get(setting.key)
    if rule is None:
        keys = [key for key in RULES if key.startswith(f"{section}.")]
        raise _unknown("key", setting.key, setting.origin, keys)
    try:
        value = rule.read(setting.raw)
    except ValueError as error:
        reason = f" ({error})" if str(error).startswith("unit") else ""
        raise ConfigError(
            f"{setting.key} = {setting.raw!r} from {setting.origin}: expected {rule.allowed}{reason}"
        ) from error
    if isinstance(rule, PathText) and not (isinstance(rule, PathOrAuto) and value == AUTO):
        return _path(str(value), environment)
    return value


def _path(text: str, environment: Mapping[str, str]) -> Path:
    home = environment.get("HOME")
    return Path(home, text[2:]) if home and text.startswith("~/") else Path(text)


def _unknown(what: str, name: str, origin: str, known: list[str]) -> ConfigError:
    near = get_close_matches(name, known, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return ConfigError(f"unknown {what} {name!r} from {origin}; {advice}")


def _derive(
    values: dict[str, Any], origins: dict[str, str], environment: Mapping[str, str], available_bytes: int | None
) -> None:
    """Fill in the defaults that depend on other values, in the order of their dependence."""

    def default(key: str, value: object, reason: str) -> None:
        if key not in values:
            values[key] = value
            origins[key] = f"default, {reason}"

    default("daemon.data_dir", *_state_directory(environment))
    data_dir: Path = values["daemon.data_dir"]
    default("daemon.socket", data_dir / "holdfast.sock", "in daemon.data_dir")
    default("nvme.directory", data_dir / "nvme", "in daemon.data_dir")
    default("ddr.capacity_bytes", *_ddr_capacity(values["ddr.slab_bytes"], available_bytes))
    default("ddr.window_bytes", values["ddr.capacity_bytes"] // 4, "a quarter of ddr.capacity_bytes")
    default("nvme.backlog_bytes", values["ddr.capacity_bytes"] // 8, "an eighth of ddr capacity")
    capacity_bytes = values["ddr.capacity_bytes"] + values["nvme.capacity_bytes"]
    default("limits.pin_bytes", capacity_bytes // 2, "half of ddr and nvme capacity")


def _ddr_capacity(slab_bytes: int, available_bytes: int | None) -> tuple[int, str]:
    """Whole slabs of a quarter of the memory there is, and why."""
    if available_bytes is None:
        share_bytes, reason = GIB, "for want of a look at the memory"
    else:
        share_bytes, reason = available_bytes // 4, f"a quarter of {about_size(available_bytes)} available"
    least = -(-MIB // slab_bytes)
    return max(least, share_bytes // slab_bytes) * slab_bytes, reason


def _state_directory(environment: Mapping[str, str]) -> tuple[Path, str]:
    """Where the XDG base directory specification puts state, and why there."""
    state = environment.get("XDG_STATE_HOME", "")
    if Path(state).is_absolute():  # the specification says to ignore relative ones
        return Path(state, "holdfast"), "in $XDG_STATE_HOME"
    home = environment.get("HOME", "")
    if Path(home).is_absolute():
        return Path(home, ".local/state/holdfast"), "in $HOME/.local/state"
    return Path("holdfast-data"), "in the working directory, for want of $HOME"


def _cross_check(config: Config) -> None:
    """Refuse values that contradict each other, naming both and where they came from."""

    def at_most(key: str, value: int, limit: str, most: int) -> None:
        if value > most:
            raise ConfigError(
                f"{key} = {format_size(value)} ({config.origins[key]}) is more than {limit} = {format_size(most)}"
            )

    ddr, nvme = config.ddr, config.nvme
    at_most("ddr.slab_bytes", ddr.slab_bytes, "ddr.capacity_bytes", ddr.capacity_bytes)
    at_most("ddr.window_bytes", ddr.window_bytes, "ddr.capacity_bytes", ddr.capacity_bytes)
    at_most("nvme.segment_bytes", nvme.segment_bytes, "nvme.capacity_bytes", nvme.capacity_bytes)
    everything = ddr.capacity_bytes + nvme.capacity_bytes
    at_most("limits.pin_bytes", config.limits.pin_bytes, "ddr plus nvme capacity", everything)
    if len(os.fsencode(config.daemon.socket)) > SOCKET_PATH_BYTES:
        raise ConfigError(
            f"daemon.socket = {config.daemon.socket} ({config.origins['daemon.socket']}) "
            f"is longer than the {SOCKET_PATH_BYTES} bytes of a unix socket path"
        )
