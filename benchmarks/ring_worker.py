"""A long-lived process of bench-ring: `ring_worker.py dense THREADS` or `ring_worker.py rank RANK SIZE DIRECTORY`.

Commands are JSON lines on stdin, answers JSON lines on stdout. Between commands it sleeps on the pipe.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def made(kind: str, *arguments: str) -> Any:
    if kind == "dense":
        from ring_dense import Dense

        return Dense(int(arguments[0]))
    from ring_rank import joined

    return joined(int(arguments[0]), int(arguments[1]), arguments[2])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed is no answer
    worker = made(*sys.argv[1:])
    print(json.dumps({"pid": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(worker, command.pop("do"))(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
