"""Configuration: sources, refusals that help, and what is printed back."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from holdfast.kvstore.config import RULES, load_config, render
from holdfast.kvstore.errors import ConfigError
from holdfast.kvstore.sizes import about_size, format_size, parse_size
from hypothesis import given
from hypothesis import strategies as st

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "holdfast.toml"
HOME = {"HOME": "/home/ada"}

GOLDEN_KEYS = [
    "daemon.data_dir",
    "daemon.socket",
    "daemon.rest_host",
    "daemon.rest_port",
    "daemon.log_level",
    "daemon.drain_seconds",
    "ddr.capacity_bytes",
    "ddr.slab_bytes",
    "ddr.window_bytes",
    "ddr.high_watermark",
    "ddr.low_watermark",
    "ddr.directory",
    "ddr.on_stop",
    "nvme.capacity_bytes",
    "nvme.high_watermark",
    "nvme.low_watermark",
    "nvme.segment_bytes",
    "nvme.directory",
    "nvme.threads",
    "nvme.backlog_bytes",
    "nvme.when_behind",
    "eviction.policy",
    "eviction.ghost_entries",
    "limits.frame_bytes",
    "limits.connections",
    "limits.requests_per_connection",
    "limits.lease_seconds",
    "limits.pin_bytes",
    "limits.ddr_pin_bytes",
    "limits.pending_reservations",
    "limits.swap_records",
    "limits.documents",
    "limits.unnamed",
    "events.endpoint",
    "events.replay_endpoint",
    "events.topic",
    "events.buffer_batches",
]


def written(tmp_path, text):
    path = tmp_path / "holdfast.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path=None, environment=HOME, overrides=None):
    with pytest.raises(ConfigError) as caught:
        load_config(path, environment, overrides or {})
    return str(caught.value)


def test_the_keys_are_these_and_no_others():
    assert list(RULES) == GOLDEN_KEYS


def test_defaults():
    config = load_config(None, HOME, {})
    state = Path("/home/ada/.local/state/holdfast")
    assert config.daemon.data_dir == state
    assert config.daemon.socket == state / "holdfast.sock"
    assert (config.daemon.rest_host, config.daemon.rest_port) == ("127.0.0.1", 8470)
    assert (config.ddr.capacity_bytes, config.ddr.slab_bytes) == (1 << 30, 64 << 20)
    assert config.ddr.window_bytes == 256 << 20
    assert (config.ddr.directory, config.ddr.on_stop) == ("auto", "keep")
    assert (config.nvme.capacity_bytes, config.nvme.segment_bytes) == (4 << 30, 256 << 20)
    assert (config.nvme.directory, config.nvme.threads) == (state / "nvme", 6)
    assert (config.nvme.backlog_bytes, config.nvme.when_behind) == (128 << 20, "memory")
    assert config.eviction.policy == "popularity"
    assert config.limits.pin_bytes == 5 << 29
    assert config.limits.frame_bytes == 16 << 20
    assert config.limits.lease_seconds == 300
    assert set(config.origins) == set(GOLDEN_KEYS)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_STATE_HOME": "/state", "HOME": "/home/ada"}, "/state/holdfast"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/home/ada"}, "/home/ada/.local/state/holdfast"),
        ({}, "holdfast-data"),
    ],
)
def test_where_state_goes(environment, expected):
    assert load_config(None, environment, {}).daemon.data_dir == Path(expected)


def test_later_sources_win_and_are_named(tmp_path):
    path = written(tmp_path, "[ddr]\ncapacity_bytes = '2 GiB'\nslab_bytes = 1048576\n")
    environment = HOME | {"HOLDFAST_DDR__CAPACITY_BYTES": "3 GiB", "HOLDFAST_NVME__THREADS": "8"}
    config = load_config(path, environment, {"nvme.threads": "16"})
    assert config.ddr.slab_bytes == 1 << 20
    assert config.ddr.capacity_bytes == 3 << 30
    assert config.nvme.threads == 16
    assert config.origins["ddr.slab_bytes"] == str(path)
    assert config.origins["ddr.capacity_bytes"] == "environment HOLDFAST_DDR__CAPACITY_BYTES"
    assert config.origins["nvme.threads"] == "flag nvme.threads"
    assert config.origins["nvme.segment_bytes"] == "default"


def test_derived_defaults_follow_what_they_derive_from():
    overrides = {"daemon.data_dir": "~/kv", "ddr.capacity_bytes": "6 GiB"}
    config = load_config(None, HOME, overrides)
    assert config.daemon.socket == Path("/home/ada/kv/holdfast.sock")
    assert config.nvme.directory == Path("/home/ada/kv/nvme")
    assert config.limits.pin_bytes == 5 << 30
    assert load_config(None, HOME, overrides | {"limits.pin_bytes": "0"}).limits.pin_bytes == 0


@pytest.mark.parametrize(
    ("available_bytes", "slab_bytes", "capacity_bytes"),
    [
        (21 << 30, 64 << 20, 21 << 28),
        ((21 << 30) - 1, 64 << 20, 83 << 26),
        (1, 2 << 30, 2 << 30),
        (0, 640 << 10, 1280 << 10),
    ],
)
def test_the_ddr_capacity_is_whole_slabs_of_a_quarter_of_the_memory(available_bytes, slab_bytes, capacity_bytes):
    config = load_config(None, HOME, {"ddr.slab_bytes": str(slab_bytes)}, available_bytes)
    assert config.ddr.capacity_bytes == capacity_bytes
    assert config.origins["ddr.capacity_bytes"] == f"default, a quarter of {about_size(available_bytes)} available"
    assert load_config(None, HOME, {"ddr.capacity_bytes": "2 GiB"}, available_bytes).ddr.capacity_bytes == 2 << 30


def test_about_a_size():
    sizes = [0, 1536, 1 << 20, (21 << 30) + (1 << 29), 3 << 40]
    assert [about_size(size) for size in sizes] == ["0.0 KiB", "1.5 KiB", "1.0 MiB", "21.5 GiB", "3.0 TiB"]


def test_other_variables_are_not_settings():
    environment = HOME | {"HOLDFAST_TOKEN": "x", "HOLDFAST_CONFIG": "y", "DDR__CAPACITY_BYTES": "z"}
    assert load_config(None, environment, {}) == load_config(None, HOME, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        ("64 MiB", 64 << 20),
        ("1GiB", 1 << 30),
        ("20 GB", 20 * 10**9),
        ("1.5 KiB", 1536),
        ("1.1 GB", 1_100_000_000),
        ("4096", 4096),
        ("7 B", 7),
        (" 2 TB ", 2 * 10**12),
    ],
)
def test_sizes_are_exact(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["64M", "64 G", "1 gib", "", "GiB", "-1 MiB", "1e9", "0.3 B", "1 GiB x", True, 1.5, None]
)
def test_sizes_that_are_not(text):
    with pytest.raises(ValueError, match=r"size|unit|whole"):
        parse_size(text)


@given(st.integers(0, 1 << 60))
def test_a_formatted_size_reads_back(size_bytes):
    assert parse_size(format_size(size_bytes)) == size_bytes


def test_a_formatted_size_is_short():
    sizes = [64 << 20, 20 * 10**9, 1001, 4096, 0]
    assert [format_size(size) for size in sizes] == ["64 MiB", "20 GB", "1001 B", "4 KiB", "0 B"]


def test_an_unknown_key_or_section_names_its_neighbour_and_its_origin(tmp_path):
    path = written(tmp_path, "[ddr]\ncapacity = 5\n")
    text = refusal(path)
    assert "'ddr.capacity'" in text
    assert "did you mean 'ddr.capacity_bytes'?" in text
    assert str(path) in text
    assert "did you mean 'nvme'?" in refusal(written(tmp_path, "[nvmee]\n"))
    assert "HOLDFAST_DRR__X" in refusal(environment=HOME | {"HOLDFAST_DRR__X": "1"})
    assert "known are" in refusal(overrides={"zzz.qqq": "1"})
    assert "outside a section" in refusal(written(tmp_path, "threads = 4\n"))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("ddr.capacity_bytes", "64M", "64 MiB"),
        ("ddr.capacity_bytes", "1 kB", "1 MiB to 1024 TiB"),
        ("ddr.slab_bytes", "1048577", "steps of 4 KiB"),
        ("nvme.threads", "0", "from 1 to 64"),
        ("nvme.threads", "four", "a whole number"),
        ("nvme.threads", "2.5", "a whole number"),
        ("daemon.rest_port", "65536", "0 to 65535"),
        ("daemon.log_level", "loud", "debug, info, warning, error"),
        ("daemon.rest_host", "", "not empty"),
        ("daemon.socket", "", "a path"),
        ("limits.lease_seconds", "nan", "seconds from"),
        ("limits.lease_seconds", "0", "seconds from"),
        ("limits.lease_seconds", "soon", "seconds from"),
    ],
)
def test_a_bad_value_names_key_value_origin_and_what_is_allowed(key, value, allowed):
    text = refusal(overrides={key: value})
    for part in (key, repr(value), f"flag {key}", allowed):
        assert part in text


@pytest.mark.parametrize("value", ["true", "[1]", "{}", "1.5", "2020-01-01"])
@pytest.mark.parametrize("key", ["ddr.capacity_bytes", "nvme.threads", "daemon.rest_host"])
def test_a_file_with_the_wrong_type_is_refused(tmp_path, key, value):
    section, name = key.split(".")
    path = written(tmp_path, f"[{section}]\n{name} = {value}\n")
    assert f"{key} = " in refusal(path)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            {"ddr.slab_bytes": "2 GiB", "ddr.capacity_bytes": "1 GiB"},
            ["ddr.slab_bytes = 2 GiB", "ddr.capacity_bytes = 1 GiB"],
        ),
        ({"ddr.window_bytes": "2 GiB"}, ["ddr.window_bytes = 2 GiB", "ddr.capacity_bytes = 1 GiB"]),
        ({"nvme.capacity_bytes": "128 MiB"}, ["nvme.segment_bytes = 256 MiB", "(default)"]),
        ({"limits.pin_bytes": "6 GiB"}, ["limits.pin_bytes = 6 GiB", "5 GiB"]),
        ({"daemon.data_dir": "/" + "d" * 100}, ["daemon.socket", "107 bytes"]),
    ],
)
def test_values_that_contradict_each_other(overrides, parts):
    text = refusal(overrides=overrides)
    for part in parts:
        assert part in text


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot read" in refusal(tmp_path / "absent.toml")
    assert "cannot read" in refusal(tmp_path)
    assert "line 1" in refusal(written(tmp_path, "[ddr\n"))
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    assert "not valid TOML" in refusal(tmp_path / "latin.toml")


def test_what_is_rendered_loads_to_the_same_and_says_why(tmp_path):
    overrides = {
        "ddr.capacity_bytes": "20 GB",
        "ddr.directory": '/odd "path" \\ \x7f',
        "limits.lease_seconds": "0.1",
    }
    config = load_config(None, HOME, overrides)
    text = render(config)
    assert 'capacity_bytes = "20 GB"  # flag ddr.capacity_bytes' in text
    assert "threads = 6  # default" in text
    tables = tomllib.loads(text)
    assert [f"{s}.{key}" for s, table in tables.items() for key in table] == GOLDEN_KEYS
    assert load_config(written(tmp_path, text), {}, {}) == config


def test_the_tree_is_frozen():
    config = load_config(None, HOME, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ddr.capacity_bytes = 1  # type: ignore[misc]


def test_the_example_is_the_defaults_and_mentions_every_key():
    assert load_config(EXAMPLE, HOME, {}) == load_config(None, HOME, {})
    text = EXAMPLE.read_text(encoding="utf-8")
    section, found = "", []
    for line in text.splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        elif setting := re.match(r"(?:# )?(\w+) = ", line):
            found.append(f"{section}.{setting[1]}")
    assert found == GOLDEN_KEYS


def test_the_example_loads_with_its_commented_settings_too(tmp_path):
    text = re.sub(r"^# (?=\w+ = )", "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    config = load_config(written(tmp_path, text), {}, {})
    assert config.daemon.data_dir == Path("/var/lib/holdfast")
    assert config.limits.pin_bytes == load_config(None, HOME, {}).limits.pin_bytes


def test_tenants_have_tables_and_a_default_for_the_others(tmp_path):
    text = """[tenants.acme]
ddr_maximum_bytes = "64 MiB"
nvme_guaranteed_bytes = "1 GiB"
[tenants."*"]
ddr_maximum_bytes = 0
"""
    path = written(tmp_path, text)
    environment = HOME | {"HOLDFAST_TENANTS__ACME__DDR_GUARANTEED_BYTES": "32 MiB"}
    config = load_config(path, environment, {"tenants.a.corp.nvme_maximum_bytes": "2 GiB"})
    acme = config.tenants["acme"]
    assert (acme.ddr_guaranteed_bytes, acme.ddr_maximum_bytes) == (32 << 20, 64 << 20)
    assert (acme.nvme_guaranteed_bytes, acme.nvme_maximum_bytes) == (1 << 30, None)
    assert config.tenants["*"].ddr_maximum_bytes == 0
    assert config.tenants["a.corp"].nvme_maximum_bytes == 2 << 30
    assert config.origins["tenants.acme.ddr_maximum_bytes"] == str(path)
    shown = render(config)
    assert 'nvme_maximum_bytes = "2 GiB"  # flag tenants.a.corp.nvme_maximum_bytes' in shown
    assert load_config(written(tmp_path, shown), {}, {}) == config


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"tenants.acme.ddr_maximun_bytes": "1 GiB"}, "did you mean 'tenants.acme.ddr_maximum_bytes'"),
        ({"tenants.acme": "1 GiB"}, "say tenants.NAME.KEY"),
        ({"tenants.a/b.ddr_maximum_bytes": "1 GiB"}, "no slashes"),
        ({"tenants.acme.ddr_maximum_bytes": "-1"}, "expected bytes"),
        ({"tenants.*.ddr_guaranteed_bytes": "1 GiB"}, "only tenants by name"),
        ({"tenants.a.nvme_guaranteed_bytes": "2 GiB", "tenants.a.nvme_maximum_bytes": "1 GiB"}, "is more than"),
        ({"tenants.a.nvme_guaranteed_bytes": "3 GiB", "tenants.b.nvme_guaranteed_bytes": "2 GiB"}, "5 GiB together"),
        ({f"tenants.t{i}.ddr_guaranteed_bytes": "1" for i in range(17)}, "in whole slabs of 64 MiB"),
        ({"ddr.low_watermark": "0.96"}, "ddr.high_watermark = 0.95"),
        ({"nvme.high_watermark": "0"}, "a fraction"),
    ],
)
def test_tenants_and_watermarks_that_cannot_be(overrides, part):
    assert part in refusal(overrides=overrides)


def test_a_table_of_a_tenant_has_no_keys_outside_of_tenants(tmp_path):
    assert "say tenants.NAME.KEY" in refusal(written(tmp_path, "[tenants]\nddr_maximum_bytes = 5\n"))
