"""`holdfast calibrate` with and without a daemon: real measurements of one round, stored and shown."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
from holdfast.kvstore.catalog import Catalog
from holdfast.kvstore.orders import PutRings
from typer.testing import CliRunner

from daemon_process import DaemonProcess
from fakes import ring
from holdfast import cli

SETTINGS = ("nvme.threads=2", "ddr.capacity_bytes=1 MiB", "ddr.slab_bytes=64 KiB")
RATES = ["ddr", "ddr->nvme", "nvme->ddr", "ddr->hbm", "hbm->ddr"]


def run(*words, code=0):
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def settings(tmp_path):
    made = tmp_path / "shared"
    made.mkdir()
    words = ["--data-dir", str(tmp_path / "data"), "calibrate", "--set", f"ddr.directory={made}"]
    for setting in SETTINGS:
        words += ["--set", setting]
    yield words
    assert not list(made.iterdir()), "scratch memory is left"
    assert not list((tmp_path / "data").glob("nvme/*")), "scratch files are left"


def test_without_a_daemon_the_catalog_keeps_it(settings):
    said = run(*settings, "--show").stdout
    assert "not calibrated yet" in said
    measured = json.loads(run(*settings, "--rounds", "1", "--json").stdout)["calibration"]
    assert [rate["name"] for rate in measured["rates"]] == RATES
    assert json.loads(run(*settings, "--show", "--json").stdout)["calibration"] == measured
    said = run(*settings, "--show").stdout
    for word in (*RATES, "GB/s", "LATENCY", measured["machine"], "unknown: gpus:"):
        assert word in said


def test_what_groups_were_measured_to_do_is_shown_newest_first(settings, tmp_path):
    (tmp_path / "data").mkdir()
    with closing(Catalog(tmp_path / "data" / "catalog.sqlite")) as catalog:
        catalog.commit([PutRings((ring(cp=4), ring(2)))])
    found = json.loads(run(*settings, "--show", "--json").stdout)
    assert found["calibration"] is None
    assert [rate["setting"]["cp"] for rate in found["rings"]] == [2, 4]
    said = run(*settings, "--show").stdout
    assert "not calibrated yet" in said
    for word in ("cp=2 tp=1 gloo, cpu_flash, cpu", "8/2 x 64 float32", "80 GFLOP/s", "1.30 GB/s", "90 us", "10%"):
        assert word in said
    assert "PASS-KV FROM (P=32K)" in said
    assert "T=4000" in said
    assert "never" in said


def test_a_daemon_takes_it_over_and_still_has_it_after_sigkill():
    with DaemonProcess() as daemon:
        daemon.start()
        words = ["--data-dir", str(daemon.data_dir), "calibrate"]
        for key, value in daemon.settings.items():
            words += ["--set", f"{key}={value}"]
        found = json.loads(run(*words, "--rounds", "1", "--json").stdout)
        links = {link["hop"]: link for link in found["links"]}
        rates = {rate["name"]: rate for rate in found["calibration"]["rates"]}
        for hop in RATES[1:]:
            assert links[hop]["bytes_per_second"] == rates[hop]["bytes_per_second"]
        assert daemon.data_dir.joinpath("nvme").is_dir(), "the daemon's own directory is gone"
        assert found["prediction"] == {"swaps": 0, "median_error": None, "p90_error": None}
        daemon.restart()
        again = json.loads(run(*words, "--show", "--json").stdout)
        assert again["calibration"] == found["calibration"]


def test_a_daemon_elsewhere_is_not_measured_here(settings):
    result = run("--url", "http://127.0.0.1:1", *settings, "--rounds", "1", code=2)
    assert "the machine it runs on" in result.stderr
    run("--url", "http://127.0.0.1:1", *settings, "--show", code=5)
