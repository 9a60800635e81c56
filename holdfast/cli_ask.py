"""`holdfast ask` and `holdfast ingest`: what a runner is asked, shown as it answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from .cli_session import Session, seconds, session_of, split
from .kvstore.errors import EmptyDocument, HoldfastError, InvalidRequest, NotFound

if TYPE_CHECKING:
    from .engine_adapter.runner_client import RunnerClient
    from .engine_adapter.runner_wire import Answered, Ingested, Prefilling

STDIN: Final = "-"
NEW_TOKENS_MAX: Final = 1 << 20  # runner_wire's, which takes longer to load
TIERS: Final = {"ddr": "DDR", "nvme": "NVMe"}
LINE_SECONDS: Final = 2.0  # between two lines of progress where no terminal shows a bar
DocumentName = Annotated[str, typer.Argument(metavar="[TENANT/]DOCUMENT", help='The tenant is "default" unless named.')]
Group = Annotated[str | None, typer.Option("--group", metavar="GROUP", help="Which runner, where several run.")]


class PolicyName(StrEnum):
    """Write policies as they are typed; see kvstore.document, which takes longer to load."""

    AUTO = "auto"
    THROUGH = "write-through"
    BACK = "write-back"
    MEMORY = "memory-only"


def ask(
    ctx: typer.Context,
    document: DocumentName,
    question: Annotated[str, typer.Argument(help="What to ask; it is put behind the document as it is.")],
    new_tokens: Annotated[
        int, typer.Option(min=1, max=NEW_TOKENS_MAX, help="How long the answer is, in tokens.")
    ] = 128,
    extend: Annotated[bool, typer.Option("--extend", help="Keep question and answer as part of the document.")] = False,
    group: Group = None,
    text: Annotated[
        str | None, typer.Option("--document", metavar="FILE", help="Its text, for when the cache cannot serve.")
    ] = None,
) -> None:
    """Ask a stored document a question; the answer comes as it is made."""
    from .engine_adapter.runner_wire import Answered, AskRequest, Piece, Recomputing, Waiting

    session = session_of(ctx)
    tenant, name = split(document)
    content = read_text(text) if text is not None else None
    request = AskRequest(document=name, question=question, new_tokens=new_tokens, extend=extend, content=content)
    written, ahead = "", 0
    with connected(session, tenant, group) as runner:
        for event in runner.ask(request):
            match event:
                case Waiting() if event.ahead != ahead:
                    ahead = event.ahead
                    note(f"{ahead} before this")
                case Recomputing():
                    note(f"computing {event.total_tokens} tokens again: {event.reason}")
                case Piece() if not session.as_json:
                    written += event.text
                    write(event.text)
                case Answered():
                    finish(session, event, written)
                    if extend and event.document_tokens is None:
                        raise HoldfastError(f"{document} did not grow ({event.turn_reason}); the answer stands above")


def finish(session: Session, answer: Answered, written: str) -> None:
    """The rest of the answer, and its receipt."""
    import msgspec

    if session.as_json:
        session.show(msgspec.to_builtins(answer), lambda: ())
        return
    write(answer.text.removeprefix(written) + "\n")
    note(receipt(answer))


def receipt(answer: Answered) -> str:
    """An answer's receipt, in one line."""
    from .cli_tables import nanoseconds

    parts = []
    if answer.swap is None:
        parts.append(f"recomputed without the cache ({answer.reason})")
    else:
        tier = answer.swap.source_tier
        came = "already in HBM" if tier == "hbm" else f"from {TIERS[tier]}"
        parts.append(f"{came}, reattached in {nanoseconds(answer.swap.reattach_ns)}")
    parts.append(f"first token after {nanoseconds(answer.first_token_ns)}")
    decoded = len(answer.tokens) - 1  # the first token comes of the prefill
    if decoded and answer.decode_ns:
        parts.append(f"then {decoded / answer.decode_ns * 1e9:.3g} tokens/s")
    if answer.strategy:
        parts.append(answer.strategy)
    if answer.document_tokens is not None:
        parts.append(f"the document has {answer.document_tokens} tokens now")
    return ", ".join(parts)


def ingest(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A text in UTF-8; - for stdin.")],
    name: Annotated[str, typer.Option(metavar="[TENANT/]DOCUMENT", help="What to call it.")],
    group: Group = None,
    write_policy: Annotated[PolicyName, typer.Option(help="When its KV goes to NVMe.")] = PolicyName.AUTO,
    ttl: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Delete it so long after: 90s, 30m, 1h, 2d.")
    ] = None,
) -> None:
    """Prefill a text and store its KV under a name."""
    from .engine_adapter.runner_wire import Ingested, IngestRequest, Prefilling, Waiting
    from .kvstore.document import WritePolicy

    session = session_of(ctx)
    tenant, document = split(name)
    request = IngestRequest(
        name=document,
        content=read_text(file),
        write_policy=WritePolicy(write_policy),
        ttl_seconds=seconds(ttl) if ttl is not None else None,
    )
    ahead = 0
    with connected(session, tenant, group) as runner, progress(session) as show:
        for event in runner.ingest(request):
            match event:
                case Waiting() if event.ahead != ahead:
                    ahead = event.ahead
                    note(f"{ahead} before this")
                case Prefilling():
                    show(event)
                case Ingested():
                    ingested = event
    stored(session, ingested)


def stored(session: Session, ingested: Ingested) -> None:
    """What an ingest came to."""
    import msgspec

    from .cli_tables import nanoseconds, size

    view = ingested.document
    computed = view.token_count - ingested.cached_tokens
    said = f"{view.tenant}/{view.name}: {view.token_count} tokens, {size(view.size_bytes)} of KV; "
    if not computed:
        said += f"all of it was in the cache ({nanoseconds(ingested.elapsed_ns)})"
    else:
        said += f"{ingested.cached_tokens} were in the cache, {computed} computed in {nanoseconds(ingested.elapsed_ns)}"
        said += f" ({computed / ingested.elapsed_ns * 1e9:.4g} tokens/s)"
    session.show(msgspec.to_builtins(ingested), lambda: [said])


@contextmanager
def connected(session: Session, tenant: str, group: str | None) -> Iterator[RunnerClient]:
    """The runner to ask: the group that is named, else the only one that serves the tenant."""
    from .engine_adapter.runner_client import RunnerClient, runner_for

    with RunnerClient(runner_for(session.place, tenant, group)) as runner:
        yield runner


@contextmanager
def progress(session: Session) -> Iterator[Callable[[Prefilling], None]]:
    """Shows how far an ingest is: a bar with tokens/s and the time left on a terminal, else lines."""
    if session.as_json or not sys.stderr.isatty():
        with_lines = Lines()
        yield with_lines.show
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("prefill"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"),
               TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True, no_color=not session.color)) as bar:
        task = bar.add_task("prefill", total=None, speed="")

        def show(event: Prefilling) -> None:
            if bar.tasks[0].total is None:  # what was in the cache took no time: it is no part of the speed
                bar.update(task, total=event.total_tokens)
            speed = bar.tasks[0].speed
            bar.update(task, completed=event.done_tokens, speed=f"{speed:.0f} tokens/s" if speed else "")

        yield show


class Lines:
    """Progress as lines, not too many of them."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def show(self, event: Prefilling) -> None:
        """Say it, unless something was said just now."""
        now = time.monotonic()
        if now - self._last < LINE_SECONDS or now == self._began:
            return
        self._last = now
        speed = (event.done_tokens - event.cached_tokens) / (now - self._began)
        left = f", {(event.total_tokens - event.done_tokens) / speed:.0f} s left" if speed else ""
        note(f"{event.done_tokens} of {event.total_tokens} tokens, {speed:.0f} tokens/s{left}")


def read_text(file: str) -> str:
    """A text, from stdin for "-". Raises NotFound, EmptyDocument, or InvalidRequest for what is no text."""
    path = Path(file)
    try:
        data = sys.stdin.buffer.read() if file == STDIN else path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"there is no file {file}") from None
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read ({error.strerror})") from error
    what = "stdin" if file == STDIN else file
    if not data:
        raise EmptyDocument(f"{what} is empty")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{what} is no text in UTF-8 (byte {error.start} is not); convert it first") from error
    if "\0" in text:
        raise InvalidRequest(f"{what} is no text: it has zero bytes")
    return text


def write(text: str) -> None:
    """More of an answer. A model's words must not command a terminal."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Beside the answer, for people."""
    print(text, file=sys.stderr, flush=True)
