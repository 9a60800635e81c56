"""`holdfast runner` and `holdfast demo-model`: a model's ranks in the foreground, and a model to try them with."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_session import ConfigFile, Session, Settings, configuration, session_of
from .kvstore.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType


class Device(StrEnum):
    """Where ranks compute."""

    CPU = "cpu"
    CUDA = "cuda"


class Strategy(StrEnum):
    """How ranks exchange KV."""

    AUTO = "auto"
    PASS_KV = "pass_kv"  # noqa: S105 - a name, not a password
    PASS_Q = "pass_q"  # noqa: S105 - a name, not a password
    ALL_GATHER = "all_gather"


class Transport(StrEnum):
    """What ranks exchange it over."""

    AUTO = "auto"
    SHM = "shm"
    GLOO = "gloo"
    NCCL = "nccl"


def runner(
    ctx: typer.Context,
    model: Annotated[Path, typer.Option(metavar="DIR", help="A checkpoint: config.json and safetensors.")],
    cp: Annotated[int, typer.Option(min=1, max=1024, help="Context-parallel ranks: each holds a part of the tokens.")],
    tp: Annotated[int, typer.Option(min=1, max=128, help="Tensor-parallel ranks: each holds a part of heads.")] = 1,
    device: Annotated[Device, typer.Option(help="Where the ranks compute.")] = Device.CPU,
    name: Annotated[str, typer.Option(metavar="GROUP", help="The group's name with the daemon.")] = "main",
    rows: Annotated[int | None, typer.Option(min=1, help="Token rows of KV per rank.")] = None,
    hbm: Annotated[str | None, typer.Option(metavar="SIZE", help="Or bytes of KV per rank: 8GiB.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads per rank; 0 shares the cores evenly.")] = 0,
    kernel: Annotated[str, typer.Option(help="Attention kernel; the best for the device by default.")] = "",
    strategy: Annotated[Strategy, typer.Option(help="How ranks exchange KV; auto decides per call.")] = Strategy.AUTO,
    communicator: Annotated[Transport, typer.Option(help="What ranks exchange it over.")] = Transport.AUTO,
    tenant: Annotated[str, typer.Option(help="Whose documents it serves.")] = "default",
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Start a model's ranks, and answer `ask` and `ingest` until told to stop."""
    from .runner_plan import RunnerOptions
    from .runner_program import Listener, run_runner

    session = session_of(ctx)
    options = RunnerOptions(
        model=model,
        cp=cp,
        tp=tp,
        device=device,
        name=name,
        tenant=tenant,
        rows=rows,
        hbm_bytes=hbm_bytes(rows, hbm),
        threads=threads,
        kernel=kernel,
        communicator=communicator,
        strategy=strategy,
    )
    found = configuration(ctx, config, settings)
    run_runner(options, found, Listener(say, lambda status: show(session, status)))


def hbm_bytes(rows: int | None, hbm: str | None) -> int | None:
    """What --hbm says. Raises InvalidRequest."""
    from .kvstore.sizes import parse_size

    if hbm is None:
        return None
    if rows is not None:
        raise InvalidRequest("--rows and --hbm say the same: give one of them")
    try:
        return parse_size(hbm)
    except ValueError as error:
        raise InvalidRequest(f"--hbm {hbm}: {error}; say 8GiB, 500MB or a number of bytes") from error


def say(text: str) -> None:
    """What happens, for people."""
    print(text, file=sys.stderr, flush=True)


def show(session: Session, status: Any) -> None:
    """What the runner is, as soon as it answers."""
    import msgspec

    facts = status.facts

    def human() -> list[RenderableType]:
        from . import cli_tables

        ranks = (
            f"cp {facts.cp} x tp {facts.tp} on {facts.device}" if facts.tp > 1 else f"cp {facts.cp} on {facts.device}"
        )
        rows: list[tuple[str, object]] = [
            ("group", f"{facts.group}, tenant {facts.tenant}, process {facts.pid}"),
            ("model", facts.model),
            ("shape", facts.shape),
            ("ranks", ranks),
            ("KV", f"{cli_tables.size(facts.kv_bytes_per_token)} per token"),
            (
                "rows",
                f"{facts.rows} per rank ({cli_tables.size(facts.hbm_bytes)}): {facts.capacity_tokens} tokens in all",
            ),
            *status.settings.items(),
        ]
        return [cli_tables.pairs(rows), "ready: holdfast ingest FILE --name DOCUMENT; holdfast ask DOCUMENT QUESTION"]

    session.show(msgspec.to_builtins(status), human)
    sys.stdout.flush()


def demo_model(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
) -> None:
    """Write a small random Llama (byte tokens), to try the runner without a download. It talks nonsense."""
    from .ring_attention.synthetic import write_checkpoint

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidRequest(f"{directory} is there already, and not empty; name a new directory")
    write_checkpoint(directory)
    session_of(ctx).show(
        {"model": str(directory)}, lambda: [f"{directory}: holdfast runner --model {directory} --cp 2"]
    )
