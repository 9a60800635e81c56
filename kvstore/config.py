"""Config: one tree of frozen values, and where each of them came from.

Later sources win: defaults, a TOML file, environment variables HOLDFAST_SECTION__KEY, overrides
"section.key". A section or key we do not know is refused with its nearest neighbour, a value we
cannot use with its key, its origin and what is allowed. Tenants have a table each: [tenants.NAME] in a file,
HOLDFAST_TENANTS__NAME__KEY (the name in lower case), "tenants.NAME.key"; "*" is everybody who has none.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, get_type_hints

from .allowed import AUTO, PathOrAuto, PathText, Rule, Text
from .document import checked_name
from .errors import ConfigError, InvalidName
from .sections import (
    OTHERS,
    DaemonConfig,
    DdrConfig,
    EventsConfig,
    EvictionConfig,
    LimitsConfig,
    NvmeConfig,
    TenantConfig,
)
from .sizes import GIB, MIB, about_size, format_size

SOCKET_PATH_BYTES: Final = 107  # sun_path of Linux, less its final zero
ENVIRONMENT_PREFIX: Final = "HOLDFAST_"
TENANTS: Final = "tenants"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole tree. `origins` maps "section.key", and "tenants.NAME.key", to where the value came from."""

    daemon: DaemonConfig
    ddr: DdrConfig
    nvme: NvmeConfig
    eviction: EvictionConfig
    limits: LimitsConfig
    events: EventsConfig
    tenants: Mapping[str, TenantConfig] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def tenant(self, name: str) -> TenantConfig:
        """The table of that tenant, else of everybody who has none, else one without limits."""
        return self.tenants.get(name) or self.tenants.get(OTHERS) or TenantConfig()


SECTIONS: Final[Mapping[str, type[Any]]] = {
    "daemon": DaemonConfig,
    "ddr": DdrConfig,
    "nvme": NvmeConfig,
    "eviction": EvictionConfig,
    "limits": LimitsConfig,
    "events": EventsConfig,
}


def _rules(kind: type[Any]) -> dict[str, Rule]:
    """The rule of every field, in order."""
    hints = get_type_hints(kind, include_extras=True)
    return {entry.name: hints[entry.name].__metadata__[0] for entry in fields(kind)}


RULES: Final[Mapping[str, Rule]] = {
    f"{section}.{name}": rule for section, kind in SECTIONS.items() for name, rule in _rules(kind).items()
}
TENANT_RULES: Final[Mapping[str, Rule]] = _rules(TenantConfig)


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
    tables: dict[str, dict[str, Any]] = {}
    for key in values.keys() - RULES.keys():
        tenant, name = _in_table(key)
        tables.setdefault(tenant, {})[name] = values[key]
    tenants = {tenant: TenantConfig(**tables[tenant]) for tenant in sorted(tables)}
    known = [*RULES, *sorted(values.keys() - RULES.keys())]
    config = Config(**tree, tenants=tenants, origins={key: origins[key] for key in known})
    _cross_check(config)
    return config


def _in_table(key: str) -> tuple[str, str]:
    """Tenant and name of "tenants.NAME.key"; a tenant's name may have dots."""
    tenant, _, name = key.partition(".")[2].rpartition(".")
    return tenant, name


def settings(config: Config) -> Iterator[tuple[str, object, str]]:
    """Every setting with its value and its origin, in the order of the tree; of tenants what was said of them."""
    for key in [*RULES, *sorted(config.origins.keys() - RULES.keys())]:
        section, _, name = key.partition(".")
        if section == TENANTS:
            tenant, name = _in_table(key)
            value = getattr(config.tenants[tenant], name)
        else:
            value = getattr(getattr(config, section), name)
        yield key, value, config.origins.get(key, "default")


def render(config: Config) -> str:
    """The effective configuration as TOML, each value with its origin; loads to an equal Config."""
    found = list(settings(config))
    lines = [f"# {len(found)} settings; the origin of each value stands behind it."]
    last = ""
    for key, value, origin in found:
        table, _, name = key.rpartition(".")
        if table != last:
            last, tenant = table, table.partition(".")[2]
            lines += ["", f"[{TENANTS}.{Text().write(tenant)}]" if tenant else f"[{table}]"]
        rule = RULES.get(key) or TENANT_RULES[name]
        lines.append(f"{name} = {rule.write(value)}  # {origin.replace(chr(10), ' ')}")
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
        if section not in (*SECTIONS, TENANTS):
            raise _unknown("section", section, str(path), [*SECTIONS, TENANTS])
        for key, raw in content.items():
            if section == TENANTS and isinstance(raw, dict):
                yield from (_Setting(key=f"{section}.{key}.{name}", raw=raw[name], origin=str(path)) for name in raw)
            else:
                yield _Setting(key=f"{section}.{key}", raw=raw, origin=str(path))


def _from_environment(environment: Mapping[str, str]) -> Iterator[_Setting]:
    """HOLDFAST_SECTION__KEY; other HOLDFAST_ variables (without "__") are not settings."""
    for name in sorted(environment):
        parts = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        if name.startswith(ENVIRONMENT_PREFIX) and parts[1]:
            if parts[0] == TENANTS:
                parts = parts[0], ".", ".".join(parts[2].rsplit("__", 1))
            yield _Setting(key=f"{parts[0]}.{parts[2]}", raw=environment[name], origin=f"environment {name}")


def _value(setting: _Setting, environment: Mapping[str, str]) -> object:
    section, _, _ = setting.key.partition(".")
    if section not in (*SECTIONS, TENANTS):
        raise _unknown("section", section, setting.origin, [*SECTIONS, TENANTS])
    rules: Mapping[str, Rule] = {key: rule for key, rule in RULES.items() if key.startswith(f"{section}.")}
    if section == TENANTS:
        tenant, _ = _in_table(setting.key)
        if tenant != OTHERS:
            try:
                checked_name(tenant, "tenant")
            except InvalidName as error:
                raise ConfigError(
                    f"{setting.key} from {setting.origin}: say {TENANTS}.NAME.KEY, or {TENANTS}.{OTHERS}.KEY for all "
                    f"others ({error})"
                ) from error
        rules = {f"{TENANTS}.{tenant}.{name}": rule for name, rule in TENANT_RULES.items()}
    rule = rules.get(setting.key)
    if rule is None:
        raise _unknown("key", setting.key, setting.origin, list(rules))
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
    default("limits.ddr_pin_bytes", values["ddr.capacity_bytes"] * 3 // 4, "three quarters of ddr.capacity_bytes")


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
    at_most("limits.ddr_pin_bytes", config.limits.ddr_pin_bytes, "ddr.capacity_bytes", ddr.capacity_bytes)
    for section, tier in (("ddr", ddr), ("nvme", nvme)):
        if tier.low_watermark > tier.high_watermark:
            raise ConfigError(
                f"{section}.low_watermark = {tier.low_watermark} ({config.origins[f'{section}.low_watermark']}) is "
                f"more than {section}.high_watermark = {tier.high_watermark}"
            )
    _check_guarantees(config, "ddr", ddr.capacity_bytes, ddr.slab_bytes)
    _check_guarantees(config, "nvme", nvme.capacity_bytes, 1)
    if len(os.fsencode(config.daemon.socket)) > SOCKET_PATH_BYTES:
        raise ConfigError(
            f"daemon.socket = {config.daemon.socket} ({config.origins['daemon.socket']}) "
            f"is longer than the {SOCKET_PATH_BYTES} bytes of a unix socket path"
        )


def _check_guarantees(config: Config, tier: str, capacity_bytes: int, step_bytes: int) -> None:
    """Guarantees have to be kept all at once. In DDR each takes whole slabs, because a slab has one tenant."""
    wanted_bytes = 0
    for tenant, table in config.tenants.items():
        guaranteed_bytes = getattr(table, f"{tier}_guaranteed_bytes")
        maximum_bytes = getattr(table, f"{tier}_maximum_bytes")
        if tenant == OTHERS and guaranteed_bytes:
            raise ConfigError(f"tenants.{OTHERS}.{tier}_guaranteed_bytes: only tenants by name can have a guarantee")
        if maximum_bytes is not None and guaranteed_bytes > maximum_bytes:
            raise ConfigError(
                f"tenants.{tenant}.{tier}_guaranteed_bytes = {format_size(guaranteed_bytes)} is more than "
                f"tenants.{tenant}.{tier}_maximum_bytes = {format_size(maximum_bytes)}"
            )
        wanted_bytes += -(-guaranteed_bytes // step_bytes) * step_bytes
    if wanted_bytes > capacity_bytes // step_bytes * step_bytes:
        whole = f", in whole slabs of {format_size(step_bytes)}," if step_bytes > 1 else ""
        raise ConfigError(
            f"{tier}_guaranteed_bytes of all tenants are {format_size(wanted_bytes)} together{whole} and more than "
            f"{tier}.capacity_bytes = {format_size(capacity_bytes)}"
        )
