"""What bench-adapters starts: engines, LMCache's server, a daemon; and the CPU time of their process trees."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bare import let_go
from documents import until
from holdfast.kvstore.document import WritePolicy
from peer import Peer

from holdfast.demo_stage import DaemonProcess
from holdfast.rest import Rest, left_address

HERE: Final = Path(__file__).resolve().parent
VLLM: Final = Path(os.environ.get("HOLDFAST_VLLM_PYTHON", HERE.parent / ".venv-vllm" / "bin" / "python"))
LMCACHE: Final = Path(os.environ.get("HOLDFAST_LMCACHE_PYTHON", HERE.parent / ".venv-lmcache" / "bin" / "python"))
STOP_SECONDS: Final = 60.0
LOG_LINES: Final = 10
TICKS: Final = os.sysconf("SC_CLK_TCK")
# The number of OMP threads, and so the numbers, would differ between engines with a connector and without.
CPUS: Final = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))


@contextmanager
def engine(directory: Path, name: str, settings: Mapping[str, Any], connector: dict[str, Any] | None) -> Iterator[Peer]:
    """A vLLM engine that was started with `settings`. Its complaints go to a log in `directory`."""
    environment = os.environ | {
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),  # for its workers
        "VLLM_CPU_OMP_THREADS_BIND": CPUS,
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),  # of torch: LMCache's copies take all cores then
        "LMCACHE_TRACK_USAGE": "false",
    }
    command = [VLLM, HERE / "adapters_engine.py"]
    pipe = subprocess.PIPE
    path = directory / f"{name}.log"
    with path.open("w") as log:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
    asked = Peer(process, f"the engine of {name}")
    try:
        asked.ask("start", connector=connector, **settings)
        yield asked
    except RuntimeError:
        print(f"The log of {asked.name} ends so:\n{tail(path)}")
        raise
    finally:
        asked.close(STOP_SECONDS)


class LMCacheServer:
    """`lmcache server` with its RAM in shared memory, which is its fastest way to a CPU's pages (LOG.md), and files."""

    def __init__(self, directory: Path, ram_bytes: int) -> None:
        self._disk = directory / "lmcache"
        self._disk.mkdir()
        self.port, http_port = _free_ports(2)
        self._url = f"http://127.0.0.1:{http_port}"
        options = {
            "supported-transfer-mode": "auto",
            "shm-name": f"holdfast-bench-{os.getpid()}",
            "l1-size-gb": ram_bytes / 2**30,
            "eviction-policy": "LRU",
            "l2-prefetch-policy": "retain",
            "l2-adapter": json.dumps({"type": "fs", "base_path": str(self._disk)}),
            "port": self.port,
            "http-port": http_port,
        }
        command = [LMCACHE.with_name("lmcache"), "server", "--no-l1-use-lazy"]
        command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
        self._log = directory / "lmcache.log"
        with self._log.open("w") as log:
            # Its environment has no room for the paths of ours.
            environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment | {"LMCACHE_TRACK_USAGE": "false"}
            )
        until(self._is_up)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"lmcache server ended with status {self._process.returncode}:\n{tail(self._log)}")
        try:
            self._http("/healthcheck")
        except OSError:
            return False
        return True

    def connector(self) -> dict[str, Any]:
        extra = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": self.port}
        return {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}

    def clear(self) -> None:
        """Nothing in its RAM, and nothing of its files in the page cache."""
        self._http("/cache/clear", b'{"tier": "l1"}')
        for path in self._disk.rglob("*.data"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def chunks(self) -> int:
        """Chunks in files: they are renamed to this name once written."""
        return len(list(self._disk.rglob("*.data")))

    def hits(self) -> dict[str, int]:
        """Tokens that it says were found in its RAM and on its disk."""
        names = {"ram_tokens": "lmcache_mp_lookup_hit_l1_tokens_total"}
        names["disk_tokens"] = "lmcache_mp_lookup_hit_l2_tokens_total"
        text = self._http("/metrics").decode()
        return {ours: int(counted(text, theirs)) for ours, theirs in names.items()}

    def _http(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self._url + path, body, headers), timeout=30) as answer:
            return bytes(answer.read())

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Daemon:
    """A daemon that leaves nothing in DDR when it stops, and finds everything on NVMe when it starts."""

    def __init__(self, directory: Path, ddr_bytes: int, nvme_bytes: int) -> None:
        self._directory = directory / "holdfast"
        self._directory.mkdir()
        settings = {
            "daemon.rest_port": "0",
            "ddr.capacity_bytes": str(ddr_bytes),
            "nvme.capacity_bytes": str(nvme_bytes),
        }
        self._process = DaemonProcess(self._directory, settings)
        self._process.start().close()

    @property
    def pid(self) -> int:
        return int(json.loads((self._directory / "rest.json").read_text())["pid"])

    def connector(self) -> dict[str, Any]:
        return {
            "kv_connector": "HoldfastConnector",
            "kv_connector_module_path": "holdfast.engine_adapter.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "holdfast.socket": str(self._process.socket),
                "holdfast.data_dir": str(self._directory),
                "holdfast.write_policy": WritePolicy.THROUGH,  # what is to be found after a restart must be on NVMe
            },
        }

    def is_idle(self) -> bool:
        """Nothing is on its way anywhere, and all is on NVMe."""
        with urllib.request.urlopen(left_address(self._directory) + "/metrics", timeout=30) as answer:
            text = answer.read().decode()
        waiting = ("holdfast_orders_in_flight", "holdfast_writes_queued", 'holdfast_documents{durable="false"}')
        return not any(counted(text, name) for name in waiting)

    def restart(self) -> None:
        self._process.stop()
        self._process.start().close()
        tiers = self._rest("/v1/tiers")["tiers"]
        assert all(tier["used_bytes"] == 0 for tier in tiers if tier["tier"] == "ddr"), tiers

    def _rest(self, path: str) -> dict[str, Any]:
        return Rest(left_address(self._directory)).get(path)

    def close(self) -> None:
        self._process.stop()
        let_go(self._directory)


def tail(log: Path) -> str:
    """The last lines of a log that goes with its directory."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def counted(text: str, name: str) -> float:
    """The sum of a metric's samples, in a scrape."""
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def cpu_seconds(roots: Iterable[int]) -> float:
    """CPU time of these processes and all that came from them, those that have ended included."""
    total, left = 0, list(roots)
    while left:
        process = Path("/proc", str(left.pop()))
        fields = (process / "stat").read_text().rpartition(") ")[2].split()
        total += sum(int(ticks) for ticks in fields[11:15])
        left += [int(pid) for task in (process / "task").iterdir() for pid in (task / "children").read_text().split()]
    return total / TICKS


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
