"""`holdfast policy simulate` and the traces it reads, judged by a program that shares no code with it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from holdfast.eviction.policy import POLICIES
from holdfast.kvstore.errors import InvalidRequest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from holdfast import cli
from holdfast.simulation import Capacity, check_policy, prefill_flops, simulate
from holdfast.traces import blocks_of, joined, read_trace
from replay_judge import judge, write_trace

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
LRU = {  # capacity and prefill-seconds saved there: EVICTION.md section 3
    "mooncake_conversation_h1": ("1%", 0.0340),
    "mooncake_synthetic_h1": ("5%", 0.0264),
}
FIVE = [
    (0, 2000, 100, 1, (0, 1, 2, 3)),
    (1000, 2600, 10, 1, (0, 1, 2, 3, 4)),
    (2000, 1100, 10, 2, (10, 11, 12)),
    (3000.5, 2600, 10, 1, (0, 1, 2, 3, 4)),
    (4000, 600, 0, -1, (10, 13)),
]


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["policy", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def simulated(*arguments):
    result = run("simulate", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@st.composite
def traces(draw):
    """Requests over a forest of 512-token blocks, with times that stand still now and then."""
    made, lines, now = [], [], 0
    for _ in range(draw(st.integers(1, 25))):
        front = draw(st.sampled_from(made)) if made and draw(st.integers(0, 3)) else ()
        front = front[: draw(st.integers(0, len(front)))]
        first = 7 * sum(map(len, made)) + 1
        blocks = (*front, *range(first, first + draw(st.integers(0, 6))))
        made.append(blocks)
        now += draw(st.sampled_from([0, 1, 1000, 60_000]))
        tokens = max(1, 512 * len(blocks) + draw(st.integers(-511, 511)))
        lines.append((now, tokens, draw(st.integers(0, 500)), draw(st.integers(-1, 3)), blocks))
    return lines


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(lines=traces(), join=st.integers(1, 3), percent=st.integers(5, 100))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_an_outsider_recomputes_every_result_from_its_events(tmp_path, name, lines, join, percent):
    path = write_trace(tmp_path / "made.jsonl", lines)
    assume(any(line[4] for line in lines))
    trace = read_trace(path, 512 * join)
    if trace.unit_count * percent < 100:
        percent = 100
    events = tmp_path / "events.jsonl"
    options = ("--policy", name, "--capacity", f"{percent}%", "--block-tokens", 512 * join, "--events", events)
    (result,) = simulated("--trace", path, *options)
    judge(path, events, result)


def test_the_judge_notices_a_wrong_hit_an_inner_eviction_and_an_overflow(tmp_path):
    path = write_trace(tmp_path / "five.jsonl.gz", FIVE)
    events = tmp_path / "events.jsonl.gz"
    (result,) = simulated("--trace", path, "--policy", "lru", "--capacity", "50%", "--events", events)
    judge(path, events, result)
    heading, *lines = [json.loads(line) for line in gzip.decompress(events.read_bytes()).splitlines()]

    def planted(number, **changes):
        wrong = [heading, *lines]
        wrong[number + 1] = wrong[number + 1] | changes
        name = tmp_path / "wrong.jsonl"
        name.write_text("\n".join(map(json.dumps, wrong)))
        with pytest.raises((AssertionError, KeyError)):
            judge(path, name, result)

    assert lines[1]["hit_blocks"] == 4
    planted(1, hit_blocks=3)
    planted(0, inserted=[[0, 1], [1, 1], [2, 1], [3, 1], [4, 1], [10, 1]])
    planted(2, evicted=[[2, 1], *lines[2]["evicted"]])


def test_what_the_fields_mean(tmp_path):
    path = write_trace(tmp_path / "five.jsonl", FIVE)
    found = simulated("--trace", path, "--policy", "lru", "--capacity", "100%,60%")
    assert [(one["capacity"], one["capacity_blocks"]) for one in found] == [("100%", 9), ("60%", 5)]
    everything = found[0]
    hits, inputs = (0, 2048, 0, 2560, 512), [line[1] for line in FIVE]
    assert everything["requests"] == 5
    assert everything["token_hit_ratio"] == pytest.approx(sum(hits) / sum(inputs))
    saved = sum(map(prefill_flops, hits)) / sum(map(prefill_flops, inputs))
    assert everything["prefill_seconds_saved"] == pytest.approx(saved)
    assert everything["blocks_touched"] == sum(len(line[4]) for line in FIVE)
    assert everything["trace"] == str(path)
    assert prefill_flops(2) == 2 * 70e9 * 2 + 2 * 80 * 8192 * 4


def test_several_replays_write_a_file_each_and_equal_replays_equal_files(tmp_path):
    path = write_trace(tmp_path / "five.jsonl.gz", FIVE)
    options = ("--trace", path, "--policy", "lru,popularity", "--capacity", "40%,1.5GB", "--events")
    found = simulated(*options, tmp_path / "a.jsonl.gz")
    names = [Path(one["events_file"]).name for one in found]
    sizes = ("40pct", "1.5GB")
    assert names == [f"a.five.{policy}.{size}.jsonl.gz" for policy in ("lru", "popularity") for size in sizes]
    assert [one["capacity_blocks"] for one in found] == [3, 8, 3, 8]
    for one in found:
        judge(path, one["events_file"], one)
    again = simulated(*options, tmp_path / "b.jsonl.gz")
    for one, other in zip(found, again, strict=True):
        assert Path(one["events_file"]).read_bytes() == Path(other["events_file"]).read_bytes()


def test_holding_what_is_in_use_is_judged_too(tmp_path):
    path = write_trace(tmp_path / "five.jsonl", FIVE)
    events = tmp_path / "events.jsonl"
    options = ("--trace", path, "--policy", "lru", "--capacity", "45%", "--events", events)
    (free,) = simulated(*options)
    (held,) = simulated(*options, "--hold", "0.05")
    judge(path, events, held)
    assert held["hit_tokens"] > free["hit_tokens"]


def test_tiers_move_bytes_by_the_hops_that_are_reported(tmp_path):
    """HBM holds four blocks of nine, DDR five; what is over falls to NVMe."""
    path = write_trace(tmp_path / "five.jsonl", FIVE)
    options = ("--tiers", "nvme=100%,hbm=45%,ddr=56%", "--ddr-speed", "100", "--nvme-speed", "10")
    (found,) = simulated("--trace", path, "--policy", "lru", *options)
    block = 512 * 327_680
    assert found["tiers"] == "hbm=45%,ddr=56%,nvme=100%"
    assert found["tier_blocks"] == {"hbm": 4, "ddr": 5, "nvme": 9}
    assert found["hit_tokens"] == 2048 + 2560 + 512
    hits = {tier: round(share * 10) for tier, share in found["hit_shares"].items()}
    assert hits == {"hbm": 5, "ddr": 1, "nvme": 4}
    assert found["moved_bytes"] == {
        "ddr>hbm": 1 * block,
        "nvme>hbm": 4 * block,
        "hbm>ddr": 9 * block,
        "ddr>nvme": 6 * block,
    }
    assert found["swaps"] == 2
    seconds = [block * (ddr / 100e9 + nvme / 10e9) for ddr, nvme in ((1, 3), (0, 1))]
    assert found["swap_seconds_mean"] == pytest.approx(sum(seconds) / 2)
    assert found["swap_seconds_p95"] == pytest.approx(max(seconds))
    asked = sum(prefill_flops(line[1]) for line in FIVE) / found["assumed"]["flops_per_second"]
    net = found["prefill_seconds_saved"] - sum(seconds) / asked
    assert found["net_seconds_saved"] == pytest.approx(net)
    shown = run("simulate", "--trace", path, "--policy", "lru,arc", *options).stdout
    assert "assumed, not measured: ddr 100 GB/s, nvme 10 GB/s" in shown


@pytest.mark.parametrize(
    "options",
    [
        ("--tiers", "hbm=5%"),
        ("--tiers", "ddr=5%,nvme=5%"),
        ("--tiers", "hbm=5%,hbm=6%"),
        ("--tiers", "hbm=5%,tape=6%"),
        ("--tiers", "hbm=5%,ddr"),
        ("--tiers", "hbm=50%,ddr=50%", "--capacity", "5%"),
        ("--tiers", "hbm=50%,ddr=50%", "--events", "x.jsonl"),
        ("--plot", "x.pdf"),
        ("--capacity", "50%", "--events", "/nowhere/x.jsonl"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options):
    path = write_trace(tmp_path / "five.jsonl", FIVE)
    result = run("simulate", "--trace", path, "--policy", "lru", *options)
    assert result.exit_code in {1, 2}, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")


def test_curves_are_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    path = write_trace(tmp_path / "five.jsonl", FIVE)
    picture = tmp_path / "curves.png"
    run("simulate", "--trace", path, "--policy", "lru,belady", "--capacity", "20%,100%", "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named_before_anything_is_replayed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("simulate", "--trace", tmp_path / "nowhere.jsonl", "--policy", "lru", "--plot", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "holdfast[plot]" in result.stderr


def test_units_are_joined_and_what_remains_is_named_apart():
    assert joined((5, 6, 7, 8, 9), 2) == (6, 8, -10)
    assert joined((5, 6), 2) == (6,)
    assert joined((5,), 4) == (-6,)
    assert blocks_of(6, 2048, 2048) == (6, 4)
    assert blocks_of(-6, 2048 + 1025, 2048) == (5, 3)


def test_people_see_a_table(tmp_path):
    path = write_trace(tmp_path / "five.jsonl", FIVE)
    shown = run("simulate", "--trace", path, "--policy", "lru", "--capacity", "100%").stdout
    assert "5 requests, 9 different blocks of 512 tokens" in shown
    assert "POLICY" in shown
    listed = run("ls").stdout
    assert all(name in listed for name in (*POLICIES, "belady"))


BAD = [
    ('{"ts": 0, "in": 5}', "bad.jsonl:2", "runs"),
    ("nonsense", "bad.jsonl:2", "malformed"),
    ('{"ts": 0, "in": 5, "runs": [3]}', "bad.jsonl:2", "pairs"),
    ('{"ts": 0, "in": 5, "runs": [3, 0]}', "bad.jsonl:2", "length >= 1"),
    ('{"ts": 0, "in": 5, "runs": [3, 9999999999]}', "bad.jsonl:2", "blocks in one request"),
    ('{"ts": 0, "in": -5, "runs": [3, 1]}', "bad.jsonl:2", "at least 0"),
    ('{"ts": 5, "in": 5, "runs": [9, 1]}\n{"ts": 4, "in": 5, "runs": [9, 1]}', "bad.jsonl:3", "sort"),
    ('{"ts": 0, "in": 5, "runs": [3, 1, 1, 1]}', "bad.jsonl:2", "chain"),
]


@pytest.mark.parametrize(("line", "where", "what"), BAD)
def test_a_bad_line_is_named(tmp_path, line, where, what):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"ts": 0, "in": 600, "out": 1, "sid": -1, "runs": [1, 2]}\n' + line + "\n")
    with pytest.raises(InvalidRequest) as caught:
        read_trace(path, 512)
    assert where in caught.value.message
    assert what in caught.value.message


def test_what_is_no_trace_is_refused_with_advice(tmp_path):
    good = write_trace(tmp_path / "good.jsonl", FIVE)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(good.read_bytes())[:-12])
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_bytes(good.read_bytes())
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    for name, what in (
        ("cut.jsonl.gz", "damaged"),
        ("plain.jsonl.gz", "damaged"),
        ("empty.jsonl", "no request"),
        ("nowhere.jsonl", "No such file"),
    ):
        with pytest.raises(InvalidRequest, match=what):
            read_trace(tmp_path / name, 512)
    with pytest.raises(InvalidRequest, match="say 1024"):
        read_trace(good, 1000)
    for text in ("0%", "101%", "five", "-1%"):
        with pytest.raises(InvalidRequest, match="300GB"):
            Capacity.parse(text)
    with pytest.raises(InvalidRequest, match="holds no block"):
        simulate(read_trace(good, 512), "lru", Capacity.parse("1%"))
    with pytest.raises(InvalidRequest, match="there are lru"):
        check_policy("mru")
    result = run("simulate", "--trace", good, "--policy", "lru", "--block-tokens", "700")
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize("name", sorted(LRU))
def test_lru_reproduces_what_was_measured_before(name):
    path = TRACES / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip("the shared traces are not there")
    capacity, expected = LRU[name]
    found = simulate(read_trace(path, 512), "lru", Capacity.parse(capacity))
    assert found["prefill_seconds_saved"] == pytest.approx(expected, abs=2e-4)


def test_it_needs_neither_torch_nor_a_daemon(tmp_path):
    path = write_trace(tmp_path / "five.jsonl", FIVE)
    program = (
        "import sys; from holdfast.cli import app\n"
        f"try: app(['policy', 'simulate', '--trace', {str(path)!r}, '--policy', 'lru', '--capacity', '50%'])\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'sqlite3', 'matplotlib'} & set(sys.modules), 'loaded'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
