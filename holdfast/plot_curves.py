"""Pictures of simulations: what is saved against capacity, a panel a trace, a line a policy. Alone uses matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from .kvstore.errors import InvalidRequest, MissingExtra

PANEL_INCHES: Final = (6.0, 4.2)
COLUMNS_MAX: Final = 2
DPI: Final = 110


def check_plots(path: Path) -> None:
    """Raises MissingExtra without matplotlib, InvalidRequest when the picture has no place."""
    try:
        import matplotlib as _  # noqa: F401, ICN001
    except ImportError as error:
        raise MissingExtra("--plot needs matplotlib: pip install 'holdfast[plot]'") from error
    if path.suffix != ".png" or not path.parent.is_dir():
        raise InvalidRequest(f"--plot {path}: name a .png file in a directory that exists")


def draw(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """`found` are results of simulation.simulate. Raises InvalidRequest when the file cannot be written."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no window
    from matplotlib.ticker import FuncFormatter, NullLocator

    traces = list(dict.fromkeys(one["trace"] for one in found))
    columns = min(COLUMNS_MAX, len(traces))
    rows = -(-len(traces) // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, trace in zip(panels, traces, strict=False):
        here = [one for one in found if one["trace"] == trace]
        for policy in dict.fromkeys(one["policy"] for one in here):
            points = sorted((percent(one), one["prefill_seconds_saved"]) for one in here if one["policy"] == policy)
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=policy, **style(policy))
        panel.set_xscale("log")
        panel.set_xticks(sorted({percent(one) for one in here}))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}%"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_ylim(bottom=0)
        panel.set_title(f"{Path(trace).name}, {here[0]['block_tokens']:,}-token blocks", fontsize=10)
        panel.set_xlabel("capacity, per cent of the trace's different blocks")
        panel.set_ylabel("share of prefill-seconds saved")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for panel in panels[len(traces) :]:
        panel.set_axis_off()
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror or error}") from error


def percent(one: dict[str, Any]) -> float:
    """A capacity as it is drawn, whatever it was given in."""
    return round(100 * float(one["capacity_blocks"]) / float(one["unique_blocks"]), 2)


def style(policy: str) -> dict[str, Any]:
    """What is not to be reached stands apart."""
    return {"color": "black", "linestyle": "--"} if policy == "belady" else {}
