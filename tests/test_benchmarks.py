import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

from replay_judge import write_trace

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
RING = {
    "full_prefill_8k",
    "full_prefill_8k_vs_torch_template",
    "full_prefill_16k",
    "pass_q_t64",
    "pass_q_t320",
    "pass_kv_t320",
    "pass_q_t1024",
    "decode_64k_b1",
    "decode_64k_b4",
    "merge_error_f32_64parts",
    "shm_vs_gloo_16mib",
    "auto_worst",
}
GPU = {
    "gpu_ring_n4_vs_dense",
    "gpu_hidden_transfer_share",
    "gpu_reattach_vs_h2d",
    "gpu_decode_1m_tokens_hbm_share",
}
EVICTION = {
    "gap_share",
    "worst_vs_lru",
    "near_best_classical",
    "hbm_bytes_agent_a",
    "hbm_bytes_long_s1",
    "hbm_bytes_conv_h1",
    "us_per_block",
    "ms_per_request",
    "attach_decision_ms",
    "attach_whole_decision_ms",
    "bytes_per_extent",
}
ADAPTERS = {
    "ttft_ddr_vs_lmcache_ram",
    "ttft_nvme_vs_lmcache_disk",
    "ttft_ddr_vs_recompute",
    "miss_overhead",
    "miss_overhead_no_store",
}
HINTS = {f"hints_{what}_decode_{ms}ms" for what in ("wait", "round") for ms in (150, 40, 10)}
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
SIGNED = {"worst_vs_lru", "gap_share", "near_best_classical"}  # a policy may lose

GOAL_X = r'<line x1="([\d.]+)"[^>]* stroke="#222222"/>'
SPREAD_X = r'<line x1="[\d.]+" x2="([\d.]+)" y1="[\d.]+" y2="[\d.]+" stroke="#222222"/>\n</svg>'


@pytest.fixture(scope="module")
def modules():
    """Imports a module of the benchmarks by name, and forgets it afterwards."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module
    ours = [name for name in set(sys.modules) - before if (ROOT / "benchmarks" / f"{name}.py").exists()]
    for name in ours:
        del sys.modules[name]


@pytest.fixture(scope="module")
def rows(modules):
    return modules("rows")


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


def test_a_ratio_over_is_that_of_the_medians_and_tells_each_sides_spread(rows):
    times = {"ours": [0.3, 0.1, 0.2], "bare": [0.1, 0.1, 0.4], "ours_cpu": [1.0, 2.0, 3.0], "bare_cpu": [4.0, 1.0, 1.0]}
    one = rows.over_row("x", 2.0, times, "ours", "bare")
    assert (one.value, one.better, one.met) == (2.0, "lower", True)
    assert one.raw == {
        "ours_ms": 200.0,
        "bare_ms": 100.0,
        "ratio_min": 0.5,
        "ratio_max": 3.0,
        "cpu_ratio": 2.0,
        "spread_ours": 1.0,
        "spread_bare": 3.0,
        "rounds": 3.0,
    }


@pytest.mark.parametrize(("better", "value", "side"), [("lower", 2.0, "left"), ("higher", 2.0, "right")])
def test_a_bar_and_its_spread_lie_on_the_side_of_the_goal_that_they_reach(rows, modules, better, value, side):
    one = rows.row("x", value, 1.0, better, {"ratio_min": value, "ratio_max": value})
    drawn = modules("plot").picture([one], "title", 4.0)
    goal, spread = (float(re.search(pattern, drawn)[1]) for pattern in (GOAL_X, SPREAD_X))
    assert spread < goal if side == "left" else spread > goal


def test_curves_lie_within_their_axes_and_keep_their_numbers(modules):
    curves = modules("curves")
    line = curves.Curve("a <line>", ((1.0, 30.0), (100.0, 2000.0)))
    drawn = ET.fromstring(curves.curves([line], "t", curves.Axis("x", ticks=(2.0, 50.0)), curves.Axis("y")))
    left, top, width, height = curves.PLOT
    spots = [element for element in drawn.iter() if element.tag.endswith("circle")]
    assert [float(spot.get("cx")) for spot in spots] == [left, left + width]
    assert all(top <= float(spot.get("cy")) <= top + height for spot in spots)
    assert [spot[0].text for spot in spots] == ["1: 30", "100: 2000"]


def test_relative_curves_divide_by_the_lowest_at_each_point(modules):
    curves = modules("curves")
    lines = [curves.Curve("a", ((1.0, 2.0), (2.0, 9.0))), curves.Curve("b", ((1.0, 4.0), (2.0, 3.0)))]
    assert [line.points for line in curves.relative(lines)] == [((1.0, 1.0), (2.0, 3.0)), ((1.0, 2.0), (2.0, 1.0))]


def test_a_row_with_a_second_goal_is_met_only_with_both(rows):
    assert rows.row("x", 1.0, 0.9, "higher", {}).met
    assert not rows.row("x", 1.0, 0.9, "higher", {}, also=False).met
    assert not rows.row("x", 0.8, 0.9, "higher", {}, also=True).met


@pytest.mark.parametrize("tokens", [64, 61, 9])
def test_a_virtual_ring_computes_what_one_dense_call_does(modules, tokens):
    gpu = modules("ring_gpu")
    sizes = gpu.GpuSizes(heads=4, kv_heads=2, dim=16)
    assert gpu.Ring(torch.device("cpu"), sizes, tokens, torch.float32).apart() < 1e-5


def test_a_virtual_ring_copies_every_message_or_leaves_all_out(modules):
    gpu, virtual = modules("ring_gpu"), modules("virtual_ring")
    ring = gpu.Ring(torch.device("cpu"), gpu.GpuSizes(heads=4, kv_heads=2, dim=16), 64, torch.float32)
    counts = {}
    for transfers in virtual.Transfers:
        stage = virtual.Stage(ring.device, transfers)
        ring.ring(stage)
        counts[transfers.value] = len(stage.copies)
    assert counts == {"copied": gpu.RANKS * (gpu.RANKS - 1), "left out": 0}


def test_a_virtual_rank_that_raises_ends_the_ring(modules):
    virtual = modules("virtual_ring")

    def one_raises(rank):
        if rank.rank == 1:
            raise ValueError("rank 1")
        rank.shift(torch.zeros(3), torch.empty(3)).wait()
        rank.shift(torch.zeros(3), torch.empty(3)).wait()

    with pytest.raises(ValueError, match="rank 1"):
        virtual.run_virtual(3, virtual.Stage(torch.device("cpu"), virtual.Transfers.COPIED), one_raises)


def check_shape(report, names):
    assert set(report) == {"commit", "date", "machine", "rows"}
    assert {"cpu", "cores", "memory_gib", "kernel", "load_before", "load_after"} <= set(report["machine"])
    assert sorted(row["name"] for row in report["rows"]) == sorted(names)
    for row in report["rows"]:
        assert set(row) == {"name", "value", "goal", "better", "met", "raw"}
        assert row["value"] > 0 or row["name"] in SIGNED
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


def test_a_quick_run_of_hints_compares_answers_and_writes_every_row(tmp_path):
    sizes = ["--tokens", "512", "--rounds", "1", "--questions", "6"]
    check_shape(run("hints.py", tmp_path / "hints.json", *sizes), HINTS)


def test_a_quick_run_of_the_ring_compares_outputs_and_writes_every_row_and_picture(tmp_path):
    report = run("ring.py", tmp_path / "ring.json", "--quick", "--dir", tmp_path)
    check_shape(report, RING | (GPU if torch.cuda.is_available() else set()))
    assert {"communicator", "kernel", "calibration", "gpu", "dense_full_8k"} <= set(report["machine"])
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert drawn == {"ring", "ring_ttft", "ring_choice", "ring_scaling", "ring_memory"}
    assert all(ET.parse(path) for path in tmp_path.glob("*.svg"))


EVICTION_TRACES = ("mooncake_conversation_h1", "mooncake_synthetic_h1", "agentic_a", "longdoc_synth_s1")


def test_a_quick_run_of_eviction_replays_every_trace_and_writes_every_row_table_and_picture(tmp_path):
    ladder = [(100 * n, 600 * n, 9, n % 3, tuple(range(100 * (n % 5), 100 * (n % 5) + 40 + n))) for n in range(1, 30)]
    for name in EVICTION_TRACES:
        write_trace(tmp_path / f"{name}.jsonl.gz", ladder)
    report = run("eviction.py", tmp_path / "eviction.json", "--quick", "--traces", tmp_path)
    check_shape(report, EVICTION)
    table = [json.loads(line) for line in (tmp_path / "eviction_table.jsonl").read_text().splitlines()]
    assert len({(one["trace"], one["policy"], one["capacity"]) for one in table}) == len(table) == 4 * 4 * 4 + 3
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert drawn == {"eviction", *(f"eviction_{name}" for name in ("conv_h1", "syn_h1", "agent_a", "long_s1"))}
    assert all(ET.parse(path) for path in tmp_path.glob("*.svg"))


def test_eviction_without_its_traces_says_which_are_missing(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "eviction.py", "--traces", tmp_path, "--out", tmp_path / "x.json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "agentic_a.jsonl.gz" in done.stderr
    assert not (tmp_path / "x.json").exists()


def grid_of(**saved):
    """Every point of the table, by policy: what it saves."""
    points = [(trace, capacity) for trace in ("conv_h1", "syn_h1", "agent_a", "long_s1") for capacity in CAPACITIES]
    return {
        (trace, policy, capacity): {"prefill_seconds_saved": value(trace, capacity) if callable(value) else value}
        for policy, value in saved.items()
        for trace, capacity in points
    }


CAPACITIES = ("1%", "5%", "10%", "20%")


def test_the_rows_of_eviction_are_the_goals_arithmetic(modules):
    rows = modules("eviction_rows")
    grid = grid_of(lru=0.2, arc=0.25, belady=0.6, popularity=lambda trace, size: 0.4 if size == "1%" else 0.3)
    gap = rows.gap_row(grid)
    assert gap.value == pytest.approx((3 * 0.2 + 3 * 0.1) / (6 * 0.4))
    assert gap.raw["agent_a 1% share"] == pytest.approx(0.5)
    grid["syn_h1", "popularity", "20%"] = {"prefill_seconds_saved": 0.197}
    assert rows.worst_row(grid).value == pytest.approx(-0.003)
    assert not rows.worst_row(grid).met
    grid["syn_h1", "popularity", "10%"] = {"prefill_seconds_saved": 0.248}
    near = rows.hindsight_row(grid, ["lru", "arc"])
    assert (near.value, near.met) == (15.0, True)
    hits = [{"hit_tokens": 10**6 * n} for n in (40, 60, 80)]
    assert rows.hbm_row("agent_a", *hits, 10**8).value == pytest.approx(40 / 60, abs=1e-4)


def test_a_linear_axis_begins_at_nothing(modules):
    curves = modules("curves")
    up = curves.Axis("y", ticks=(0, 0.5, 1.0), linear=True)
    assert [up.share(value, (0.2, 0.9)) for value in (0, 0.25, 1.0)] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_result_has_the_same_shape(path):
    report = json.loads(path.read_text())
    names = {row["name"] for row in report["rows"]}
    known = {
        "reattach": [REATTACH],
        "store": [STORE, STORE | LMCACHE],
        "ring": [RING, RING | GPU],
        "eviction": [EVICTION],
        "hints": [HINTS],
        "adapters": [ADAPTERS],
    }
    assert names in known[path.stem]
    check_shape(report, names)
