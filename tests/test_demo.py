"""The demo, smaller than shipped: real processes, and one JSON object that says what happened."""

import json
import os
import signal
import subprocess
import sys

import pytest

from holdfast.demo_stage import scratch

KEYS = {
    "tokens_identical",
    "max_logit_error",
    "control_detected",
    "cp_degrees",
    "questions",
    "pressure",
    "metrics",
    "passed",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A demo over 2,048 tokens."""
    directory = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "holdfast", "demo", "--json", "--tokens", "2048"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=directory, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


def test_every_answer_is_the_oracles_at_every_degree(report):
    """Stored by two ranks, answered by one, two and three: same tokens, logits within 1e-4."""
    assert report.keys() >= KEYS
    assert report["tokens_identical"] is True
    assert report["max_logit_error"] <= 1e-4
    assert report["cp_degrees"] == [1, 2, 3]
    assert report["stored_with_cp"] == 2
    assert report["daemon_killed"] is True
    assert report["passed"] is True


def test_a_corrupted_extent_is_noticed(report):
    """The comparison can fail."""
    assert report["control_detected"] is True
    assert report["control_max_logit_error"] > 1e-2


def test_receipts_say_where_the_bytes_came_from(report):
    """After the restart the first answer comes from NVMe, the next from HBM without a move, then one from DDR."""
    for cp in (1, 3):
        asked = [record for record in report["questions"] if record["cp"] == cp][:3]
        assert [record["source_tier"] for record in asked] == ["nvme", "hbm", "ddr"]
        assert [bool(record["moved_bytes"]) for record in asked] == [True, False, True]
        assert {hop["hop"] for hop in asked[0]["hops"]} == {"nvme->ddr", "ddr->hbm"}


def test_the_pinned_and_the_popular_stay(report):
    """Under pressure cold documents leave DDR, the pinned and the popular one do not."""
    assert report["pressure_as_expected"] is True
    left = [fate for fate in report["pressure"] if "left" in fate["why"]]
    assert left
    assert {fate["role"] for fate in left} == {"cold"}


def test_the_four_metrics_are_measured(report):
    """Concurrency, prefill, decode and context switch are there and positive."""
    metrics = report["metrics"]
    assert min(metrics["concurrency_documents"].values()) >= 1
    assert metrics["prefill_tokens_per_second"] > 0
    assert set(metrics["decode_tokens_per_second"]) == {"1", "2", "3"}
    assert set(metrics["context_switch_seconds"]) == {"hbm", "ddr", "nvme"}


def test_a_text_too_short_is_refused_in_one_line(tmp_path):
    """Bad input is a sentence and exit status 2, not a traceback."""
    path = tmp_path / "short.txt"
    path.write_text("too short")
    command = [sys.executable, "-m", "holdfast", "demo", "--document", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert "at least 4096" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_data_directory_that_no_demo_made_is_left_alone(tmp_path):
    """The demo empties what an earlier demo left, and nothing else."""
    catalog = tmp_path / "catalog.sqlite"
    catalog.write_text("somebody's")
    command = [sys.executable, "-m", "holdfast", "demo", "--data-dir", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert "no demo made it" in ran.stderr
    assert catalog.read_text() == "somebody's"
    made = tmp_path / "made"
    with scratch(made):
        (made / "catalog.sqlite").touch()
    with scratch(made) as again:
        assert not (again / "catalog.sqlite").exists()


def test_sigterm_leaves_nothing_behind(tmp_path):
    """Its daemon, its ranks and its temporary directory go."""
    command = [sys.executable, "-m", "holdfast", "demo"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Prefilling" in line:
                break
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
