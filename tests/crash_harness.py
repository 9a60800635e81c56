"""Crash harness: random work against a real daemon that is killed at any instant, held against a naive model.

    python tests/crash_harness.py --minutes 20 [--seed 7]      # make soak
    python tests/crash_harness.py --replay failure.json        # the lives of a failure, once more

A run is a list of lives. In each a daemon starts, perhaps with other budgets, two client processes work for two tenants
each, and it ends: by SIGKILL after some operation, by SIGKILL at a named point (daemon_faults), or by SIGTERM. What is
done is decided by the seed alone; only where a kill falls is up to the clock. After each life the dead directory is
audited with every byte read, and a new daemon must show what the model allows:

* durable before the end => there, whole, bit-exact (holes only where an eviction or too small a budget allows them);
* not durable            => bit-exact, or with a named hole, or absent;
* deleted, acknowledged  => absent; never put => absent;
* whatever is served is bit-exact; books, files and catalog agree; `check` is clean.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sqlite3
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from holdfast.kvstore.check import Wish, check
from holdfast.kvstore.client import Client
from holdfast.kvstore.clock import SystemClock
from holdfast.kvstore.config import load_config
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import (
    ClaimNotFound,
    Conflict,
    CorruptExtent,
    DaemonUnavailable,
    DeadlineExceeded,
    DocumentIncomplete,
    DocumentNotFound,
    HoldfastError,
    InUse,
    NoCapacity,
    Unavailable,
)
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.seal import seal_planes

from daemon_clients import client_process
from daemon_faults import ALL_FAULTS, Kill
from daemon_process import LAYERS, PATIENCE_SECONDS, DaemonProcess, until
from fakes import EXTENT_BYTES, EXTENT_TOKENS, tiny_spec
from holdfast.rest import Rest, left_address

TENANTS = (("red", "green"), ("blue", "white"))  # two workers, two tenants each
FAMILIES = ("a", "b", "c")
SHARED = {"a": 96, "b": 160, "c": 0}  # tokens that all documents of a family begin with
LENGTHS = (20, 96, 130, 200, 333)
BUDGETS = {  # bytes of DDR and NVMe; everything fits into the ample NVMe at once
    "ample": {"ddr.capacity_bytes": "2 MiB", "nvme.capacity_bytes": "16 MiB"},
    "little ddr": {"ddr.capacity_bytes": "1 MiB", "nvme.capacity_bytes": "16 MiB"},
    "little nvme": {"ddr.capacity_bytes": "2 MiB", "nvme.capacity_bytes": "1 MiB"},
}
POLICIES = {WritePolicy.AUTO: 3, WritePolicy.THROUGH: 4, WritePolicy.BACK: 2, WritePolicy.MEMORY: 1}  # how often
REFUSALS = (NoCapacity, DeadlineExceeded, Conflict, ClaimNotFound, InUse)  # an answer that changes nothing
OP_SECONDS = 5.0


class Violation(AssertionError):
    """The daemon did what the model forbids."""


# Documents ---------------------------------------------------------------------------------------


def stream(*words) -> np.ndarray:
    return np.random.default_rng(list("/".join(map(str, words)).encode())).integers(0, 1000, 512).astype("<u4")


def tokens_of(name: str) -> np.ndarray:
    """`name` is family-tail-length."""
    family, tail, length = name.split("-")
    shared = SHARED[family]
    return np.concatenate([stream(family)[:shared], stream(family, tail)])[: int(length)]


def content_of(tenant: str, name: str, start: int) -> bytes:
    """What the extent at `start` holds: the same for all documents of the tenant that share it."""
    prefix = tokens_of(name)[: start + EXTENT_TOKENS].tobytes()
    seed = hashlib.blake2b(tenant.encode() + b"/" + prefix, digest_size=8).digest()
    return np.random.default_rng(list(seed)).bytes(EXTENT_BYTES)


NAMES = [f"{family}-{tail}-{length}" for family in FAMILIES for tail in "xy" for length in LENGTHS]


# Operations: lists of plain values, so that a failure can be printed and replayed -----------------------


def some_operations(rng: random.Random, tenants: tuple[str, ...], count: int) -> list[list]:
    found: list[list] = []
    while len(found) < count:
        tenant, name = rng.choice(tenants), rng.choice(NAMES)
        kinds = ["put", "read", "settle", "free", "delete", "pin", "unpin", "vanish", "abort", "drop", "check"]
        kind = rng.choices(kinds, [40, 20, 16, 12, 6, 5, 4, 2, 2, 1, 2])[0]
        match kind:
            case "put":
                policy = rng.choices(list(POLICIES), POLICIES.values())[0].value
                found.append([kind, tenant, name, policy, rng.random() < 0.5])  # the last: sealed by its writer
                if rng.random() < 0.4:
                    found.append(["settle", tenant, name])
            case "free":
                found.append([kind, tenant, name, rng.choices(["nvme", "none"], [3, 1])[0]])
            case "pin":
                found.append([kind, tenant, name, rng.choice(["ddr", "nvme"]), rng.choice([0.05, 1.0, None])])
            case "drop":
                found += [[what, tenant, each] for each in NAMES for what in ("unpin", "delete")]
            case "check":
                found.append([kind, tenant, rng.random() < 0.5])
            case _:
                found.append([kind, tenant, name])
    return found


def some_life(rng: random.Random) -> dict:
    """How a daemon is started, what is asked of it, and how it ends."""
    work = [some_operations(rng, tenants, rng.randrange(3, 18)) for tenants in TENANTS]
    end = rng.choices(["point", "kill", "stop"], [5, 4, 1])[0]
    return {
        "budget": rng.choices(list(BUDGETS), [6, 2, 2])[0],
        "work": work,
        "end": end,
        "point": [rng.choice(ALL_FAULTS), rng.choice([1, 1, 1, 2, 2, 3, 5, 8, 13, 21])] if end == "point" else None,
        "kill_after": rng.randrange(sum(map(len, work)) + 1),
        "commit_ms": rng.choice([0, 0, 5, 20]),
        "kill_ms": rng.choice([0, 0, 1, 2, 5, 10, 30]),
    }


# The client processes ----------------------------------------------------------------------------------


def works(pipe, path: Path, data_dir: Path, operations: list) -> None:
    """Carry out operations one by one; say when each begins and what came of it."""
    clients: dict[str, Client] = {}
    try:
        for index, operation in operations:
            tenant = operation[1]
            if tenant not in clients:
                clients[tenant] = Client(path, tenant)
                clients[tenant].register_spec(tiny_spec())
            pipe.send(("begin", index))
            pipe.send(("end", index, *one(pipe, clients[tenant], data_dir, operation)))
        pipe.send(("done",))
    except Unavailable as error:  # it is dying, or dead
        pipe.send(("lost", str(error)))
    except (Violation, HoldfastError) as error:
        pipe.send(("violation", repr(error)))
    pipe.recv()  # claims live on until the parent says so, or kills us


def one(pipe, client: Client, data_dir: Path, operation: list) -> tuple[str, dict | None]:
    """(what came of it, how the document looks now). Raises Unavailable or Violation."""
    kind, tenant = operation[:2]
    if kind == "check":
        try:
            found = Rest(left_address(data_dir)).post("/v1/check", {"data": operation[2], "deadline_seconds": 30}, 40)
        except InUse:  # the other worker checks
            return "busy", None
        if not found["clean"]:
            raise Violation(f"check beside work: {found['remaining']}")
        return "ok", None
    try:
        act(pipe, client, kind, tenant, *operation[2:])
        outcome = "ok"
    except DeadlineExceeded:
        outcome = "deadline"
    except Unavailable:
        raise
    except DocumentIncomplete:
        outcome = "incomplete"
    except DocumentNotFound:
        outcome = "absent"
    except REFUSALS as error:
        outcome = f"refused: {error.code}"
    except HoldfastError as error:
        raise Violation(f"{operation}: {error.code}: {error}") from error
    return outcome, look(client, operation[2])


def look(client: Client, name: str) -> dict | None:
    """How a document looks; None when there is none (any more, or the daemon is gone)."""
    with suppress(DocumentNotFound, DaemonUnavailable):
        shown = client.document(name)
        return {"durable": shown.durable, "complete": shown.complete}
    return None


def act(pipe, client: Client, kind: str, tenant: str, name: str, *more) -> None:
    match kind:
        case "put" | "vanish" | "abort":
            policy = WritePolicy(more[0]) if more else WritePolicy.THROUGH
            spec = tiny_spec().fingerprint()
            opened = client.begin_ingest(name, spec, tokens_of(name), write_policy=policy, deadline_seconds=OP_SECONDS)
            seals = []
            for part in opened.parts[: len(opened.parts) // 2 if kind != "put" else None]:
                view = client.view(part)
                view[:] = content_of(tenant, name, part.start)
                seals.append(seal_planes(view, extent_geometry(tiny_spec())))
                view.release()
            if kind == "vanish":
                pipe.send(("vanish",))
                pipe.recv()  # killed here
            if kind == "abort":
                client.abort_ingest(opened.ingest)
            else:
                client.commit_ingest(opened.ingest, seals if more[1] else (), deadline_seconds=20.0)
        case "read":
            read(client, tenant, name)
        case "settle":
            deadline = time.monotonic() + 1.0
            while not client.document(name).durable and time.monotonic() < deadline:
                time.sleep(0.004)
        case "free":
            client.free(name, more[0], deadline_seconds=OP_SECONDS)
        case "delete":
            client.delete(name)
        case "pin":
            client.pin(name, more[0], ttl_seconds=more[1], owner="harness")
        case "unpin":
            client.unpin(name)


def read(client: Client, tenant: str, name: str) -> None:
    """Attach and compare every byte."""
    attached = client.attach(name, deadline_seconds=OP_SECONDS)
    try:
        client.wait_layers(attached.lease, LAYERS, 20.0)
        starts = set()
        for part in attached.parts:
            starts.add(part.start)
            view = client.view(part)
            same = view == content_of(tenant, name, part.start)
            view.release()
            if not same:
                raise Violation(f"{tenant}/{name}: the extent at token {part.start} is not what was put")
        if starts != set(range(0, len(tokens_of(name)), EXTENT_TOKENS)):
            raise Violation(f"{tenant}/{name}: attached with extents at {sorted(starts)}")
    finally:
        with suppress(Unavailable):
            client.detach(attached.lease)


# The model ---------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """What is known of a document. `unsure`: the daemon died while it was put or deleted."""

    present: bool = False
    durable: bool = False
    may_have_holes: bool = False
    unsure: bool = False


@dataclass
class Model:
    """What the daemon may show."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    is_tight: bool = False

    def entry(self, tenant: str, name: str) -> Entry:
        return self.entries.setdefault((tenant, name), Entry())

    def begin_life(self, budget: str) -> None:
        self.is_tight = budget == "little nvme"
        if self.is_tight:
            for entry in self.entries.values():
                entry.may_have_holes = True

    def lost(self, operation: list) -> None:
        """The daemon died during this operation."""
        kind, tenant, name, *more = operation
        if kind in ("put", "delete"):
            self.entry(tenant, name).unsure = True
        if kind == "free":
            self._freed(tenant, name, more[0])

    def _freed(self, tenant: str, name: str, to: str) -> None:
        for other in NAMES:
            if other[0] == name[0] and (to == "none" or other == name):
                self.entry(tenant, other).may_have_holes |= to == "none"

    def ended(self, operation: list, outcome: str, shown: dict | None) -> None:
        """It was answered. Raises Violation for an answer that must not be."""
        kind, tenant, name, *more = operation
        if kind == "check":
            return
        entry = self.entry(tenant, name)
        if outcome == "absent" and entry.present:
            raise Violation(f"{tenant}/{name} is gone")
        if outcome == "incomplete" and entry.durable and not entry.may_have_holes:
            raise Violation(f"{tenant}/{name} was durable and has a hole")
        if outcome == "ok":
            if kind == "put":
                entry.present = True
                entry.may_have_holes = self.is_tight or more[0] == WritePolicy.MEMORY.value
            elif kind == "delete":
                self.entries[tenant, name] = entry = Entry()
            elif kind not in ("vanish", "abort") and not entry.present:
                raise Violation(f"{kind} of {tenant}/{name}, which was deleted or never put")
        if kind == "free":
            self._freed(tenant, name, more[0])
        if shown is not None:
            if not entry.present:
                raise Violation(f"{tenant}/{name} is shown, though deleted or never put")
            entry.durable = shown["durable"]
            if entry.durable and not shown["complete"] and not entry.may_have_holes:
                raise Violation(f"{tenant}/{name} is durable with a hole that nobody asked for")

    def reborn(self, tenant: str, shown: dict, whole: set[str]) -> None:
        """A new daemon shows these documents of the tenant; `whole` were read, bit-exact."""
        for name in {*shown, *(n for t, n in self.entries if t == tenant)}:
            entry = self.entry(tenant, name)
            if name in shown:
                if not (entry.present or entry.unsure):
                    raise Violation(f"{tenant}/{name} came back, though deleted or never put")
                strict = entry.durable and not entry.may_have_holes and not entry.unsure
                if strict and name not in whole:
                    raise Violation(f"{tenant}/{name} was durable and is not whole: {shown[name]}")
                holes = entry.may_have_holes or name not in whole
                self.entries[tenant, name] = Entry(present=True, durable=shown[name].durable, may_have_holes=holes)
            elif entry.present and entry.durable and not entry.unsure:
                raise Violation(f"{tenant}/{name} was durable and is gone")
            else:
                self.entries[tenant, name] = Entry()


# One life after another --------------------------------------------------------------------------------


class Harness:
    """A daemon's directory, the model of it, and what has been done so far."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.model = Model()
        self.lives: list[dict] = []
        self.counts = {"lives": 0, "operations": 0, "kills": 0, "stops": 0, "documents read": 0}
        self.struck: Counter[str] = Counter()  # named points at which a daemon was killed

    def live(self, life: dict) -> None:
        """Start, verify, work, die, audit. Raises Violation."""
        self.lives.append(life)
        daemon = self.daemon
        daemon.settings |= BUDGETS[life["budget"]]
        armed = daemon.directory / "armed"
        armed.unlink(missing_ok=True)
        kind, count = life["point"] or ("none", 0)
        daemon.start(Kill(kind, count, armed, life["commit_ms"]))
        self.model.begin_life(life["budget"])
        self._verify()
        armed.touch()
        self._work(life)
        self._end(life)
        self._audit()
        self.counts["lives"] += 1

    @property
    def told(self) -> str:
        """How far it is, in a line."""
        return json.dumps(self.counts | {"struck": dict(sorted(self.struck.items()))})

    def _verify(self) -> None:
        """What the new daemon shows is what the model allows."""
        self._agree()
        for tenant in (tenant for tenants in TENANTS for tenant in tenants):
            client = Client(self.daemon.socket, tenant)
            try:
                client.register_spec(tiny_spec())
                shown = {document.name: document for document in client.documents()}
                whole = set()
                for name, document in shown.items():
                    if document.complete:
                        # What has no row may be another's bytes; and what is read here may need room. See `reborn`.
                        with suppress(DocumentIncomplete, *(() if document.durable else (CorruptExtent,))):
                            read(client, tenant, name)
                            whole.add(name)
                self.counts["documents read"] += len(whole)
                self.model.reborn(tenant, shown, whole)
            finally:
                client.close()
        found = self.daemon.rest().post("/v1/check", {"deadline_seconds": 30}, 40)
        if not found["clean"]:
            raise Violation(f"check after a start: {found['remaining']}")

    def _agree(self) -> None:
        """Catalog rows, the daemon's accounts and the files, before anybody asks anything of it."""
        config = load_config(None, {}, self.daemon.settings)

        def rows() -> list[tuple[int]]:
            with closing(sqlite3.connect(f"file:{self.daemon.data_dir}/catalog.sqlite?mode=ro", uri=True)) as database:
                return database.execute("SELECT segment FROM extents").fetchall()

        def booked() -> bool:  # rows that a smaller budget gave up are dropped soon after the start
            return self.daemon.used("nvme") == len(rows()) * EXTENT_BYTES

        until(booked, "used bytes are those of the rows")
        if self.daemon.used("nvme") > config.nvme.capacity_bytes:
            raise Violation("more on NVMe than the budget")

        def filed() -> bool:  # what the daemon has found in memory it writes out by itself, and the file is there first
            files = {int(path.name.split("-")[1]) for path in config.nvme.directory.glob("segment-*")}
            return files == {segment for (segment,) in rows()}

        until(filed, "segment files are those that rows name")
        slabs = Path(self.daemon.settings["ddr.directory"]).rglob("slab-*")
        if sum(path.stat().st_size for path in slabs) > config.ddr.capacity_bytes:
            raise Violation("more slab files than the DDR budget")

    def _work(self, life: dict) -> None:
        """Let the workers work until they are done or the daemon is dead."""
        self.workers = [Worker(self, list(enumerate(work))) for work in life["work"]]
        kill_at = life["kill_after"] if life["end"] == "kill" else None
        done = 0
        try:
            while any(worker.is_at_work for worker in self.workers):
                pipes = [worker.pipe for worker in self.workers if worker.is_at_work]
                if kill_at is not None and done >= kill_at:
                    time.sleep(life["kill_ms"] / 1000)
                    self._kill()
                    kill_at = None
                ready = wait(pipes, PATIENCE_SECONDS * 2)
                if not ready:
                    raise Violation("the workers say nothing: the daemon hangs")
                for worker in self.workers:
                    if worker.pipe in ready:
                        done += worker.hear()
        finally:
            for worker in self.workers:
                worker.close()
        self.counts["operations"] += done

    def _kill(self) -> None:
        if self.daemon.alive:
            os.kill(self.daemon.pid, 9)

    def _end(self, life: dict) -> None:
        if life["end"] == "stop" and self.daemon.alive:
            status = self.daemon.stop()
            self.counts["stops"] += 1
            expected = 0
        else:
            if life["point"] and not self.daemon.alive:
                self.struck[life["point"][0]] += 1
            self._kill()
            status = self.daemon.wait()
            self.counts["kills"] += 1
            expected = -9
        if status != expected or "bug: stopping" in self.daemon.events():
            raise Violation(f"the daemon ended with {status}:\n{self.daemon.log_text()[-4000:]}")

    def _audit(self) -> None:
        """The dead directory: nothing worse than a note, and every row's bytes are as sealed."""
        config = load_config(None, {}, self.daemon.settings)
        report = check(config, SystemClock(), Wish(fix=False, data=True), lambda *_: None)
        bad = [finding for finding in report.remaining if finding.severity.value != "note"]
        if bad:
            raise Violation(f"the dead directory: {bad}")


class Worker:
    """A client process and the operations that it has still to do; made anew when it was killed."""

    def __init__(self, harness: Harness, operations: list) -> None:
        self.harness = harness
        self.operations = dict(operations)
        self.current: int | None = None
        self.is_at_work = True
        self._open(operations)

    def _open(self, operations: list) -> None:
        daemon = self.harness.daemon
        self.context = client_process(works, daemon.socket, daemon.data_dir, operations)
        self.process = self.context.__enter__()
        self.pipe = self.process.pipe

    def close(self) -> None:
        self.context.__exit__(None, None, None)

    def hear(self) -> int:
        """One word of the process; returns how many operations ended with it."""
        model = self.harness.model
        try:
            word, *more = self.pipe.recv()
        except EOFError as error:
            raise Violation(f"a worker died during {self.operations.get(self.current)}") from error
        match word:
            case "begin":
                self.current = more[0]
                return 0
            case "end":
                index, outcome, shown = more
                self.current = None
                model.ended(self.operations[index], outcome, shown)
                return 1
            case "vanish":
                self._vanish()
                return 1
            case "violation":
                raise Violation(more[0])
            case "lost":
                if self.current is not None:
                    model.lost(self.operations[self.current])
        self.is_at_work = False
        return 0

    def _vanish(self) -> None:
        """Kill the process in the middle of an ingest; another goes on with what follows."""
        assert self.current is not None
        self.close()
        self._open([(index, op) for index, op in self.operations.items() if index > self.current])


def run(seed: int, *, lives: int | None = None, minutes: float | None = None, say=print) -> Harness:
    """Lives until their number or the time is up; raises Violation after printing how to repeat it."""
    rng = random.Random(seed)
    deadline = time.monotonic() + minutes * 60 if minutes is not None else None

    def more():
        count = 0
        while (lives is None or count < lives) and (deadline is None or time.monotonic() < deadline):
            count += 1
            yield some_life(rng)

    say(f"seed {seed}")
    return replay(more(), say=say)


def replay(lives, say=print) -> Harness:
    """Live these lives on a fresh directory."""
    with DaemonProcess(daemon__drain_seconds="10") as daemon:
        harness = Harness(daemon)
        try:
            for life in lives:
                harness.live(life)
                if not harness.counts["lives"] % 50:
                    say(harness.told)
        except (Violation, AssertionError, HoldfastError):
            say("the lives that led here, for --replay:")
            say(json.dumps(harness.lives))
            say(daemon.log_text()[-3000:])
            raise
        say(harness.told)
        return harness


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--replay", type=Path)
    chosen = parser.parse_args()
    if chosen.replay is not None:
        replay(json.loads(chosen.replay.read_text()))
    else:
        seed = chosen.seed if chosen.seed is not None else int.from_bytes(os.urandom(4), "big")
        run(seed, minutes=chosen.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
