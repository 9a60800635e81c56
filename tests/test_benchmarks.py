import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
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


def check_shape(report):
    assert set(report) == {"commit", "date", "machine", "rows"}
    assert {"cpu", "cores", "memory_gib", "kernel"} <= set(report["machine"])
    assert {row["name"] for row in report["rows"]} == NAMES
    for row in report["rows"]:
        assert set(row) == {"name", "value", "goal", "better", "met", "raw"}
        assert row["value"] > 0
        reached = row["value"] <= row["goal"] if row["better"] == "lower" else row["value"] >= row["goal"]
        assert row["met"] is reached
        assert all(isinstance(number, float) for number in row["raw"].values())


@pytest.mark.timeout(60)
def test_a_tiny_run_verifies_its_bytes_and_writes_every_row(tmp_path):
    out = tmp_path / "reattach.json"
    script = ROOT / "benchmarks" / "reattach.py"
    sizes = ["--size-mib", "4", "--rounds", "1", "--prefill-tokens", "128"]
    subprocess.run([sys.executable, script, *sizes, "--out", out], check=True, capture_output=True, timeout=50)
    check_shape(json.loads(out.read_text()))


def test_the_committed_result_has_the_same_shape():
    check_shape(json.loads((ROOT / "benchmarks" / "results" / "reattach.json").read_text()))
