"""Demo stage: the processes the demo runs (a daemon of its own, groups of ranks) and the oracle it is judged by."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from .engine_adapter.engine import Answer
from .engine_adapter.group import GroupOptions, RankGroup
from .kvstore.client import Client
from .kvstore.errors import DaemonUnavailable, InvalidRequest
from .kvstore.spec import KVSpec
from .ring_attention.checkpoint import load_model
from .ring_attention.device import use_threads
from .ring_attention.synthetic import write_checkpoint

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 60.0
TOLERANCE: Final = 1e-4
SEED: Final = 0
MARK: Final = "holdfast-demo"  # lies in the data directories that demos made: what they hold may be thrown away


class DaemonProcess:
    """`holdfast serve` as a process of its own on the demo's data directory."""

    def __init__(self, data_dir: Path, settings: dict[str, str]) -> None:
        self._data_dir = data_dir
        # Its directory does not outlive it: no memory, and no mount, may stay there.
        self._settings = {"ddr.capacity_bytes": "1 GiB", "ddr.on_stop": "free", **settings}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Where engines connect."""
        return self._data_dir / "holdfast.sock"

    def start(self) -> Client:
        """Start it and connect. Raises DaemonUnavailable when it does not come up."""
        sets = [part for key, value in self._settings.items() for part in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "holdfast", "--data-dir", str(self._data_dir), "serve", *sets]
        with (self._data_dir / "daemon.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return Client(self.socket)
            except DaemonUnavailable:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise DaemonUnavailable("the demo's daemon did not start") from None
                time.sleep(0.02)

    def log(self) -> str:
        """What it has logged."""
        path = self._data_dir / "daemon.log"
        return path.read_text() if path.exists() else ""

    def kill(self) -> bool:
        """SIGKILL: no goodbye, no flush. True when that, and nothing before it, ended the daemon."""
        if self._process is None:
            return False
        self._process.send_signal(signal.SIGKILL)
        status = self._process.wait()
        self._process = None
        return status == -signal.SIGKILL

    def stop(self) -> int | None:
        """SIGTERM, and wait for the clean exit; returns its status."""
        if self._process is None:
            return None
        self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return None
        finally:
            self._process = None


@dataclass(frozen=True, slots=True)
class Reference:
    """The oracle's word on one answer: its tokens, and float32 logits [tokens, vocabulary] that predict them."""

    tokens: list[int]
    logits: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an answer compares with the reference.

    `max_error` is over the rows that are comparable: those up to the first token that differs.
    """

    tokens_equal: bool
    argmax_equal: bool
    max_error: float

    @property
    def identical(self) -> bool:
        """Same tokens, the oracle's choice at each position, logits within tolerance."""
        return self.tokens_equal and self.argmax_equal and self.max_error <= TOLERANCE


def compare(answer: Answer, reference: Reference) -> Verdict:
    """Judge an answer."""
    pairs = list(zip(answer.tokens, reference.tokens, strict=False))
    same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
    rows = min(same + 1, len(pairs))  # the row that chose the first different token still saw equal input
    error = float(np.abs(answer.logits[:rows] - reference.logits[:rows]).max())
    return Verdict(
        tokens_equal=answer.tokens == reference.tokens,
        argmax_equal=answer.tokens == reference.logits.argmax(axis=1).tolist(),
        max_error=error,
    )


class Stage:
    """The model, and what runs it: rank groups, and the oracle in this process."""

    def __init__(self, data_dir: Path, socket: Path) -> None:
        self._socket = socket
        self._directory = data_dir / "model"
        if not (self._directory / "config.json").exists():
            write_checkpoint(self._directory, seed=SEED)
        use_threads(0)
        self._oracle = load_model(self._directory)
        config = self._oracle.config
        self.description = (
            f"Llama, {config.layers} layers, {config.heads} heads ({config.kv_heads} kv), head dim {config.head_dim}, "
            f"byte tokens, {config.dtype}, seed {SEED}"
        )

    @property
    def spec(self) -> KVSpec:
        """The model's KV."""
        return self._oracle.spec

    def group(self, cp: int, rows: int) -> RankGroup:
        """Start `cp` ranks with `rows` token rows of HBM each."""
        options = GroupOptions(name=f"cp{cp}", model=self._directory, cp=cp, rows=rows, daemon_socket=self._socket)
        return RankGroup(options, self.spec)

    def reference(self, document: list[int], question: list[int], answer: Answer) -> Reference:
        """Dense, cache-free, teacher-forced: one forward over document + question + answer, no ring and no merge."""
        tokens = document + question + answer.tokens[:-1]
        logits = self._oracle.dense_logits(tokens, len(answer.tokens))
        return Reference(answer.tokens, logits.numpy())


@contextmanager
def scratch(data_dir: Path | None) -> Iterator[Path]:
    """The demo's data directory: the caller's, emptied of an earlier demo's store, or a temporary one.

    Raises InvalidRequest where the caller's holds anything that no demo made.
    """
    if data_dir is not None:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            if not (data_dir / MARK).exists() and any(data_dir.iterdir()):
                raise InvalidRequest(f"{data_dir} is not empty, and no demo made it; name an empty directory")
            (data_dir / MARK).touch()
        except OSError as error:
            raise InvalidRequest(f"{data_dir} cannot hold the demo ({error.strerror})") from error
        for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
            (data_dir / name).unlink(missing_ok=True)
        shutil.rmtree(data_dir / "nvme", ignore_errors=True)
        yield data_dir
        return
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-") as name:
        yield Path(name)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM unwinds, as Ctrl-C does: processes end and temporary directories go."""

    def unwind(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
