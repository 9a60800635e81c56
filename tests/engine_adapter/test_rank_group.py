"""The built-in runner under the engine contract: real rank processes, a tiny Llama, and processes that die."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from driver_process import CONFIG, drives, group
from engine_contract import CHUNK, NEW, Degree, EngineContract
from holdfast.engine_adapter.control import FRAME_LIMIT
from holdfast.engine_adapter.engine import Question
from holdfast.engine_adapter.rank import logits_limit
from holdfast.kvstore.errors import GroupFailed, SpecMismatch
from holdfast.ring_attention.identity import spec_of
from holdfast.ring_attention.synthetic import Scales, write_checkpoint

from daemon_clients import client_process
from daemon_process import until

BY_HEADS, BY_TOKENS = Degree(1, 2), Degree(2, 1)


def runs(pid):
    """Whether a process is there, and not merely waiting to be reaped."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


class TestRankGroup(EngineContract):
    DEGREES = (BY_HEADS, BY_TOKENS)
    # Extents are of the standard size here: 8 MiB, so a document is one.
    SETTINGS: ClassVar = {
        "ddr__capacity_bytes": "48 MiB",
        "ddr__slab_bytes": "8 MiB",
        "nvme__capacity_bytes": "64 MiB",
        "nvme__segment_bytes": "8 MiB",
    }

    @staticmethod
    def directory(stage):
        path = stage.daemon.directory / "model"
        if not path.exists():
            write_checkpoint(path, CONFIG, scales=Scales(attention=1.0))
        return path

    def make(self, stage, degree):
        # A chunk's shares may differ by two tokens between ranks, and a document has up to seven chunks.
        name, rows = f"ranks-{degree.cp}-{degree.tp}", stage.rows(degree) + 16
        return group(self.directory(stage), name, degree.cp, stage.daemon.socket, rows, tp=degree.tp)

    def other_spec(self):
        return replace(spec_of(CONFIG, "another"), adapter="a LoRA")

    # Ranks and drivers that die ----------------------------------------------------------------

    def test_a_killed_rank_ends_the_group_at_once_and_frees_its_place(self, stage):
        session = stage.session(BY_TOKENS)
        engine = stage.engine(BY_TOKENS)
        document, question = self.stored(stage, session, "report"), self.tokens(5)
        with session.attached("report") as attached:
            os.kill(engine.pids[1], signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(GroupFailed, match="signal 9"):
                engine.answer_many([Question(attached.shard, question, NEW)])
            assert time.monotonic() - began < 10
        with pytest.raises(GroupFailed):
            engine.answer_many([Question(attached.shard, question, NEW)])
        until(lambda: not any(runs(pid) for pid in engine.pids), "no rank is left waiting")
        until(lambda: not stage.is_complete("ranks-2-1"), "the daemon has given the group up")
        assert stage.daemon.used("hbm") == 0
        assert stage.daemon.leases() == []
        stage.forget(BY_TOKENS)
        session = stage.session(BY_TOKENS)
        self.check(session.ask("report", question, NEW), stage.engine(BY_TOKENS), document, question)

    def test_a_rank_that_dies_while_nobody_asks_is_found_by_looking(self, stage):
        stage.session(BY_TOKENS)
        engine = stage.engine(BY_TOKENS)
        assert engine.failure == ""
        os.kill(engine.pids[0], signal.SIGKILL)
        assert until(lambda: engine.failure, "the death is seen") == "rank 0 died (signal 9)"
        until(lambda: not any(runs(pid) for pid in engine.pids), "no rank is left")
        stage.forget(BY_TOKENS)

    def test_a_rank_killed_during_an_ingest_leaves_nothing(self, stage):
        session, engine = stage.session(BY_TOKENS), stage.engine(BY_TOKENS)

        def kills(_):
            with suppress(ProcessLookupError):
                os.kill(engine.pids[0], signal.SIGKILL)

        with pytest.raises(GroupFailed):
            session.ingest("report", self.tokens(200), chunk_tokens=CHUNK, progress=kills)
        stage.forget(BY_TOKENS)
        assert stage.client().documents() == []
        until(stage.is_idle, "nothing is held")

    def test_a_killed_driver_takes_its_ranks_and_claims_with_it(self, stage):
        with client_process(drives, stage.daemon.socket, self.directory(stage)) as driver:
            assert driver.pipe.poll(60), "the driver starts"
            pids = driver.pipe.recv()
            assert all(runs(pid) for pid in pids)
            assert len(stage.daemon.leases()) == 1
            driver.kill()
        until(lambda: not any(runs(pid) for pid in pids), "the ranks end with their driver")
        until(lambda: not stage.daemon.leases(), "its lease ends")
        until(lambda: not any(found["name"] == "driven" for found in stage.daemon.groups()), "its group ends")

    def test_a_group_that_cannot_start_says_why(self, stage):
        stage.session(BY_HEADS)
        with pytest.raises(SpecMismatch):
            group(self.directory(stage), "ranks-1-2", 2, stage.daemon.socket, 100)
        assert stage.is_complete("ranks-1-2")


@pytest.mark.parametrize(("vocabulary_size", "answers"), [(256, 1), (128_256, 1), (128_256, 64), (262_144, 100)])
def test_the_logits_of_a_report_fit_into_its_frame(vocabulary_size, answers):
    """However long the answers are."""
    rows = logits_limit(vocabulary_size, answers)
    assert 1 <= rows * answers * vocabulary_size * 4 <= FRAME_LIMIT // 2
