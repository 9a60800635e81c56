"""Torchrun: a runner whose rank processes torchrun started, by its conventions (RANK, WORLD_SIZE and so on).

Every process runs the same command. That of RANK 0 drives, and starts its own rank beside itself; the others become
their ranks. They meet at a socket in the folder of runners. All are on one machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from .engine_adapter.launch import JoinLauncher, Member
from .engine_adapter.runner_wire import RUNNERS
from .kvstore.errors import InvalidRequest

VARIABLES: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOIN_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class World:
    """What torchrun says of this process. `meeting` is the same in all of its processes, and in no other run's."""

    rank: int
    size: int
    meeting: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self | None:
        """What the environment says; None when this was not started by torchrun. Raises InvalidRequest."""
        if any(name not in environment for name in VARIABLES):
            return None
        try:
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local = int(environment.get("LOCAL_WORLD_SIZE", size))
        except ValueError:
            raise InvalidRequest(
                "RANK and WORLD_SIZE are set, and are no numbers; unset them, or use torchrun"
            ) from None
        if local != size:
            raise InvalidRequest(
                f"torchrun starts {size} ranks, {local} of them here: a runner is on one machine; use --nnodes 1"
            )
        return cls(rank, size, f"{environment['MASTER_PORT']}-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}")

    def check(self, ranks: int) -> None:
        """Raises InvalidRequest when it is not for that many ranks."""
        if self.size != ranks:
            raise InvalidRequest(f"torchrun started {self.size} processes for cp x tp = {ranks} ranks; say as many")

    def socket(self, data_dir: Path, name: str) -> Path:
        """Where they meet."""
        return data_dir / RUNNERS / f"{name}.{self.meeting}.join"


class TorchrunLauncher:
    """Starts rank 0 here, and waits for the others, which torchrun has started. See launch.Launcher."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rank: subprocess.Popen[bytes] | None = None

    def launch(self, size: int) -> list[Member]:
        """See Launcher."""
        command = [sys.executable, "-m", "holdfast.engine_adapter.rank", str(self._path), "0"]
        self._rank = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        return JoinLauncher(self._path, JOIN_SECONDS).launch(size)


def become_rank(path: Path, rank: int) -> None:
    """Be that rank until its driver ends it; never returns. Raises GroupFailed when no driver comes."""
    from .engine_adapter.rank import join

    status = join(path, rank)
    sys.stdout.flush()
    os._exit(status)  # torch's threads may outlive main
