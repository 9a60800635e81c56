"""Demo: the main job, end to end, with real parts: prefill once over a ring, evict, kill, bring back, answer again.

It fails, with a non-zero status, when an answer differs from the oracle's, or when a corrupted one does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .cli_tables import size
from .demo_report import TIER_NAMES, DemoReport, DocumentFate, Metrics, Output, QuestionRecord, as_json, show
from .demo_stage import DaemonProcess, Reference, Stage, compare, ending_on_sigterm, scratch
from .engine_adapter.group import RankGroup
from .engine_adapter.session import Session
from .kvstore.client import Client
from .kvstore.document import WritePolicy
from .kvstore.errors import DeadlineExceeded, HoldfastError, InvalidRequest
from .kvstore.geometry import extent_geometry
from .kvstore.spec import KVSpec
from .kvstore.views import VerdictView
from .rest import Rest, left_address

NEW_TOKENS: Final = 32
PIPE_WIDTH: Final = 120
LOG_CHARACTERS: Final = 2000
MAIN: Final = "opticks"
PINNED: Final = "pinned"
LEFT_FOR_ROOM: Final = ("pressure", "watermark")  # reasons of verdicts
REUSE: Final = "reuse_probability_10_min"
EXTRA_DOCUMENTS: Final = 7
DURABLE_SECONDS: Final = 60.0
QUESTIONS: Final = (
    "\n\nQuestion: What is Light?\nAnswer:",
    "\n\nQuestion: Which Rays are refracted most, and how is it shewn?\nAnswer:",
    "\n\nQuestion: Of what is the Whiteness of the Sun's Light compounded?\nAnswer:",
)


@dataclass(slots=True)
class Story:
    """What is known so far."""

    tokens: list[int]
    references: list[Reference] = field(default_factory=list)
    records: list[QuestionRecord] = field(default_factory=list)
    control_error: float = 0.0
    control_detected: bool = False
    prefill_seconds: float = 0.0
    stored_with_cp: int = 0
    daemon_killed: bool = False
    asked: dict[str, int] = field(default_factory=dict)


def run_demo(document: Path | None, tokens: int, output: Output, data_dir: Path | None) -> int:
    """Run the demo; returns the exit status. `tokens` of `document` (or of the shipped text) are used."""
    aside = output is Output.MACHINES  # then stdout is for the report alone
    screen = Console(stderr=aside)
    if not screen.is_terminal:
        screen = Console(stderr=aside, width=PIPE_WIDTH)  # a pipe has no width
    progress_screen = Console(stderr=True)
    text = read_text(document)
    with ending_on_sigterm(), scratch(data_dir) as directory:
        demo = Demo(text, min(tokens, len(text)), directory, screen, progress_screen)
        try:
            report = demo.run()
        except HoldfastError:
            progress_screen.print(f"[dim]the daemon's last words:\n{demo.daemon_log()}[/]", highlight=False)
            raise
        finally:
            demo.close()
    if aside:
        print(as_json(report))
    else:
        show(report, screen)
    return 0 if report.passed else 1


def read_text(document: Path | None) -> list[int]:
    """Byte tokens of a text. Raises InvalidRequest for one too short to be worth it."""
    path = document or Path(__file__).resolve().parent.parent / "examples" / "opticks.txt"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror}); name a text with --document") from error
    if len(data) < 4096:
        raise InvalidRequest(f"{path} has {len(data)} bytes; the demo needs a text of at least 4096")
    return list(data)


def moving(bar: Progress, task: TaskID, base: int) -> Callable[[int], None]:
    """A progress callback that moves a bar's task to `base` plus what is done."""

    def progress(done: int) -> None:
        bar.update(task, completed=base + done)

    return progress


class Demo:
    """One run."""

    def __init__(
        self, text: list[int], token_count: int, directory: Path, screen: Console, progress_screen: Console
    ) -> None:
        self._text = text
        self._screen = screen
        self._progress_screen = progress_screen
        self._started = time.monotonic()
        self._directory = directory
        self._story = Story(text[:token_count])
        self._extra_tokens = max(1024, token_count // 4)
        self._step = 0
        self._group: RankGroup | None = None
        self._client: Client | None = None
        self._stage = Stage(directory, directory / "holdfast.sock")
        self._daemon = DaemonProcess(directory, self._settings(self._stage.spec, token_count))

    def _settings(self, spec: KVSpec, token_count: int) -> dict[str, str]:
        """Tiers sized by the document: DDR holds it and four smaller ones, NVMe it and six."""
        slot = extent_geometry(spec).size_bytes
        main = -(-token_count // spec.extent_tokens)
        extra = -(-self._extra_tokens // spec.extent_tokens)
        return {
            "ddr.capacity_bytes": str((main + 4 * extra) * slot),
            "ddr.slab_bytes": str(slot),
            "nvme.capacity_bytes": str((main + 6 * extra) * slot),
            "nvme.segment_bytes": str(slot),
            "daemon.rest_port": "0",
        }

    def run(self) -> DemoReport:
        """The story, step by step."""
        self._say(f"Model: {self._stage.description}")
        self._start_daemon("Starting the daemon: DDR arena, NVMe tier and catalog")
        self._start_group(2)
        self._prefill()
        self._ask_all()
        self._control()
        self._evict_and_kill()
        for cp in (1, 3):
            self._start_group(cp)
            self._return_trip()
        fates, verdicts = self._pressure()
        return self._report(fates, verdicts)

    def daemon_log(self) -> str:
        """The end of what the daemon logged."""
        return self._daemon.log()[-LOG_CHARACTERS:]

    def close(self) -> None:
        """End every process."""
        if self._group is not None:
            self._group.close()
        if self._client is not None:
            self._client.close()
        self._daemon.stop()

    # Steps -------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._step += 1
        self._screen.print(f"[bold]{self._step:2d}.[/] {text}")

    @property
    def client(self) -> Client:
        """The connection to the daemon."""
        assert self._client is not None
        return self._client

    @property
    def session(self) -> Session:
        """Questions over the present group."""
        assert self._group is not None
        return Session(self.client, self._group)

    @property
    def cp(self) -> int:
        """Degree of the present group."""
        assert self._group is not None
        return len(self._group.pids)

    def _start_daemon(self, why: str) -> None:
        self._say(f"{why} under {self._directory}")
        self._client = self._daemon.start()

    def _start_group(self, cp: int) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
        self._say(f"Starting a group of {cp} context-parallel rank{'s' if cp > 1 else ''}")
        rows = -(-len(self._story.tokens) // cp) + -(-2 * self._extra_tokens // cp) + 64
        self._group = self._stage.group(cp, rows)

    def _bar(self) -> Progress:
        columns = (TextColumn("    {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"),
                   TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        return Progress(*columns, console=self._progress_screen)

    def _prefill(self) -> None:
        story = self._story
        self._say(f"Prefilling {len(story.tokens)} tokens once, over {self.cp} ranks, and storing their KV")
        with self._bar() as bar:
            task = bar.add_task("prefill", total=len(story.tokens))
            started = time.monotonic()
            view = self.session.ingest(
                MAIN, story.tokens, write_policy=WritePolicy.THROUGH, progress=moving(bar, task, 0)
            )
            story.prefill_seconds = time.monotonic() - started
            story.stored_with_cp = self.cp
        self._screen.print(
            f"    {size(view.size_bytes)} of KV in {view.extent_count} extents, {story.prefill_seconds:.1f} s; "
            f"resident: {', '.join(f'{tier} {size(n)}' for tier, n in view.resident_bytes.items())}"
        )

    def _ask_all(self) -> None:
        self._say(f"Asking {len(QUESTIONS)} questions, {NEW_TOKENS} tokens each; the oracle is a dense forward")
        for index in range(len(QUESTIONS)):
            self._ask(index)

    def _ask(self, index: int) -> QuestionRecord:
        """Ask one question and judge the answer; the first answer to it gets its reference from the oracle."""
        story = self._story
        question = list(QUESTIONS[index].encode())
        reply = self.session.ask(MAIN, question, NEW_TOKENS)
        story.asked[MAIN] = story.asked.get(MAIN, 0) + 1
        answer, swap = reply.answer, reply.swap
        assert swap is not None
        if len(story.references) <= index:
            story.references.append(self._stage.reference(story.tokens, question, answer))
        verdict = compare(answer, story.references[index])
        first_token_ns = swap.wait_ns + answer.prefill_ns
        recompute_ns = swap.recompute_ns + answer.prefill_ns - answer.exposed_ns
        record = QuestionRecord(
            label=f"Q{index + 1}",
            question=QUESTIONS[index].strip().splitlines()[0].removeprefix("Question: "),
            cp=self.cp,
            tokens=answer.tokens,
            tokens_identical=verdict.identical,
            argmax_equal=verdict.argmax_equal,
            max_logit_error=verdict.max_error,
            distinct_tokens=len(set(answer.tokens)),
            source_tier=swap.source_tier,
            moved_bytes=swap.moved_bytes,
            hops=swap.hops,
            reattach_seconds=(swap.reattach_ns or 0) / 1e9,
            exposed_seconds=answer.exposed_ns / 1e9,
            first_token_seconds=first_token_ns / 1e9,
            decode_seconds=answer.decode_ns / 1e9,
            recompute_seconds=swap.recompute_ns / 1e9,
            speed_up=recompute_ns / first_token_ns,
        )
        story.records.append(record)
        self._screen.print(
            f"    {record.label} {'same' if record.tokens_identical else 'DIFFERENT'}: cp={record.cp}, "
            f"from {TIER_NAMES[record.source_tier]}, error {record.max_logit_error:.1e}, "
            f"{record.distinct_tokens} distinct tokens"
        )
        return record

    def _control(self) -> None:
        """Flip the signs of one extent's values in DDR, ask, compare, and put them back."""
        story = self._story
        self._say("Control: one corrupted extent must make the comparison fail")
        self._await_durable(MAIN)
        self.client.free(MAIN, "ddr")
        self._flip_one_extent()
        answer = self.session.ask(MAIN, list(QUESTIONS[0].encode()), NEW_TOKENS).answer
        self.client.free(MAIN, "ddr")
        self._flip_one_extent()
        verdict = compare(answer, story.references[0])
        story.control_detected = not verdict.identical
        story.control_error = verdict.max_error
        self._screen.print(
            f"    {'detected' if story.control_detected else 'NOT DETECTED'}: error {verdict.max_error:.1e}, "
            f"tokens {'equal' if verdict.tokens_equal else 'differ'}"
        )

    def _await_durable(self, name: str) -> None:
        deadline = time.monotonic() + DURABLE_SECONDS
        while not self.client.document(name).durable:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{name} was not written to NVMe within {DURABLE_SECONDS:g} s")
            time.sleep(0.02)

    def _flip_one_extent(self) -> None:
        """Flip every value's sign in one extent's V planes, in shared memory; twice is as if never."""
        geometry = extent_geometry(self._stage.spec)
        attached = self.client.attach(MAIN)
        try:
            self.client.wait_layers(attached.lease, geometry.layers)
            part = attached.parts[len(attached.parts) // 2]
            raw = np.frombuffer(self.client.view(part), dtype=np.uint32)
            for layer in range(geometry.layers):
                start = geometry.plane_offset(layer, 1) // 4
                raw[start : start + geometry.plane_bytes(1) // 4] ^= np.uint32(1 << 31)
        finally:
            self.client.detach(attached.lease)

    def _evict_and_kill(self) -> None:
        self._say("Evicting the document to NVMe")
        plan = self.client.plan_free(MAIN, "nvme")
        self.client.free(MAIN, "nvme")
        view = self.client.document(MAIN)
        self._screen.print(
            f"    {len(plan)} copies left; resident: "
            f"{', '.join(f'{tier} {size(n)}' for tier, n in view.resident_bytes.items())}"
        )
        self._say("Killing the daemon with SIGKILL")
        self._story.daemon_killed = self._daemon.kill()
        assert self._group is not None
        self._group.close()
        self._group = None
        self.client.close()
        self._start_daemon("Starting it again")

    def _return_trip(self) -> None:
        """The same questions with another degree: from NVMe, from HBM, and from DDR."""
        self.client.free(MAIN, "nvme")
        self._ask(0)
        self._ask(1)
        self.client.free(MAIN, "ddr")
        self._ask(2)

    # Pressure ----------------------------------------------------------------------------------

    def _pressure(self) -> tuple[list[DocumentFate], list[VerdictView]]:
        """More documents than the tiers hold: the pinned and the popular stay, the cold leave."""
        self._say(f"Loading {EXTRA_DOCUMENTS + 1} more documents of {self._extra_tokens} tokens, one of them pinned")
        names = [PINNED] + [f"cold-{i}" for i in range(1, EXTRA_DOCUMENTS + 1)]
        session = self.session
        with self._bar() as bar:
            task = bar.add_task("prefill", total=len(names) * self._extra_tokens)
            for index, name in enumerate(names):
                session.ingest(
                    name,
                    self._slice(index),
                    write_policy=WritePolicy.THROUGH,
                    progress=moving(bar, task, index * self._extra_tokens),
                )
                self._await_durable(name)
                if name == PINNED:
                    self.client.pin(name, "ddr", owner="demo", reason="the operator said so")
                self._ask(index % len(QUESTIONS))
        rest = Rest(left_address(self._directory))
        log = rest.get("/v1/evictions", {"limit": "1000"})
        verdicts = msgspec.convert(log["evictions"], list[VerdictView])
        return [self._fate(name, verdicts) for name in [MAIN, *names]], verdicts

    def _slice(self, index: int) -> list[int]:
        """Another part of the text, wrapping around, that shares no prefix with the others."""
        start = (len(self._story.tokens) + index * self._extra_tokens) % len(self._text)
        around = self._text[start:] + self._text[:start]
        while len(around) < self._extra_tokens:
            around = around + around
        return list(f"[{index}] ".encode()) + around[: self._extra_tokens - 4]

    def _fate(self, name: str, verdicts: list[VerdictView]) -> DocumentFate:
        view = self.client.document(name)
        mine = [v for v in verdicts if f"default/{name}" in v.documents and v.reason in LEFT_FOR_ROOM]
        role = "popular" if name == MAIN else "pinned" if view.pin is not None else "cold"
        why = f"{view.use_count} {'use' if view.use_count == 1 else 'uses'}"
        if view.pin is not None:
            why = f"pinned at {TIER_NAMES[view.pin.tier]}: {view.pin.reason}"
        # Of victims in a row only one is explained in full.
        explained = [v for v in mine if v.tier != "hbm" and REUSE in v.scores]
        lowest = max(explained, key=lambda v: v.tier, default=None)
        if lowest is not None:
            cost = f"{lowest.restore_ns / 1e6:.0f} ms to {'recompute' if lowest.action == 'drop' else 'reload'}"
            why += f"; left {TIER_NAMES[lowest.tier]} for others: {lowest.scores[REUSE]:.1%} reuse x {cost}"
        return DocumentFate(
            name=name,
            role=role,
            questions=self._story.asked.get(name, 0),
            size_bytes=view.size_bytes,
            resident_bytes=view.resident_bytes,
            missing_tokens=sum(stop - start for start, stop in view.missing_tokens),
            why=why,
        )

    # Report ------------------------------------------------------------------------------------

    def _report(self, fates: list[DocumentFate], verdicts: list[VerdictView]) -> DemoReport:
        story = self._story
        by_role = {fate.name: fate for fate in fates}
        stayed = all(by_role[name].resident_bytes.get("ddr", 0) == by_role[name].size_bytes for name in (MAIN, PINNED))
        left = any(f.role == "cold" and f.resident_bytes.get("ddr", 0) < f.size_bytes for f in fates)
        identical = all(record.tokens_identical for record in story.records)
        return DemoReport(
            tokens_identical=identical,
            max_logit_error=max(record.max_logit_error for record in story.records),
            control_detected=story.control_detected,
            control_max_logit_error=story.control_error,
            cp_degrees=sorted({record.cp for record in story.records}),
            stored_with_cp=story.stored_with_cp,
            document_tokens=len(story.tokens),
            document_bytes=by_role[MAIN].size_bytes,
            model=self._stage.description,
            daemon_killed=story.daemon_killed,
            questions=story.records,
            pressure=fates,
            verdicts=verdicts,
            pressure_as_expected=stayed and left,
            metrics=self._metrics(by_role[MAIN].size_bytes),
            elapsed_seconds=time.monotonic() - self._started,
            passed=identical and story.control_detected and story.daemon_killed and stayed and left,
        )

    def _metrics(self, document_bytes: int) -> Metrics:
        records = self._story.records
        capacity: dict[str, int] = {}
        for tier in self.client.tiers():
            capacity[tier.tier] = capacity.get(tier.tier, 0) + tier.capacity_bytes
        decode = {
            str(cp): float(np.median([(NEW_TOKENS - 1) / r.decode_seconds for r in records if r.cp == cp]))
            for cp in sorted({r.cp for r in records})
        }
        switches = {
            tier: float(np.median([r.reattach_seconds for r in records if r.source_tier == tier]))
            for tier in ("hbm", "ddr", "nvme")
            if any(r.source_tier == tier for r in records)
        }
        answering = sum(r.first_token_seconds + r.decode_seconds for r in records)
        return Metrics(
            concurrency_documents={tier: size_bytes // document_bytes for tier, size_bytes in capacity.items()},
            prefill_tokens_per_second=len(self._story.tokens) / self._story.prefill_seconds,
            prefill_seconds=self._story.prefill_seconds,
            decode_tokens_per_second=decode,
            context_switch_seconds=switches,
            context_switch_share=sum(r.exposed_seconds for r in records) / answering,
        )
