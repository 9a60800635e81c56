"""The command line against a real admin API on an ephemeral port: what it prints, where, and how it exits."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest
from aiohttp import web
from holdfast.kvstore import errors
from holdfast.kvstore.admin import make_app
from holdfast.kvstore.config import load_config
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.ledger import Seen
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.state import Backend
from typer.testing import CliRunner

from fakes import CLIENT, EXTENT_BYTES, FAR_NS, ManualEffects, ingest, put_objects, tiny_config, tiny_service, tiny_spec
from holdfast import cli, cli_tables
from holdfast.cli_session import exit_code, hoisted
from holdfast.rest import Rest, document_path

DEADLINE_SECONDS = 10


class Live:
    """An admin API on a loop in its own thread; orders end by themselves, unless `held`."""

    def __init__(self, app=None, **overrides):
        self.not_ready = None
        self.held = False
        self._app = app
        self._overrides = overrides
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._started: Future[str] = Future()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)

    def __enter__(self):
        self._thread.start()
        self.url = self._started.result(DEADLINE_SECONDS)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()
        self._loop.close()

    async def _run(self):
        effects = ManualEffects(submitted=lambda: self._loop.call_soon(self._complete))
        self.service, self.effects, self.clock = tiny_service(tiny_config(**self._overrides), effects)
        app = self._app or make_app(self.service, lambda: self.not_ready, "tmpfs, at /arena")
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        self._started.set_result(f"http://{host}:{port}")
        await self._stop.wait()
        await runner.cleanup()
        self.service.state.check()

    def _complete(self):
        if not self.held:
            self.effects.complete_all(self.service)

    def call(self, function):
        """Run it on the service's thread."""

        async def on_loop():
            return function()

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(DEADLINE_SECONDS)

    def ingest(self, name, **options):
        return self.call(lambda: ingest(self.service, self.effects, name, **options))

    def attach(self, document):
        return self.call(lambda: self.service.attach(CLIENT, document, None, None, None, FAR_NS, lambda _: None))


@pytest.fixture
def live():
    with Live() as found:
        yield found


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("HOLDFAST_URL", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOLDFAST_DAEMON__DATA_DIR", str(tmp_path / "nobody"))


def run(*arguments, live=None):
    words = [*(["--url", live.url] if live else []), *arguments]
    result = CliRunner().invoke(cli.app, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def ok(*arguments, live=None):
    """What the command printed; it went well and complained of nothing."""
    result = run(*arguments, live=live)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def machine(*arguments, live):
    return json.loads(ok(*arguments, "--json", live=live))


def refused(exit_code, *arguments, live=None):
    """What the command complained of."""
    result = run(*arguments, live=live)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr
    return result.stderr


# Hints -----------------------------------------------------------------------------------------


def test_prefetch_brings_documents_near_and_hints_says_so(live):
    for name in ("a", "b"):
        live.ingest(name)
        ok("free", name, live=live)
    found = machine("prefetch", "a", "default/b", "--queries", "3", "--deadline", "5m", live=live)["hints"]
    assert [(h["document"], h["queries"], h["target"]) for h in found] == [("a", 3, "ddr"), ("b", 3, "ddr")]
    shown = machine("hints", live=live)
    assert {h["document"]: h["state"] for h in shown["hints"]} == {"a": "promoted", "b": "promoted"}
    said = ok("hints", live=live)
    assert "2 brought near" in said
    assert "default/a" in said
    assert "6 announced" in said
    live.attach(DocumentId("default", "a"))
    assert "1, 1 of them after all was there" in ok("hints", "--limit", "0", live=live)
    assert "default/a" in ok("prefetch", "a", live=live)


def test_prefetch_says_what_is_wrong(live):
    live.ingest("a")
    assert "nobody" in refused(3, "prefetch", "nobody", live=live)
    result = run("prefetch", "nobody", "a", live=live)
    assert (result.exit_code, "default/a" in result.stdout, "nobody" in result.stderr) == (3, True, True)
    assert "hbm:GROUP" in refused(2, "prefetch", "a", "--to", "nvme", live=live)
    assert "no group 'x'" in refused(3, "prefetch", "a", "--to", "hbm:x", live=live)
    for never in ("0s", "never"):
        assert "for how long" in refused(2, "prefetch", "a", "--deadline", never, live=live)


def test_prefetch_fails_where_it_is_refused_and_hints_say_why(live):
    live.ingest("a")
    ok("free", "a", "--to", "none", live=live)
    result = run("prefetch", "a", live=live)
    assert result.exit_code == 1
    assert "default/a refused: tokens [0, " in result.stdout
    assert "default/a refused: tokens [0, " in ok("hints", live=live)


# Looking ---------------------------------------------------------------------------------------


def test_version(live):
    assert ok("version") == f"holdfast {cli.__version__}\n"
    assert machine("version", live=live) == {"version": cli.__version__}


def test_status(live):
    live.attach(live.ingest("a"))
    shown = ok("status", live=live)
    assert live.url in shown
    assert "ready      yes" in shown
    assert "1 MiB" in shown
    found = machine("status", live=live)
    assert (found["documents"], found["leases"], found["url"]) == (1, 1, live.url)
    live.not_ready = "draining"
    result = run("status", live=live)
    assert result.exit_code == 1
    assert "no: draining" in result.stdout


def test_doc_ls(live):
    assert ok("doc", "ls", live=live) == "no documents\n"
    live.ingest("report", token_count=100)
    live.ingest("notes", token_count=10, tenant="acme", write_policy=WritePolicy.MEMORY)
    lines = ok("doc", "ls", live=live).splitlines()
    assert lines[0].split() == ["DOCUMENT", "TOKENS", "SIZE", "HBM", "DDR", "NVME", "STATE", "PIN", "LEASES", "RESTORE"]
    assert lines[1].split()[:2] == ["acme/notes", "10"]
    assert "in memory" in lines[1]
    assert "64 KiB" in lines[2]
    assert "durable" in lines[2]
    assert [d["name"] for d in machine("doc", "ls", live=live)["documents"]] == ["notes", "report"]
    assert [d["name"] for d in machine("doc", "ls", "--tier", "nvme", live=live)["documents"]] == ["report"]
    assert [d["name"] for d in machine("doc", "ls", "--tenant", "acme", live=live)["documents"]] == ["notes"]
    assert machine("doc", "ls", "--pinned", live=live)["documents"] == []
    assert len(machine("doc", "ls", "--not-pinned", live=live)["documents"]) == 2
    result = run("doc", "ls", "--limit", "1", live=live)
    assert result.exit_code == 0
    assert "more than 1" in result.stderr
    assert machine("doc", "ls", "--limit", "1", live=live)["next_cursor"]


def test_doc_ls_follows_the_pages(live, monkeypatch):
    monkeypatch.setattr(cli, "PAGE", 2)
    for index in range(5):
        live.ingest(f"{index}", token_count=10)
    found = machine("doc", "ls", "--limit", "5", live=live)
    assert [d["name"] for d in found["documents"]] == list("01234")
    assert found["next_cursor"] is None


def test_doc_show(live):
    live.ingest("report", token_count=40)
    shown = ok("doc", "show", "report", live=live)
    assert "default/report" in shown
    assert "[32, 40)" in shown
    assert "32 KiB in ddr, 32 KiB in nvme" in shown
    assert "canonical" in shown
    found = machine("doc", "show", "default/report", live=live)
    assert set(found) == {"document", "extents"}
    assert found["document"]["token_count"] == 40


@pytest.mark.parametrize("name", ["a b", "100%", "[red]x", ":smile:", "naïve ☃", "what?#"])
def test_names_are_shown_as_they_are(live, name):
    live.ingest(name, token_count=10)
    assert f"default/{name}" in ok("doc", "ls", live=live)
    assert f"default/{name}" in ok("doc", "show", name, live=live)
    assert f"default/{name} pinned" in ok("pin", name, live=live)


def test_text_of_others_cannot_command_the_terminal(live):
    document = live.ingest("a")
    live.call(lambda: live.service.pin(document, Tier.DDR, None, "me\x1b[31m", "\x07x\x9b"))
    shown = ok("doc", "show", "a", live=live)
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)


def test_tiers_swaps_verdicts(live):
    assert "ddr" in ok("tiers", live=live)
    assert "no document was attached yet" in ok("swaps", live=live)
    assert "nothing was evicted yet" in ok("verdicts", live=live)
    document = live.ingest("report", token_count=64)
    live.call(lambda: live.service.evict(document, Tier.DDR, 0, FAR_NS, lambda _: None))
    live.attach(document)
    assert [t["device"] for t in machine("tiers", live=live)["tiers"]] == ["ddr", "nvme"]
    shown = ok("swaps", live=live)
    assert "default/report" in shown
    assert "nvme" in shown
    (swap,) = machine("swaps", live=live)["swaps"]
    assert swap["moved_bytes"] == 2 * EXTENT_BYTES
    assert swap["strategy"] == swap["strategy_reason"] == ""
    shown = ok("verdicts", live=live)
    assert "demote" in shown
    assert "admin" in shown
    assert len(machine("verdicts", "--limit", "1", live=live)["evictions"]) == 1


def test_a_receipt_says_which_strategy_and_in_full_why(live):
    lease = live.attach(live.ingest("report", token_count=64)).lease.id
    reason = "pass_q: exposes 0.4 ms a layer, pass_kv 3.1 ms (T=64, P=32768, cp=2)"
    live.call(lambda: live.service.report(CLIENT, lease, Seen(1000, 5000, 0, 3, "pass_q", reason)))
    live.call(lambda: live.service.report(CLIENT, lease, Seen(1000, 5000, 0, 4)))  # another answer, which names none
    (swap,) = machine("swaps", live=live)["swaps"]
    assert (swap["strategy"], swap["strategy_reason"], swap["answer_tokens"]) == ("pass_q", reason, 7)
    table = ok("swaps", live=live)
    assert "pass_q" in table
    assert reason not in table
    detail = ok("swaps", "--detail", "--limit", "1", live=live)
    assert reason in detail
    assert "default/report" in detail


def test_status_shows_what_a_group_computes_with(live):
    assert "groups" in ok("status", live=live)
    live.ingest("report")
    backend = Backend("cpu_flash", "shm", "cpu")
    live.call(lambda: live.service.register_rank(77, "left", 0, 2, 1, tiny_spec().fingerprint(), 128, backend))
    shown = ok("status", live=live)
    assert "left: 1/2 ranks (cp=2 tp=1), device cpu, kernel cpu_flash, communicator shm" in shown


# Changing --------------------------------------------------------------------------------------


def test_pin_and_unpin(live):
    document = live.ingest("report", token_count=64)
    shown = ok("pin", "report", "--ttl", "90s", "--reason", "launch", live=live)
    assert "default/report pinned to ddr until" in shown
    assert "32 KiB" in shown
    pin = live.call(lambda: live.service.state.pins.get(document))
    assert pin.expires_wall_ns - pin.created_wall_ns == 90 * 10**9
    assert pin.reason == "launch"
    assert pin.owner
    found = machine("pin", "report", "--tier", "nvme", "--ttl", "never", live=live)
    assert (found["tier"], found["expires_wall_ns"]) == ("nvme", None)
    assert "unpinned" in ok("unpin", "default/report", live=live)
    assert "not pinned" in refused(3, "unpin", "report", live=live)


def test_pins_and_leases_say_who_why_and_how_long(live):
    live.ingest("report", token_count=64)
    other = live.ingest("other", token_count=64)
    assert "no pins" in ok("pins", live=live)
    assert "no leases" in ok("leases", live=live)
    assert "pinned softly" in ok("pin", "report", "--soft", "--ttl", "100s", "--refresh", "--reason", "demo", live=live)
    ok("pin", "other", "--tier", "nvme", "--ttl", "never", "--reason", "audit", live=live)
    live.call(lambda: live.clock.advance(50 * 10**9))
    assert "ddr, soft" in ok("doc", "ls", live=live)
    assert "ddr, soft until" in ok("doc", "show", "report", live=live)
    shown = ok("pins", live=live)
    for part in ("default/report", "soft", "50%", "50 s", "hit", "demo", "for ever", "32 KiB of 768 KiB in ddr"):
        assert part in shown
    assert "audit" not in ok("pins", "--reason", "demo", live=live)
    live.attach(other)
    live.call(lambda: live.clock.advance(310 * 10**9))
    shown = ok("leases", "--overdue", live=live)
    for part in ("default/other", "32 KiB", "5.17 min", "10 s"):
        assert part in shown
    assert len(machine("leases", live=live)["leases"]) == 1


def test_many_pins_end_in_one_command(live):
    for name in "abc":
        live.ingest(name)
        ok("pin", name, "--tier", "nvme", "--reason", f"demo {name}", live=live)
    shown = ok("unpin", "--reason", "demo", "--dry-run", live=live)
    assert "3 pins would end" in shown
    assert "2 pins ended" in ok("unpin", "a", "b", live=live)
    assert machine("unpin", "--owner", "nobody", live=live)["pins"] == []
    assert "no such pins" in ok("unpin", "--tenant", "acme", live=live)
    assert "1 pin ended" in ok("unpin", "--all", live=live)
    assert "say whose pins" in refused(2, "unpin", live=live)
    assert "one or the other" in refused(2, "unpin", "--all", "--tenant", "acme", live=live)
    assert "TENANT/NAME" in refused(2, "unpin", "a", "b", "--tenant", "acme", live=live)


def test_what_is_in_the_way_of_a_pin_is_said_line_by_line():
    with Live(limits__ddr_pin_bytes="40 KiB") as live:
        live.ingest("report", token_count=64)
        live.ingest("other", token_count=64)
        ok("pin", "report", live=live)
        complaint = refused(4, "pin", "other", live=live)
    assert "held by the pin of default/report by" in complaint
    assert "32 KiB of ddr" in complaint
    assert "(32 KiB) exceeds limits.ddr_pin_bytes = 40 KiB, of which 32 KiB are taken" in complaint


def test_doc_rm(live):
    document = live.ingest("report")
    live.call(lambda: live.service.pin(document, Tier.NVME, None, "ops", ""))
    assert "unpin first" in refused(4, "doc", "rm", "report", live=live)
    live.call(lambda: live.service.unpin(document))
    assert ok("doc", "ttl", "report", "1h", live=live).startswith("default/report ends ")
    assert ok("doc", "ttl", "report", "never", live=live) == "default/report has no end\n"
    assert ok("doc", "rm", "report", live=live) == "default/report deleted\n"
    complaint = refused(3, "doc", "rm", "report", live=live)
    assert "no document 'report'" in complaint
    assert "holdfast doc ls" in complaint


def test_bypass_on_and_off(live):
    assert ok("bypass", live=live) == "off: engines are served\n"
    said = ok("bypass", "on", "--reason", "wrong answers", live=live)
    assert said.startswith("on since ")
    assert "because: wrong answers" in said
    assert "engines go on without the cache" in ok("status", live=live)
    assert machine("bypass", live=live)["on"]
    assert ok("bypass", "off", live=live) == "off: engines are served\n"
    assert "bypassed" not in ok("status", live=live)


def test_models_are_listed_and_cleared(live):
    assert ok("model", "ls", live=live) == "nothing is stored\n"
    live.ingest("a")
    live.ingest("b")
    model = tiny_spec().model
    assert model in ok("model", "ls", live=live)
    assert ok("model", "clear", model, "--dry-run", live=live) == "2 documents would go\n"
    live.attach(DocumentId("default", "a"))
    result = run("model", "clear", model, live=live)
    assert result.exit_code == 1
    assert "1 document gone" in result.stdout
    assert "kept default/a" in result.stdout
    assert "model ls" in refused(3, "model", "clear", "nobody", live=live)


def test_tenants(live):
    assert ok("tenants", live=live) == "no tenants\n"
    live.ingest("report", tenant="acme", token_count=64)
    shown = ok("tenants", live=live)
    assert "GUARANTEED" in shown
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [["acme", "ddr", "32"], ["acme", "nvme", "32"]]
    live.ingest("report")
    assert machine("tenants", "--limit", "1", live=live)["count"] == 2


def test_free(live):
    document = live.ingest("report", token_count=64, write_policy=WritePolicy.BACK)
    shown = ok("free", "report", "--dry-run", live=live)
    assert "32 KiB would be freed, down to nvme" in shown
    assert machine("free", "report", "--dry-run", live=live)["state"] == "planned"
    assert "32 KiB freed, down to nvme" in ok("free", "report", live=live)
    assert "nothing to free" in ok("free", "report", live=live)
    assert machine("doc", "show", "report", live=live)["document"]["resident_bytes"] == {"nvme": 2 * EXTENT_BYTES}
    live.attach(document)
    assert "leased" in refused(4, "free", "report", live=live)
    assert "holdfast leases" in refused(4, "free", "--bytes", "1MiB", live=live)


def test_free_bytes(live):
    live.ingest("report", token_count=64)
    found = machine("free", "--bytes", "20 KiB", "--to", "nvme", live=live)
    assert found["state"] == "done"
    assert found["size_bytes"] == 2 * EXTENT_BYTES


def test_an_eviction_that_takes_longer_goes_on(live):
    live.ingest("report", token_count=64, write_policy=WritePolicy.BACK)
    live.held = True

    def expire():
        live.clock.advance(10**9)
        live.service.tick()

    live.call(lambda: setattr(live.effects, "submitted", lambda: live._loop.call_soon(expire)))
    result = run("free", "report", "--deadline", "1s", live=live)
    assert result.exit_code == 0, result.output
    assert "32 KiB being freed, down to nvme" in result.stdout
    assert "it goes on" in result.stderr
    live.call(lambda: live.effects.complete_all(live.service))


def test_a_pin_over_budget():
    with Live(limits__pin_bytes="16 KiB") as live:
        live.ingest("report", token_count=64)
        assert "limits.pin_bytes" in refused(4, "pin", "report", live=live)


# Usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["free"],
        ["free", "a", "--bytes", "1"],
        ["free", "--bytes", "lots"],
        ["free", "--bytes", "1M"],
        ["free", "a", "--deadline", "never"],
        ["free", "a", "--to", "tape"],
        ["pin", "a", "--ttl", "soon"],
        ["pin", "a", "--ttl", "0s"],
        ["pin", "a/b/c"],
        ["pin", "/a"],
        ["pin", "a/"],
        ["pin"],
        ["doc", "show"],
        ["doc", "ls", "--limit", "0"],
        ["swaps", "--limit", "1001"],
        ["config", "show", "--set", "nonsense"],
        ["config", "show", "--set", "ddr.colour=red"],
        ["serve", "--set", "ddr.slab_bytes=1 B"],
        ["serve", "--config", "/nowhere/holdfast.toml"],
        ["nonsense"],
        ["--nonsense"],
        ["status", "--url", "ftp://nowhere"],
    ],
    ids=" ".join,
)
def test_wrong_usage(live, words):
    live.ingest("a")
    refused(2, *words, live=live if "--url" not in words else None)


def test_global_options_stand_anywhere():
    assert hoisted(["doc", "show", "x", "--json"]) == ["--json", "doc", "show", "x"]
    assert hoisted(["status", "--url", "u", "--no-color"]) == ["--url", "u", "--no-color", "status"]
    assert hoisted(["status", "--data-dir=d"]) == ["--data-dir=d", "status"]
    assert hoisted(["doc", "show", "--", "--json"]) == ["doc", "show", "--", "--json"]
    assert hoisted(["status", "--url"]) == ["--url", "status"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("90", 90.0), ("90s", 90.0), ("1.5h", 5400.0), ("30m", 1800.0), ("2d", 172_800.0), ("never", None)],
)
def test_durations(text, wanted):
    assert cli.seconds(text) == wanted


def test_exit_codes_of_errors():
    expected = {
        errors.ConfigError: 2,
        errors.DocumentNotFound: 3,
        errors.ClaimNotFound: 3,
        errors.InUse: 4,
        errors.PinsOvercommitted: 4,
        errors.NoCapacity: 4,
        errors.DaemonUnavailable: 5,
        errors.Draining: 5,
        errors.DeadlineExceeded: 1,
        errors.StorageFailed: 1,
        errors.MissingExtra: 1,
    }
    assert {kind: exit_code(kind("x")) for kind in expected} == expected


# Finding the daemon ----------------------------------------------------------------------------


def test_the_address_in_the_data_directory(live, tmp_path, monkeypatch):
    (tmp_path / "rest.json").write_text(json.dumps({"url": live.url, "pid": 1}))
    assert "ready      yes" in ok("status", "--data-dir", str(tmp_path))
    monkeypatch.setenv("HOLDFAST_DAEMON__DATA_DIR", str(tmp_path))
    assert "ready      yes" in ok("status")
    monkeypatch.setenv("HOLDFAST_URL", "http://127.0.0.1:1")
    refused(5, "status")
    assert "ready      yes" in ok("status", "--url", live.url + "/")


@pytest.mark.parametrize("left", [None, "", "{", "[]", "{}", '{"url": 3}'])
def test_no_address_in_the_data_directory(tmp_path, left):
    if left is not None:
        (tmp_path / "rest.json").write_text(left)
    complaint = refused(5, "status", "--data-dir", str(tmp_path))
    assert "rest.json" in complaint
    assert "holdfast serve" in complaint


def test_nobody_answers():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, but not listening
        complaint = refused(5, "status", "--url", f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert "no daemon answers" in complaint
    assert "holdfast serve" in complaint


def test_somebody_listens_but_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        rest = Rest(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(errors.DaemonUnavailable, match="within"):
            rest.post("/v1/pins", {}, timeout_seconds=0.05)


@pytest.mark.parametrize("status", [200, 404, 500])
@pytest.mark.parametrize("text", ["<html>", "[]", "\xff"])
def test_somebody_else_answers(status, text):
    async def stranger(request):
        return web.Response(text=text, status=status)

    app = web.Application()
    app.router.add_get("/v1/status", stranger)
    with Live(app) as live:
        refused(5, "status", live=live)


def test_a_daemon_that_is_not_ready(live):
    live.ingest("a")
    live.not_ready = "draining"
    assert "draining" in refused(5, "pin", "a", live=live)


def test_document_paths():
    assert document_path("a b", "c/d?") == "a%20b/c%2Fd%3F"


# Without a daemon ------------------------------------------------------------------------------


def test_config_show(tmp_path, monkeypatch):
    path = tmp_path / "holdfast.toml"
    path.write_text('[ddr]\ncapacity_bytes = "2 GiB"\n')
    monkeypatch.setenv("HOLDFAST_DAEMON__LOG_LEVEL", "debug")
    words = ["config", "show", "--config", str(path), "--set", "limits.documents=5", "--data-dir", str(tmp_path)]
    shown = ok(*words)
    assert f'capacity_bytes = "2 GiB"  # {path}' in shown
    assert "documents = 5  # flag limits.documents" in shown
    assert "# environment HOLDFAST_DAEMON__LOG_LEVEL" in shown
    copy = tmp_path / "copy.toml"
    copy.write_text(shown)
    assert load_config(copy, {}, {}).limits.documents == 5
    settings = json.loads(ok(*words, "--json"))["settings"]
    assert settings["ddr.capacity_bytes"] == {"value": 2 << 30, "origin": str(path)}
    assert settings["daemon.data_dir"]["value"] == str(tmp_path)


def test_serve_runs_the_daemon_with_the_effective_configuration(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("holdfast.kvstore.daemon.serve", lambda config: seen.append(config) or 7)
    result = run("serve", "--data-dir", str(tmp_path), "--set", "daemon.rest_port=0", "--set", "nvme.threads = 2")
    assert result.exit_code == 7
    assert seen[0].daemon.data_dir == tmp_path
    assert (seen[0].daemon.rest_port, seen[0].nvme.threads) == (0, 2)


def test_demo_hears_its_options(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("holdfast.demo.run_demo", lambda *arguments: seen.append(arguments) or 3)
    text = tmp_path / "text.txt"
    text.write_text("x")
    result = run("demo", "--document", str(text), "--tokens", "2048", "--json", "--data-dir", str(tmp_path))
    assert result.exit_code == 3
    assert seen == [(text, 2048, "machines", tmp_path)]
    refused(2, "demo", "--document", str(tmp_path / "missing"))


def test_serve_says_why_it_cannot(monkeypatch):
    def busy(config):
        raise errors.DataDirectoryBusy("another daemon owns it")

    monkeypatch.setattr("holdfast.kvstore.daemon.serve", busy)
    assert refused(1, "serve") == "error: another daemon owns it\n"


def test_help_loads_nothing_slow():
    probe = (
        "import sys, holdfast.cli\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(holdfast.cli.app, ['--help'])\n"
        "assert result.exit_code == 0 and 'doc' in result.output\n"
        "slow = {'aiohttp', 'asyncio', 'msgspec', 'numpy', 'prometheus_client', 'rich', 'torch'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_every_command_has_help():
    for words in (["serve"], ["demo"], ["config", "show"], ["doc", "ls"], ["pin"], ["free"], ["swaps"]):
        assert "Usage:" in ok(*words, "--help")


# Words for numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_bytes", "wanted"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1023 << 10, "1023 KiB"),
        (64 << 20, "64 MiB"),
        (5 << 28, "1.25 GiB"),
        (3 << 40, "3 TiB"),
        (2048 << 50, "2048 PiB"),
    ],
)
def test_sizes(size_bytes, wanted):
    assert cli_tables.size(size_bytes) == wanted


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(None, "-"), (0, "0 s"), (2e-6, "2 us"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (600, "10 min"), (9000, "2.5 h")],
)
def test_shown_durations(value, wanted):
    assert cli_tables.duration(value) == wanted


def test_explain(live):
    document = live.ingest("report", token_count=64)
    shown = ok("explain", "report", live=live)
    assert "default/report is next to leave ddr, by popularity." in shown
    assert "holdfast pin default/report --tier ddr" in shown
    assert max(map(len, shown.splitlines()[:4])) <= 100, shown
    assert "ddr, by popularity: age_seconds=" in shown
    live.call(lambda: live.service.evict(document, Tier.DDR, 0, FAR_NS, lambda _: None))
    shown = ok("explain", "report", live=live)
    assert "An attach of default/report reads 32 KiB from nvme" in shown
    assert "admin" in shown
    live.call(lambda: live.service.evict(document, Tier.NVME, 0, FAR_NS, lambda _: None))
    shown = ok("explain", "report", live=live)
    assert "Tokens [0, 64) of default/report are gone. They left nvme last, " in shown
    assert "computing them takes" in shown
    found = machine("explain", "report", live=live)
    assert [one["tier"] for one in found["departures"]] == ["nvme", "ddr"]
    ok("doc", "rm", "report", live=live)
    assert "default/report is deleted since" in ok("explain", "report", live=live)
    assert "nothing is remembered" in refused(3, "explain", "never", live=live)


def test_explain_says_that_a_document_ends(live):
    live.ingest("report", token_count=64)
    ok("pin", "report", live=live)
    ok("doc", "ttl", "report", "1m", live=live)
    assert "default/report ends " in ok("explain", "report", live=live)
    live.call(lambda: live.clock.advance(61 * 10**9))
    assert "default/report was to end " in ok("explain", "report", live=live)


def test_verdicts_fit_a_screen(live):
    live.ingest("report")
    ok("free", "report", live=live)
    assert max(map(len, ok("verdicts", live=live).splitlines())) <= 100


def test_explain_says_what_keeps_it(live):
    document = live.ingest("report", token_count=64)
    live.attach(document)
    assert "default/report stays in ddr: kept by a lease." in ok("explain", "report", live=live)


def test_tiers_and_status_say_how_good_evictions_were(live):
    assert "UNFETCHED" in ok("tiers", live=live)
    assert "REGRET" in ok("status", live=live)


# Objects ---------------------------------------------------------------------------------------


def test_objects_are_listed_shown_pinned_and_cleared(live):
    for tenant in ("default", "other"):
        live.call(
            lambda tenant=tenant: put_objects(live.service, live.effects, "ns", [b"aa", b"ab", b"b"], tenant=tenant)
        )
    live.ingest("document")
    found = machine("objects", "ls", live=live)["namespaces"]
    assert [(n["tenant"], n["objects"]) for n in found] == [("default", 3), ("other", 3)]
    assert "default/ns" not in ok("objects", "ls", "--tenant", "other", live=live)
    assert "14.6 KiB" in ok("objects", "show", "ns", live=live)
    pinned = ok("objects", "pin", "ns", "--prefix", b"a".hex(), "--reason", "why", live=live)
    assert "2 objects pinned to ddr" in pinned
    assert machine("objects", "show", "ns", live=live)["pinned"] == 2
    assert "2 objects unpinned" in ok("objects", "unpin", "ns", live=live)
    assert "1 object pinned softly to nvme" in ok(
        "objects", "pin", "ns", "--key", b"b".hex(), "--soft", "--tier", "nvme", live=live
    )
    assert "3 objects deleted" in ok("objects", "clear", "ns", live=live)
    assert machine("objects", "show", "other/ns", live=live)["objects"] == 3
    assert machine("doc", "ls", live=live)["documents"][0]["name"] == "document"
    refused(2, "objects", "pin", "ns", "--prefix", "no hex", live=live)
    refused(2, "objects", "show", "a/b/c", live=live)
    assert "no objects" in ok("objects", "ls", "--tenant", "nobody", live=live)
