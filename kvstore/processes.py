"""Processes: whether one is still the same that we knew, and whether this machine is still the one that we ran on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
START_TIME: Final = 22 - 3  # of `stat`, whose fields count from 1; the first two go up to the last parenthesis


def started(pid: int) -> int | None:
    """When the process began, in clock ticks since boot: with its pid its name for good. None when it is not there."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[START_TIME])
    except (OSError, IndexError, ValueError):
        return None


def still_running(pid: int, since: int) -> int | None:
    """A pidfd of the process, the caller's to close, if that which began then is still there."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    if started(pid) == since:  # after the descriptor was opened, so it is of this one
        return descriptor
    os.close(descriptor)
    return None


def boot() -> str | None:
    """This boot of this machine, and the pid namespace that pids are of. None where nobody tells."""
    try:
        text = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{text} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return None
