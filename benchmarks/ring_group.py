"""The driver's end of bench-ring's processes: told together, heard with a deadline, timed on the clock they share."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ring_case import Case
from samples import Samples

HERE: Final = Path(__file__).resolve().parent
WORKER: Final = HERE / "ring_worker.py"
DEADLINE_SECONDS: Final = 120.0
PAUSE_SECONDS: Final = 0.004  # OpenMP's threads spin on for a while after the last parallel region
TICKS: Final = os.sysconf("SC_CLK_TCK")


class Worker:
    """One process."""

    def __init__(self, threads: int, *arguments: str) -> None:
        self._heard = b""
        self._process = subprocess.Popen(
            [sys.executable, WORKER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.pid = self._process.pid

    def tell(self, do: str, **arguments: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do} | arguments).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next answer. Raises RuntimeError when the process ended or does not answer in time."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        limit = time.monotonic() + DEADLINE_SECONDS
        while b"\n" not in self._heard:
            if not select.select([descriptor], [], [], max(0.0, limit - time.monotonic()))[0]:
                raise RuntimeError(f"{self._process.args} did not answer within {DEADLINE_SECONDS:.0f} s")
            some = os.read(descriptor, 1 << 16)
            if not some:
                raise RuntimeError(f"{self._process.args} ended with status {self._process.wait(10)}")
            self._heard += some
        line, _, self._heard = self._heard.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


@dataclass(frozen=True)
class Group:
    """Workers that are told the same."""

    workers: tuple[Worker, ...]

    @property
    def size(self) -> int:
        return len(self.workers)

    def ask(self, do: str, **arguments: object) -> list[dict[str, Any]]:
        for worker in self.workers:
            worker.tell(do, **arguments)
        return [worker.hear() for worker in self.workers]

    def sample(self, times: int, do: str, **arguments: object) -> tuple[float, float]:
        """Seconds of one of `times` repetitions, from the first rank's start to the last one's end; of CPU, of all."""
        time.sleep(PAUSE_SECONDS)
        answers = self.ask(do, times=times, **arguments)
        wall = max(answer["ended"] for answer in answers) - min(answer["started"] for answer in answers)
        return wall / times, sum(answer["cpu"] for answer in answers) / times


@contextmanager
def dense_group(threads: int) -> Iterator[Group]:
    with _started([Worker(threads, "dense", str(threads))]) as group:
        yield group


@contextmanager
def ranks_group(size: int, directory: Path) -> Iterator[Group]:
    """Ranks that meet in `directory`, a new one for every group."""
    directory.mkdir()
    with _started([Worker(1, "rank", str(rank), str(size), str(directory)) for rank in range(size)]) as group:
        yield group


@contextmanager
def _started(workers: Sequence[Worker]) -> Iterator[Group]:
    with ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.end)
        for worker in workers:
            worker.hear()
        yield Group(tuple(workers))


def load(groups: Sequence[Group], cases: Sequence[Case]) -> None:
    """All processes make their inputs at once."""
    for case in cases:
        for group in groups:
            for worker in group.workers:
                worker.tell("load", case=asdict(case))
        for group in groups:
            for worker in group.workers:
                worker.hear()


Side = Callable[[], tuple[float, float]]  # seconds, CPU-seconds


def interleave(samples: Samples, rounds: int, sides: dict[str, Side]) -> None:
    """Each side once a round; each goes first in its turn."""
    names = list(sides)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds, cpu = sides[name]()
            samples.add(name, seconds)
            samples.add(f"{name}_cpu", cpu)


class Neighbours:
    """How many cores programs other than ours kept busy since the last question."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        self._last = self._now()

    def _now(self) -> tuple[float, float, float]:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = fields[3] + fields[4]
        ours = time.process_time() + sum(worker.cpu_seconds() for worker in self._workers)
        return time.monotonic(), (sum(fields) - idle) / TICKS, ours

    def cores(self) -> float:
        now, last = self._now(), self._last
        self._last = now
        wall, busy, ours = (after - before for after, before in zip(now, last, strict=True))
        return max(0.0, (busy - ours) / max(wall, 0.01))
