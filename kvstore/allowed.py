"""Allowed: what a value of the configuration may be.

A rule turns what a file or a shell says into a value, or raises ValueError, and writes the value as TOML.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Protocol

from .sizes import TIB, format_size, parse_size


class Rule(Protocol):
    """How the values of one key are read, described and written."""

    @property
    def allowed(self) -> str: ...

    def read(self, raw: object) -> object: ...

    def write(self, value: Any) -> str: ...


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes, in multiples of `step`."""

    least: int
    most: int = 1024 * TIB
    step: int = 1

    @property
    def allowed(self) -> str:
        steps = f" in steps of {format_size(self.step)}" if self.step > 1 else ""
        limits = f"{format_size(self.least)} to {format_size(self.most)}"
        return f'bytes or a string such as "64 MiB" or "20 GB", {limits}{steps}'

    def read(self, raw: object) -> int:
        value = parse_size(raw)
        if not self.least <= value <= self.most or value % self.step:
            raise ValueError("out of range")
        return value

    def write(self, value: int) -> str:
        return f'"{format_size(value)}"'


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer."""

    least: int
    most: int

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def read(self, raw: object) -> int:
        if isinstance(raw, bool) or not isinstance(raw, int | str):
            raise ValueError("not a whole number")  # noqa: TRY004 - one kind of refusal
        value = int(raw)
        if not self.least <= value <= self.most:
            raise ValueError("out of range")
        return value

    def write(self, value: int) -> str:
        return str(value)


@dataclass(frozen=True, slots=True)
class Seconds:
    """A duration in seconds, fractions welcome."""

    least: float
    most: float

    @property
    def allowed(self) -> str:
        return f"seconds from {self.least:g} to {self.most:g}"

    def read(self, raw: object) -> float:
        if isinstance(raw, bool) or not isinstance(raw, int | float | str):
            raise ValueError("not a number")  # noqa: TRY004 - one kind of refusal
        value = float(raw)
        if not self.least <= value <= self.most:  # refuses NaN too
            raise ValueError("out of range")
        return value

    def write(self, value: float) -> str:
        return repr(value)


@dataclass(frozen=True, slots=True)
class Fraction:
    """A part of a whole: more than 0, at most 1."""

    @property
    def allowed(self) -> str:
        return "a fraction, more than 0 and at most 1"

    def read(self, raw: object) -> float:
        if isinstance(raw, bool) or not isinstance(raw, int | float | str):
            raise ValueError("not a number")  # noqa: TRY004 - one kind of refusal
        value = float(raw)
        if not 0 < value <= 1:  # refuses NaN too
            raise ValueError("out of range")
        return value

    def write(self, value: float) -> str:
        return repr(value)


@dataclass(frozen=True, slots=True)
class Text:
    """A string that is not empty; one of `choices` where there are any."""

    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(self.choices)}" if self.choices else "a string, not empty"

    def read(self, raw: object) -> str:
        if not isinstance(raw, str) or not raw or "\0" in raw:
            raise ValueError("not a string")
        if self.choices and raw not in self.choices:
            raise ValueError("not a choice")
        return raw

    def write(self, value: object) -> str:
        # A TOML basic string is a JSON one, except that DEL must be escaped as well.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


@dataclass(frozen=True, slots=True)
class PathText(Text):
    """A path; "~/" is the home directory, a relative path starts at the working directory."""

    @property
    def allowed(self) -> str:
        return "a path, not empty"


AUTO: Final = "auto"


@dataclass(frozen=True, slots=True)
class PathOrAuto(PathText):
    """A path, or "auto": the daemon chooses."""

    @property
    def allowed(self) -> str:
        return f'a path, or "{AUTO}"'
