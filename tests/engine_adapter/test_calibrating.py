"""Groups measure themselves: by command, or at their start when the daemon knows nothing that fits."""

import json
from contextlib import closing
from dataclasses import replace

import msgspec
import pytest
from holdfast.engine_adapter import calibrating
from holdfast.engine_adapter.calibrating import Calibrating
from holdfast.engine_adapter.fake import FakeEngine
from holdfast.engine_adapter.group import GroupOptions, RankGroup
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.calibration import RingRate
from holdfast.kvstore.client import Client
from holdfast.kvstore.clock import SystemClock
from holdfast.ring_attention import group_measure, ring_measure
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.identity import digest_of, read_config, spec_of
from holdfast.ring_attention.local import run_ranks
from holdfast.ring_attention.runner import ContextParallelRunner
from holdfast.ring_attention.synthetic import write_checkpoint
from typer.testing import CliRunner

from daemon_process import DaemonProcess
from holdfast import cli

CONFIG = ModelConfig(
    vocabulary_size=256, hidden_size=32, intermediate_size=64, layers=1, heads=4, kv_heads=2, head_dim=16
)

SETTINGS = {
    "ddr__capacity_bytes": "16 MiB",
    "ddr__slab_bytes": "8 MiB",
    "nvme__capacity_bytes": "16 MiB",
    "nvme__segment_bytes": "8 MiB",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    model = tmp_path_factory.mktemp("calibrating") / "model"
    write_checkpoint(model, CONFIG)
    with DaemonProcess(**SETTINGS) as daemon:
        daemon.start()
        yield daemon, model


def rings(daemon):
    return daemon.rest().get("/v1/calibration")["rings"]


def test_by_command_and_a_group_that_starts_finds_it(place):
    daemon, model = place
    words = ["--data-dir", str(daemon.data_dir), "calibrate", "--model", str(model), "--cp", "2", "--threads", "1"]
    result = CliRunner().invoke(cli.app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    (rate,) = measured["rings"]
    assert (rate["setting"]["cp"], rate["setting"]["heads"], rate["setting"]["kv_heads"]) == (2, 4, 2)
    assert measured["prefills"][0][:2] == [0, 256]
    assert rings(daemon) == [rate]
    assert daemon.rest().get("/v1/groups") == {"groups": []}
    steady = rate | {"speed": rate["speed"] | {"spread": 0.0}}  # on a busy machine the group would try to do better
    with closing(Client(daemon.socket)) as client:
        client.keep_ring(msgspec.convert(steady, RingRate))
    options = GroupOptions(name="g", model=model, cp=2, rows=64, threads=1, daemon_socket=daemon.socket)
    with RankGroup(options, spec_of(read_config(model), digest_of(model))):
        assert rings(daemon) == [steady]  # found: nothing was measured anew
    shown = CliRunner().invoke(cli.app, [*words[:3], "--show"]).stdout
    assert "cp=2 tp=1" in shown
    assert "PASS-KV FROM (P=128K)" in shown


def test_what_an_ingest_took_is_told_with_the_number_of_ranks(place, monkeypatch):
    told = []
    monkeypatch.setattr(Client, "observe_prefill", lambda _, fingerprint, points, ranks: told.append((points, ranks)))
    daemon, model = place
    spec = spec_of(read_config(model), digest_of(model))
    engine = FakeEngine("fake", spec, cp=3, rows=200, daemon_socket=daemon.socket)
    with closing(engine), closing(Client(daemon.socket)) as client:
        Session(client, engine).ingest("report", [1, 2, 3] * 30)
        client.delete("report")
    ((points, ranks),) = told
    assert sum(new for _, new, _ in points) == 90
    assert ranks == 3


def test_without_a_daemon_the_command_says_so(place, tmp_path):
    words = ["--data-dir", str(tmp_path), "calibrate", "--model", str(place[1])]
    assert CliRunner().invoke(cli.app, words).exit_code == 5


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(ring_measure, "PROBE_NS", 100_000)
    monkeypatch.setattr(ring_measure, "ROUNDS", 2)
    monkeypatch.setattr(group_measure, "PREFILL_TOKENS", (8, 16))


def group(model, socket, act, cp=2):
    def rank(communicator):
        runner = ContextParallelRunner(model, communicator)
        return act(Calibrating(socket, "default", SystemClock()), runner)

    return run_ranks(cp, rank)


def test_a_start_measures_until_the_machine_was_quiet_once(place, quick, monkeypatch, tiny):
    daemon, _ = place

    def choose(calibrating, runner):
        calibrating.choose(runner)
        return runner.choice.speed

    def start(spread):
        """A group starts, and would measure itself with that spread."""
        monkeypatch.setattr(calibrating, "measure_rate", lambda *given: spreading(measure(*given), spread))
        first, second = group(tiny, daemon.socket, choose)
        assert first == second
        kept = [rate["speed"]["spread"] for rate in rings(daemon) if rate["setting"]["communicator"] == "local"]
        return first.spread, kept

    measure = calibrating.measure_rate
    assert start(3.0) == (3.0, [3.0])
    assert start(5.0) == (3.0, [3.0])  # no better: what is known is used, and stays
    assert start(2.0) == (2.0, [2.0])
    assert start(0.25) == (0.25, [0.25])
    monkeypatch.setattr(calibrating, "measure_rate", lambda *_: pytest.fail("it is known"))
    assert [speed.spread for speed in group(tiny, daemon.socket, choose)] == [0.25, 0.25]


def spreading(rate, spread):
    return replace(rate, speed=replace(rate.speed, spread=spread))


def test_a_daemon_that_does_not_answer_costs_a_measurement_and_no_more(quick, tiny, tmp_path):
    def choose(calibrating, runner):
        calibrating.choose(runner)
        return runner.choice.decide([(1, 1000)]).pass_q_seconds

    first, second = group(tiny, tmp_path / "nobody", choose)
    assert first == second > 0


def test_one_rank_has_prefills_to_measure_and_nothing_else(quick, tiny, tmp_path):
    (measured,) = group(tiny, tmp_path / "nobody", Calibrating.measure, cp=1)
    assert measured.rate is None
    assert [point[:2] for point in measured.prefills] == [(0, 8), (8, 8), (0, 16), (16, 16)]


@pytest.fixture
def tiny(place):
    from holdfast.ring_attention.checkpoint import load_model

    return load_model(place[1])
