"""A worker program in another environment, asked one thing at a time: lines of JSON over its standard streams."""

from __future__ import annotations

import json
import subprocess
from typing import Any


class Peer:
    """What it is asked is a method's name and its arguments; what it answers, a dict. `name` is for complaints."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process, self.name = process, name

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended when asked to {do}: its log says why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def seconds(self, do: str, **arguments: object) -> float:
        return float(self.ask(do, **arguments)["seconds"])

    def close(self, seconds: float) -> None:
        """End its input, which ends it; killed when it takes longer."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
