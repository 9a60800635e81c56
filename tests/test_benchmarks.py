import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REATTACH = {
    "put_vs_memcpy",
    "put_commit_vs_memcpy",
    "commit_ms",
    "attach_resident_p50_ms",
    "attach_resident_p99_ms",
    "nvme_read_vs_raw",
    "nvme_write_vs_raw",
    "ddr_to_hbm_vs_memcpy",
    "reshard_ddr_to_hbm_vs_memcpy",
    "recompute_vs_reattach_nvme",
    "loop_lag_ms",
}
LMCACHE = {
    "lmcache_ram_retrieve_vs_ours",
    "lmcache_disk_store_vs_ours",
    "lmcache_disk_overwrite_vs_ours",
    "lmcache_disk_load_cold_vs_ours",
}
STORE = {
    "put_vs_memcpy",
    "put_checksummed_vs_memcpy",
    "attach_resident_1gib_ms",
    "copy_out_vs_memcpy",
    "nvme_read_vs_raw",
    "nvme_read_vs_raw_256kib",
    "nvme_write_durable_vs_raw",
    "attach_under_write_storm",
    "lookup_1m_tokens_ms",
    "loop_lag_ms",
    "daemon_rss_mib",
    "recovery_100k_extents_s",
}


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import rows

        yield rows
        del sys.modules["rows"]


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (1, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)])
def test_a_percentile_is_the_nearest_rank(rows, percent, expected):
    assert rows.percentile(range(100, 0, -1), percent) == expected


def test_the_percentile_of_one_sample_is_that_sample(rows):
    assert rows.percentile([7.0], 99) == 7.0


@pytest.mark.parametrize(
    ("value", "better", "met"),
    [(0.9, "higher", True), (0.89, "higher", False), (0.9, "lower", True), (0.91, "lower", False)],
)
def test_a_goal_is_met_when_reached_and_missed_when_not(rows, value, better, met):
    assert rows.is_met(value, 0.9, better) is met


def test_a_ratio_is_the_median_of_pairs_and_keeps_its_spread(rows):
    times = {"ours": [0.2, 0.1, 0.4], "bare": [0.1, 0.1, 0.1], "beside": [0.003, 0.001, 0.002]}
    one = rows.ratio_row("x", 0.9, times, "ours", "bare", "beside")
    assert (one.value, one.better, one.met) == (0.5, "higher", False)
    assert one.raw == {
        "ours_ms": 200.0,
        "bare_ms": 100.0,
        "ratio_min": 0.25,
        "ratio_max": 1.0,
        "samples": 3.0,
        "beside_ms": 2.0,
    }


def test_cpu_times_are_told_beside_the_wall_clock(rows):
    times = {"ours": [2.0], "bare": [1.0], "ours_cpu": [1.0], "bare_cpu": [0.8]}
    assert rows.ratio_row("x", 0.9, times, "ours", "bare").raw["cpu_ratio"] == 0.8


def test_a_row_with_a_second_goal_is_met_only_with_both(rows):
    assert rows.row("x", 1.0, 0.9, "higher", {}).met
    assert not rows.row("x", 1.0, 0.9, "higher", {}, also=False).met
    assert not rows.row("x", 0.8, 0.9, "higher", {}, also=True).met


def check_shape(report, names):
    assert set(report) == {"commit", "date", "machine", "rows"}
    assert {"cpu", "cores", "memory_gib", "kernel", "load_before", "load_after"} <= set(report["machine"])
    assert sorted(row["name"] for row in report["rows"]) == sorted(names)
    for row in report["rows"]:
        assert set(row) == {"name", "value", "goal", "better", "met", "raw"}
        assert row["value"] > 0
        reached = row["value"] <= row["goal"] if row["better"] == "lower" else row["value"] >= row["goal"]
        assert reached or not row["met"]
        assert row["met"] == (reached and row["raw"].get("growth", 0) <= row["raw"].get("growth_goal", 0))
        assert names == REATTACH or row["raw"]["rounds"] >= 1
        assert all(isinstance(number, float) for number in row["raw"].values())


def run(script, out, *options):
    command = [sys.executable, ROOT / "benchmarks" / script, *options, "--out", out]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.timeout(60)
def test_a_tiny_reattach_verifies_its_bytes_and_writes_every_row(tmp_path):
    sizes = ["--size-mib", "4", "--rounds", "1", "--prefill-tokens", "128"]
    check_shape(run("reattach.py", tmp_path / "reattach.json", *sizes), REATTACH)


def test_a_quick_run_of_the_store_verifies_its_bytes_and_writes_every_row_of_its_own(tmp_path):
    report = run("store.py", tmp_path / "store.json", "--quick", "--dir", tmp_path)
    check_shape(report, STORE)
    assert {"arena", "direct_io", "noise"} <= set(report["machine"])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_result_has_the_same_shape(path):
    report = json.loads(path.read_text())
    names = {row["name"] for row in report["rows"]}
    assert names in {"reattach": [REATTACH], "store": [STORE, STORE | LMCACHE]}[path.stem]
    check_shape(report, names)
