"""`holdfast runner`, `ingest` and `ask` as a person runs them: a real daemon, real ranks, real signals."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from holdfast.engine_adapter.runner_wire import NEW_TOKENS_MAX, Prefilling
from holdfast.kvstore.document import WritePolicy
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.synthetic import Scales, write_checkpoint
from typer.testing import CliRunner

from daemon_process import DaemonProcess, until
from holdfast import cli, cli_ask, runner_program
from holdfast.cli_ask import PolicyName, progress
from holdfast.cli_session import Session

CONFIG = ModelConfig(
    vocabulary_size=256, hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, head_dim=16
)
TEXT = "My Design in this Book is not to explain the Properties of Light by Hypotheses. " * 8
SETTINGS = {
    "ddr__capacity_bytes": "48 MiB",
    "ddr__slab_bytes": "8 MiB",
    "nvme__capacity_bytes": "64 MiB",
    "nvme__segment_bytes": "8 MiB",
}
START_SECONDS = 60


class Place:
    """A daemon, a checkpoint, a text, and programs that find them."""

    def __init__(self, daemon):
        self.daemon = daemon
        self.model = daemon.directory / "model"
        self.light = ""  # what two cp ranks answer to "What is Light?"
        self.text = daemon.directory / "design.txt"
        write_checkpoint(self.model, CONFIG, scales=Scales(attention=1.0))
        self.text.write_text(TEXT)

    def command(self, *words, entry=("-m", "holdfast")):
        return [sys.executable, *entry, "--data-dir", str(self.daemon.data_dir), *map(str, words)]

    def run(self, *words, **more):
        ran = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=90, check=False, **more)
        assert "Traceback" not in ran.stderr, ran.stderr
        return ran

    def ok(self, *words, **more):
        ran = self.run(*words, **more)
        assert ran.returncode == 0, ran.stderr
        return ran

    def refused(self, status, *words, data_dir=None, **more):
        """What it said, in one line (and one of advice); in this process, which is quicker."""
        arguments = ["--data-dir", str(data_dir or self.daemon.data_dir), *map(str, words)]
        result = CliRunner().invoke(cli.app, arguments, **more)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == status, result.output
        assert result.stdout == ""
        first, *advice = [line for line in result.stderr.splitlines() if not line.startswith("reading ")]
        assert first.startswith("error: ")
        assert len(advice) <= 1
        return first

    @contextmanager
    def runner(self, *words, start=None):
        """A runner that is ready. It is ended in order, and leaves nothing behind."""
        command = start or self.command(
            "runner", "--model", self.model, "--cp", 2, "--rows", 2000, "--threads", 1, *words
        )
        log = self.daemon.directory / "runner.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        with ExitStack() as stack:
            stack.callback(process.stdout.close)
            stack.callback(self._end, process)
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("ready"):
                    break
            assert said, log.read_text()
            assert said[-1].startswith("ready"), log.read_text()
            yield Runner(process, "".join(said), log)

    def _end(self, process):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


class Runner:
    def __init__(self, process, said, log):
        self.process = process
        self.said = said
        self._log = log

    @property
    def log(self):
        return self._log.read_text()

    def ranks(self):
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")  # by the thread that started them
        return [int(pid) for task in tasks for pid in task.read_text().split()]


@pytest.fixture(scope="module")
def place():
    with DaemonProcess(**SETTINGS) as daemon:
        yield Place(daemon.start())


@pytest.fixture(scope="module")
def runner(place):
    with place.runner() as found:
        place.ok("ingest", place.text, "--name", "design", "--write-policy", "write-through")
        place.light = place.ok("ask", "design", "What is Light?", "--new-tokens", 8).stdout
        yield found


def test_the_runner_says_what_it_is(runner):
    assert "Llama, 2 layers, 4 heads (2 kv) of 16, vocabulary 256, float32" in runner.said
    assert "512 B per token" in runner.said
    assert "2000 per rank" in runner.said
    assert "4000 tokens in all" in runner.said
    assert "strategy" in runner.said


def test_a_question_is_answered_and_its_receipt_stands_beside_it(place, runner):
    ran = place.ok("ask", "design", "What is Light?", "--new-tokens", 12)
    assert ran.stdout
    (line,) = ran.stderr.splitlines()
    for part in ("reattached in", "first token after", "tokens/s"):
        assert part in line
    found = json.loads(place.ok("ask", "design", "What is Light?", "--new-tokens", 12, "--json").stdout)
    assert found["text"] + "\n" == ran.stdout
    assert len(found["tokens"]) == 12
    assert found["swap"]["document"] == "default/design"
    assert found["reason"] == ""
    assert found["strategy"]


def test_the_same_text_again_is_quick_and_says_so(place, runner):
    assert "all of it was in the cache" in place.ok("ingest", place.text, "--name", "design").stdout
    piped = place.ok("ingest", "-", "--name", "piped", input=TEXT + "And so on.")
    assert f"{len(TEXT) + 10} tokens" in piped.stdout


def test_a_document_grows_by_two_turns(place, runner):
    place.ok("ingest", "-", "--name", "talk", input=TEXT)
    tokens = len(TEXT)
    for question in ("What is Light?", "And what is Colour?"):
        line = place.ok("ask", "talk", question, "--new-tokens", 6, "--extend").stderr
        tokens += len(question) + 6
        assert f"the document has {tokens} tokens now" in line
    (found,) = [d for d in place.daemon.rest().get("/v1/documents")["documents"] if d["name"] == "talk"]
    assert found["token_count"] == tokens


def test_wrong_words_get_one_clear_line_each(place, runner, tmp_path):
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.touch()
    binary.write_bytes(b"\x7fELF\xff\xfe")
    assert "no file" in place.refused(3, "ingest", tmp_path / "none", "--name", "x")
    assert "is empty" in place.refused(2, "ingest", empty, "--name", "x")
    assert "no text in UTF-8" in place.refused(2, "ingest", binary, "--name", "x")
    assert "cannot be read" in place.refused(2, "ingest", tmp_path, "--name", "x")
    assert "'nobody'" in place.refused(3, "ask", "nobody", "Who?")
    assert "is empty" in place.refused(2, "ask", "design", "")
    assert "no runner named 'x'" in place.refused(5, "ask", "design", "Who?", "--group", "x")
    assert "'main' serves tenant 'default'" in place.refused(2, "ask", "acme/design", "Who?")
    start = ("runner", "--model", place.model, "--cp")
    assert "process" in place.refused(4, *start, 2)
    assert "does not divide" in place.refused(2, *start, 1, "--tp", 3, "--name", "x")
    assert "config.json does not exist" in place.refused(2, "runner", "--model", tmp_path, "--cp", 1, "--name", "x")
    assert "is no directory" in place.refused(2, "runner", "--model", binary, "--cp", 1, "--name", "x")
    assert "one of them" in place.refused(2, *start, 1, "--rows", 1, "--hbm", "1MiB", "--name", "x")
    assert "no runner runs" in place.refused(5, "ask", "design", "Who?", data_dir=tmp_path)
    usage = CliRunner().invoke(cli.app, [*map(str, start), "0"])
    assert usage.exit_code == 2
    assert "Invalid value for '--cp'" in usage.stderr


def test_no_daemon_in_time_ends_it_with_a_word(place, tmp_path, monkeypatch):
    monkeypatch.setattr(runner_program, "DAEMON_SECONDS", 0.1)
    words = ["--data-dir", str(tmp_path), "runner", "--model", str(place.model), "--cp", "1"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 5
    assert f"waiting 0.1 s for a daemon at {tmp_path}/holdfast.sock" in result.stderr
    assert "error: no daemon answers" in result.stderr


def test_a_terminal_gets_a_bar_with_speed_and_time_left(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    session = Session(url=None, data_dir=None, as_json=False, color=False)
    with progress(session) as show:
        for done in (1000, 2000, 3000, 4000):
            show(Prefilling(done_tokens=done, cached_tokens=1000, total_tokens=4000))
    assert "4000/4000" in screen.getvalue()
    assert "tokens/s" in screen.getvalue()


def test_an_answer_may_be_as_long_as_a_runner_takes():
    """Else the runner's refusal of the message is all that one hears."""
    assert cli_ask.NEW_TOKENS_MAX == NEW_TOKENS_MAX


def test_the_write_policies_that_can_be_typed_are_those_there_are():
    assert list(PolicyName) == list(WritePolicy)


def test_it_outlives_a_daemon_that_is_killed(place, runner):
    until(lambda: place.daemon.client().document("design").durable, "it is durable")
    place.daemon.kill()
    away = place.ok("ask", "design", "What is Light?", "--new-tokens", 8)
    assert "recomputed without the cache (daemon-unavailable)" in away.stderr
    assert away.stdout == place.light
    assert "no daemon answers" in place.refused(5, "ask", "nobody", "Who?")
    place.daemon.start()
    back = place.ok("ask", "design", "What is Light?", "--new-tokens", 8)
    assert "reattached" in back.stderr
    assert back.stdout == place.light


def test_it_outlives_a_rank_that_is_killed(place, runner):
    os.kill(runner.ranks()[0], signal.SIGKILL)
    until(lambda: "the group is back" in runner.log, "the group is started anew", START_SECONDS)
    assert "died (signal 9); the group is being started anew" in runner.log
    assert place.ok("ask", "design", "What is Light?", "--new-tokens", 8).stdout == place.light


def test_ctrl_c_ends_it_in_order(place, runner):
    """The last test of this runner: nothing of it is left."""
    ranks = runner.ranks()
    assert len(ranks) == 2
    runner.process.send_signal(signal.SIGINT)
    assert runner.process.wait(30) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not (place.daemon.data_dir / "runners" / "main.sock").exists()
    until(lambda: not place.daemon.groups(), "its group has left")
    assert "no runner runs" in place.refused(5, "ask", "design", "Who?")


def test_torchrun_starts_its_ranks(place, runner):
    """Each process of torchrun's becomes its rank; RANK 0's drives. Two tp ranks read what two cp ranks stored."""
    entry = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m", "holdfast")
    words = ("--model", place.model, "--cp", 1, "--tp", 2, "--rows", 2000, "--threads", 1, "--name", "torch")
    with place.runner(start=place.command("runner", *words, entry=entry)) as found:
        assert "cp 1 x tp 2" in found.said
        ask = ("ask", "design", "What is Light?", "--new-tokens", 8, "--group", "torch", "--json")
        again = json.loads(place.ok(*ask).stdout)
        assert again["swap"]["group"] == "torch"
        assert again["text"] + "\n" == place.light
    until(lambda: not any(group["name"] == "torch" for group in place.daemon.groups()), "its group has left")


def test_torchrun_over_several_machines_or_for_other_ranks_is_refused(place):
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    start = ("runner", "--model", place.model, "--cp", 2)
    assert "cp x tp = 2" in place.refused(2, *start, env=world)
    assert "on one machine" in place.refused(2, *start, env=world | {"LOCAL_WORLD_SIZE": "2"})
