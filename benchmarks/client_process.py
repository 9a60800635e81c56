"""A client in a process of its own. `attach SOCKET NAME`: seconds of its first attach. `ping SOCKET`: round trips.

Pings are due every 5 ms, answered or not, so that a stalled loop delays all that fall due meanwhile. They end
with stdin, and are printed as JSON: seconds from due to answered.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from holdfast.kvstore.client import Client
from holdfast.kvstore.errors import ClaimNotFound

PING_SECONDS: Final = 0.005
NO_LEASE: Final = 0


def first_attach(client: Client, name: str) -> float:
    started = time.perf_counter()
    attached = client.attach(name)
    client.wait_layers(attached.lease, 1)
    views = client.views(attached.runs)
    assert isinstance(views[0][0], int)
    seconds = time.perf_counter() - started
    client.detach(attached.lease)
    return seconds


def ping(client: Client) -> list[float]:
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    print("ready", flush=True)
    samples: list[float] = []
    started = time.perf_counter()
    while not ended.is_set():
        due = started + len(samples) * PING_SECONDS
        time.sleep(max(0.0, due - time.perf_counter()))
        with suppress(ClaimNotFound):  # the smallest question there is: it looks at nothing that grows
            client.renew(NO_LEASE)
        samples.append(time.perf_counter() - due)
    return samples


def main() -> None:
    what, socket, *rest = sys.argv[1:]
    client = Client(Path(socket))
    print(first_attach(client, *rest) if what == "attach" else json.dumps(ping(client)))
    client.close()


if __name__ == "__main__":
    main()
