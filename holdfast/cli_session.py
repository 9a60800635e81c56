"""What every command shares: the global options, the daemon they lead to, and how errors end.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 refused by a pin, a lease or a limit, 5 nobody answers.
"""

from __future__ import annotations

import getpass
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

from .kvstore.errors import (
    Conflict,
    DeadlineExceeded,
    HoldfastError,
    InvalidRequest,
    NoCapacity,
    NotFound,
    RunnerBusy,
    Unavailable,
)
from .kvstore.holders import Holder

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .kvstore.config import Config
    from .rest import Rest

FAILED: Final = 1
EXIT_CODES: Final[dict[type[HoldfastError], int]] = {
    InvalidRequest: 2,
    NotFound: 3,
    Conflict: 4,
    NoCapacity: 4,
    DeadlineExceeded: FAILED,
    RunnerBusy: 4,
    Unavailable: 5,
}
ADVICE: Final = {  # what to do, where the message does not say it already
    "daemon-unavailable": "start one with `holdfast serve`, or say where it is with --url or --data-dir",
    "document-not-found": "`holdfast doc ls` lists what there is",
    "unavailable": "try again when `holdfast status` says it is ready",
    "draining": "the daemon is shutting down; start it again and retry",
    "runner-unavailable": "start one with `holdfast runner --model DIR --cp N`, or say where it is with --data-dir",
    "no-capacity": "`holdfast pins` and `holdfast leases` show who holds what; unpin, detach, or wait",
}
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A TOML file.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting.")]
GLOBAL_FLAGS: Final = ("--json", "--no-color")
GLOBAL_VALUES: Final = ("--url", "--data-dir")


Name = Annotated[str, typer.Argument(metavar="[TENANT/]NAME", help='The tenant is "default" unless named.')]
DURATIONS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class TierName(StrEnum):
    """Tiers as they are typed."""

    HBM = "hbm"
    DDR = "ddr"
    NVME = "nvme"


def seconds(text: str) -> float | None:
    """Seconds of "90s", "30m", "1h", "2d" or "90"; None for "never"."""
    if text == "never":
        return None
    matched = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text)
    if matched is None:
        raise InvalidRequest(f'{text!r} is no duration; say 90s, 30m, 1h, 2d or "never"')
    return float(matched[1]) * DURATIONS[matched[2] or "s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What the global options say."""

    url: str | None
    data_dir: Path | None
    as_json: bool
    color: bool

    @property
    def names_daemon(self) -> bool:
        """Whether the user said which daemon to talk to."""
        return bool(self.url or os.environ.get("HOLDFAST_URL"))

    def rest(self) -> Rest:
        """The daemon to talk to: --url, else $HOLDFAST_URL, else what it left in its data directory."""
        from .rest import Rest, left_address

        url = self.url or os.environ.get("HOLDFAST_URL")
        if not url:
            url = left_address(self.place)
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"{url!r} is no address of a daemon; it looks like http://127.0.0.1:8470")
        return Rest(url)

    @property
    def place(self) -> Path:
        """The daemon's data directory: --data-dir, else where the configuration puts it."""
        from .kvstore.config import load_config

        return self.data_dir or load_config(None, os.environ, {}).daemon.data_dir

    def show(self, answer: object, human: Callable[[], Sequence[RenderableType]]) -> None:
        """Print an answer: as JSON, or as what `human` makes of it."""
        if self.as_json:
            import json

            print(json.dumps(answer, indent=2, ensure_ascii=False))
            return
        from .cli_tables import console

        screen = console(color=self.color)
        for part in human():
            screen.print(part)

    def patience(self, what: str) -> AbstractContextManager[object]:
        """Say on a terminal that something is under way."""
        if self.as_json or not sys.stderr.isatty():
            return nullcontext()
        from rich.console import Console

        return Console(stderr=True, no_color=not self.color).status(what)


def session_of(ctx: typer.Context) -> Session:
    """The global options."""
    assert isinstance(ctx.obj, Session)
    return ctx.obj


def user() -> str:
    """Who asks, as far as the system knows."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return f"uid {os.getuid()}"


def split(name: str) -> tuple[str, str]:
    """Tenant and name of "[TENANT/]NAME"."""
    tenant, _, rest = name.rpartition("/")
    if not rest or "/" in tenant or name.startswith("/"):
        raise InvalidRequest(f"{name!r} is no document; say NAME or TENANT/NAME")
    return tenant or "default", rest


def overrides(settings: Sequence[str], data_dir: Path | None) -> dict[str, str]:
    """The settings given as flags."""
    found = {} if data_dir is None else {"daemon.data_dir": str(data_dir)}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise InvalidRequest(f"--set {setting}: say SECTION.KEY=VALUE")
        found[key.strip()] = value.strip()
    return found


def configuration(ctx: typer.Context, path: Path | None, settings: Sequence[str] | None) -> Config:
    """The effective configuration on this machine."""
    from .kvstore.backing import configured
    from .kvstore.machine import Machine

    given = overrides(settings or (), session_of(ctx).data_dir)
    return configured(path, os.environ, given, Machine())


class Holdfast(TyperGroup):
    """Global options may stand anywhere; errors end in one line and an exit code, never in a traceback."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """See TyperGroup."""
        return super().parse_args(ctx, hoisted(args))

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """See TyperGroup."""
        try:
            return super().invoke(ctx)
        except HoldfastError as error:
            fail(error)


def hoisted(args: Sequence[str]) -> list[str]:
    """The arguments with the global options first, wherever they stood; what follows "--" stays."""
    front: list[str] = []
    rest: list[str] = []
    waiting = list(args)
    while waiting:
        word = waiting.pop(0)
        if word == "--":
            return [*front, *rest, word, *waiting]
        if word in GLOBAL_FLAGS or word.startswith(tuple(f"{name}=" for name in GLOBAL_VALUES)):
            front.append(word)
        elif word in GLOBAL_VALUES:
            front += [word, *waiting[:1]]
            del waiting[:1]
        else:
            rest.append(word)
    return front + rest


def exit_code(error: HoldfastError) -> int:
    """The exit code of an error: that of its nearest ancestor in the table."""
    return next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), FAILED)


def said(holder: Holder) -> str:
    """A holder, for a person."""
    from .cli_tables import duration, size

    whose = f"{holder.tenant}/{holder.document}" if holder.document else f"tenant {holder.tenant}"
    left = holder.remaining_seconds
    until = "" if left is None else f", overdue by {duration(-left)}" if left < 0 else f", {duration(left)} left"
    by = f" by {holder.owner}" if holder.owner else ""
    return f"{holder.kind} of {whose}{by}: {size(holder.size_bytes)} of {holder.tier}{until}"


def fail(error: HoldfastError) -> NoReturn:
    """Say what is wrong and what to do."""
    lines = [f"error: {error.message}"]
    if error.code in ADVICE:
        lines.append(f"  {ADVICE[error.code]}")
    lines += [f"  held by the {said(holder)}" for holder in error.holders]
    for line in lines:
        print("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line), file=sys.stderr)
    raise typer.Exit(exit_code(error))
