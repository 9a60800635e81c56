"""`holdfast trace record`: of a real daemon, and what it writes is replayed."""

from __future__ import annotations

import json

import pytest
from holdfast.kvstore.errors import InvalidRequest, Unavailable
from typer.testing import CliRunner

from daemon_process import DaemonProcess, fetch, put
from holdfast import cli
from holdfast.json_lines import JsonLines
from holdfast.recording import SETTLED_NS, Numbering, Past, Recorder, record
from holdfast.traces import expand, read_trace, runs_of
from replay_judge import judge, lines_of


def run(*arguments):
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_what_a_daemon_was_asked_replays_and_names_nothing(tmp_path):
    out, events = tmp_path / "live.jsonl.gz", tmp_path / "events.jsonl"
    with DaemonProcess() as daemon:
        client = daemon.start().client()
        put(client, "secret-report", 1100)
        put(client, "secret-letter", 96)
        for name in ("secret-report", "secret-letter", "secret-report"):
            fetch(client, name)
        url = daemon.rest().url
        options = ("--out", out, "--past", "--requests", 5, "--seconds", 20, "--json")
        result = run("--url", url, "trace", "record", *options)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == {"out": str(out), "requests": 5, "blocks": 4, "lost": 0}
        empty = tmp_path / "empty.jsonl"
        shown = run("--url", url, "trace", "record", "--out", empty, "--seconds", 0)
        assert "0 requests" in shown.stdout
        assert empty.read_bytes() == b""
    lines = lines_of(out)
    assert [line["in"] for line in lines] == [1100, 96, 1100, 96, 1100]
    assert [line["sid"] for line in lines] == [0, 1, 0, 1, 0]
    assert [line["runs"] for line in lines] == [[0, 3], [3, 1], [0, 3], [3, 1], [0, 3]]
    assert lines[0]["ts"] == 0
    assert set().union(*lines) == {"ts", "in", "out", "sid", "runs"}
    simulate = ("policy", "simulate", "--trace", out, "--policy", "lru", "--capacity", "100%", "--events", events)
    found = json.loads(run(*simulate, "--json").stdout)
    judge(out, events, found)
    assert found["token_hit_ratio"] == pytest.approx((1100 + 96 + 1100) / sum(line["in"] for line in lines))


def test_the_daemon_hands_out_uses_from_a_cursor_on():
    with DaemonProcess() as daemon:
        client = daemon.start().client()
        put(client, "a", 96)
        rest = daemon.rest()
        now = rest.get("/v1/uses")
        assert (now["uses"], now["next_cursor"], now["newest"], now["lost"]) == ([], 1, 1, 0)
        fetch(client, "a")
        page = rest.get("/v1/uses", {"cursor": "1"})
        (found,) = page["uses"]
        assert (found["number"], found["document"], found["token_count"], found["open"]) == (1, "default/a", 96, False)
        assert page["life"] == now["life"]
        assert rest.get("/v1/uses", {"cursor": "99"})["next_cursor"] == 2
        with pytest.raises(InvalidRequest):
            rest.get("/v1/uses", {"cursor": "-1"})


class Scripted:
    """Answers as a daemon would that was asked these uses, of which it remembers those from `first` on."""

    def __init__(self, uses, first=0, life=1):
        self.uses, self.first, self.life = uses, first, life

    def get(self, _, query):
        cursor = int(query.get("cursor", len(self.uses)))
        found = self.uses[max(cursor, self.first) :][:2]
        return {
            "life": self.life,
            "now_ns": 10**12,
            "uses": found,
            "lost": found[0]["number"] - cursor if found else 0,
            "next_cursor": found[-1]["number"] + 1 if found else cursor,
            "newest": len(self.uses),
        }


def use(number, *, document="t/a", extents=("x", "y"), answer=0, is_open=False, age_ns=0):
    return {
        "number": number,
        "at_ns": 10**12 - age_ns,
        "document": document,
        "extents": list(extents),
        "extent_tokens": 512,
        "token_count": 512 * len(extents),
        "answer_tokens": answer,
        "open": is_open,
    }


def test_a_line_waits_for_its_answer_but_not_for_ever(tmp_path):
    waiting = use(1, is_open=True)
    rest = Scripted([use(0), waiting, use(2)])
    with JsonLines(tmp_path / "a.jsonl") as file:
        recorder = Recorder(rest, file, None)
        recorder.begin(Past.REMEMBERED)
        recorder.poll()
        assert recorder.requests == 1
        waiting["answer_tokens"] = 9
        waiting["at_ns"] -= SETTLED_NS
        recorder.poll()
        assert recorder.requests == 3
    assert [line["out"] for line in lines_of(tmp_path / "a.jsonl")] == [0, 9, 0]


def test_what_was_forgotten_is_counted_and_the_end_takes_what_is_open(tmp_path):
    rest = Scripted([use(number, is_open=number == 6) for number in range(7)], first=2)
    with JsonLines(tmp_path / "a.jsonl") as file:
        recorder = Recorder(rest, file, None)
        recorder.begin(Past.REMEMBERED)
        rest.first = 4
        recorder.poll()
        assert (recorder.requests, recorder.lost) == (2, 2)
        recorder.finish()
        assert (recorder.requests, recorder.lost) == (3, 2)


def test_it_stops_at_what_is_wanted_and_at_a_daemons_end(tmp_path):
    rest = Scripted([use(number) for number in range(7)])
    assert record(rest, tmp_path / "a.jsonl", 20.0, 3, Past.REMEMBERED).requests == 3
    assert record(rest, tmp_path / "a.jsonl", 0.0, None, Past.NOTHING).requests == 0
    with JsonLines(tmp_path / "b.jsonl") as file:
        recorder = Recorder(rest, file, None)
        recorder.begin(Past.REMEMBERED)
        rest.life = 2
        with pytest.raises(Unavailable, match="restarted"):
            recorder.poll()


def test_without_a_daemon_an_older_file_stays(tmp_path):
    out = tmp_path / "day.jsonl"
    out.write_text("yesterday")
    assert run("--url", "http://127.0.0.1:9", "trace", "record", "--out", out, "--seconds", 0).exit_code == 5
    assert out.read_text() == "yesterday"


def test_blocks_are_shared_where_extents_are(tmp_path):
    numbering = Numbering()
    lines = [
        numbering.line(use(0, extents=("x", "y", "z"))),
        numbering.line(use(1, document="u/b", extents=("x", "y"))),
        numbering.line(use(2, document="u/b", extents=("x", "w"))),
        numbering.line(use(3) | {"extent_tokens": 1024, "token_count": 1500}),
        numbering.line(use(4, extents=("x1", "x2", "x3")) | {"extent_tokens": 256, "token_count": 600}),
    ]
    assert [expand(line["runs"], "") for line in lines] == [[0, 1, 2], [0, 1], [0, 3], [0, 4, 5], [6, 7]]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines[:3])))
    assert read_trace(path, 512).unit_count == 4


def test_runs_are_the_shortest():
    assert runs_of([3, 4, 5, 9, 1, 2]) == [3, 3, 9, 1, 1, 2]
    assert runs_of([]) == []
