"""Rest: the command line's way to a running daemon; one request at a time, each with a deadline.

Problems come back as the typed errors they were before they travelled.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec

from .kvstore.errors import DaemonUnavailable, HoldfastError, from_code
from .kvstore.holders import Holder

ADDRESS_FILE: Final = "rest.json"
TIMEOUT_SECONDS: Final = 10.0

Json = dict[str, Any]


def left_address(data_dir: Path) -> str:
    """The URL that a daemon left in its data directory. Raises DaemonUnavailable."""
    path = data_dir / ADDRESS_FILE
    try:
        url = json.loads(path.read_text(encoding="utf-8"))["url"]
    except OSError as error:
        raise DaemonUnavailable(f"no daemon has left its address in {path} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DaemonUnavailable(f"{path} does not say where a daemon listens") from error
    if not isinstance(url, str):
        raise DaemonUnavailable(f"{path} does not say where a daemon listens")
    return url


def document_path(tenant: str, name: str) -> str:
    """The part of a path that names a document."""
    return f"{quote(tenant, safe='')}/{quote(name, safe='')}"


class Rest:
    """Requests to one daemon, at `http://host:port`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Json:
        """The answer to a question. Raises DaemonUnavailable, or the daemon's error."""
        return self._ask("GET", path, query=query)

    def post(self, path: str, body: Json, timeout_seconds: float = TIMEOUT_SECONDS) -> Json:
        """The answer to a command. Raises DaemonUnavailable, or the daemon's error."""
        return self._ask("POST", path, body=body, timeout_seconds=timeout_seconds)

    def patch(self, path: str, body: Json) -> Json:
        """What something is after a change. Raises DaemonUnavailable, or the daemon's error."""
        return self._ask("PATCH", path, body=body)

    def put(self, path: str, body: Json) -> Json:
        """What something is after it was set. Raises DaemonUnavailable, or the daemon's error."""
        return self._ask("PUT", path, body=body)

    def delete(
        self, path: str, query: Mapping[str, str] | None = None, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> Json:
        """The answer to a deletion, empty where there is nothing to say."""
        return self._ask("DELETE", path, query=query, timeout_seconds=timeout_seconds)

    def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> Json:
        try:
            return asyncio.run(self._exchange(method, path, query, body, timeout_seconds))
        except TimeoutError as error:
            raise DaemonUnavailable(f"{self.url} did not answer within {timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DaemonUnavailable(f"no daemon answers at {self.url} ({reason})") from error

    async def _exchange(
        self, method: str, path: str, query: Mapping[str, str] | None, body: Json | None, timeout_seconds: float
    ) -> Json:
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, self.url + path, params=query, json=body, allow_redirects=False) as response,
        ):
            answer = _parsed(await response.read())
            if response.status < 400:
                return answer
            raise _problem(answer, response.status, self.url)


def _parsed(raw: bytes) -> Json:
    """A JSON object; what is none is a ValueError, for then this is no daemon of ours."""
    answer = json.loads(raw) if raw else {}
    if not isinstance(answer, dict):
        raise ValueError("the answer is not an object")  # noqa: TRY004 - one kind of refusal
    return answer


def _problem(answer: Json, status: int, url: str) -> HoldfastError:
    if "code" not in answer:
        raise ValueError(f"HTTP {status} without a problem from {url}")
    try:
        holders = msgspec.convert(answer.get("holders", ()), tuple[Holder, ...])
    except msgspec.ValidationError as error:
        raise ValueError(f"a problem from {url} whose holders are none: {error}") from error
    return from_code(str(answer["code"]), str(answer.get("detail", "")), holders)
