"""One simulated epoch as a picture: a row per worker, grouped by role, coloured by what it does; grey is idle."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nft_ray.planning.forecast import Forecast
from nft_ray.planning.spans import Span

COLOURS = {
    "encode": "#c58af9",
    "draw": "#1a73e8",
    "decode": "#8ab4f8",
    "velocities": "#174ea6",
    "evaluate": "#9aa0a6",
    "score": "#f9ab00",
    "update": "#188038",
    "step": "#0d652d",
    "publish": "#d93025",
    "load": "#f28b82",
    "park": "#80868b",
    "wake": "#bdc1c6",
}
"""What a worker does -> its colour; in this order in the legend."""
INK, SOFT, IDLE = "#202124", "#5f6368", "#f1f3f4"
WIDTH_IN, DPI = 12.0, 130
ROW_IN, LEAST_IN, MOST_IN = 0.17, 0.42, 2.6
"""Inches of one worker's row, of a role at least and at most."""
MARGIN = 0.02
"""Of the epoch, before and after it."""
LABEL_SHARE = 0.045
"""Of the epoch: a phase that is shorter has its seconds in the line above, not in its box."""


def draw(forecast: Forecast, title: str, path: Path | str) -> None:
    """Write a PNG of the epoch that stands for all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second that only a picture needs
    from matplotlib.figure import Figure

    seats, spans = forecast.seats, _shown(forecast)
    counts = {"sampler": len(seats.samplers), "learner": len(seats.learners)}
    counts |= {f"reward {name}": len(places) for name, places in seats.rewards.items()}
    order = ["sampler", *(role for role in counts if role.startswith("reward ")), "learner"]
    heights = [min(MOST_IN, max(LEAST_IN, ROW_IN * counts[role])) for role in order]
    note = textwrap.wrap(forecast.bound.text, 170)
    top = 0.72 + 0.2 * len(note)
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.1 * len(heights) + top + 1.15), dpi=DPI)
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    grid = figure.add_gridspec(
        len(order) + 1,
        1,
        height_ratios=[0.3, *heights],
        hspace=0.14,
        left=0.15,
        right=0.93,
        top=1 - top / height,
        bottom=0.95 / height,
    )
    length = forecast.end - forecast.start
    limits = (-MARGIN * length, (1 + MARGIN) * length)
    _phases(figure.add_subplot(grid[0]), forecast.phases, limits)
    for number, role in enumerate(order):
        axes = figure.add_subplot(grid[number + 1])
        name = role.removeprefix("reward ")
        _rows(axes, [span for span in spans if span.role == name], counts[role], forecast.start, limits, length)
        axes.set_ylabel(
            f"{role}\n{_counted(role, counts[role])}", rotation=0, ha="right", va="center", color=INK, fontsize=9
        )
        busy = forecast.busy[name]
        axes.text(1.012, 0.5, f"{busy:.0%}", transform=axes.transAxes, va="center", fontsize=10, color=INK)
        last = number == len(order) - 1
        axes.tick_params(axis="x", length=3 if last else 0, labelbottom=last, labelsize=8, colors=SOFT)
        if last:
            axes.set_xlabel("seconds", fontsize=9, color=SOFT)
    figure.text(0.015, 1 - 0.32 / height, title, fontsize=13, fontweight="bold", color=INK, va="center")
    figure.text(0.015, 1 - 0.52 / height, "\n".join(note), fontsize=9, color=SOFT, va="top", linespacing=1.4)
    figure.text(0.985, 1 - (top + 0.16) / height, "at work", fontsize=8, color=SOFT, ha="right", va="center")
    _legend(figure, spans, height)
    figure.savefig(path, facecolor="white")


def _shown(forecast: Forecast) -> list[Span]:
    """What falls into the epoch, whichever epoch it belongs to."""
    return [span for span in forecast.run.spans if span.end > forecast.start and span.start < forecast.end]


def _rows(
    axes: Any, spans: Sequence[Span], count: int, start: float, limits: tuple[float, float], length: float
) -> None:
    axes.set_xlim(*limits)
    axes.set_ylim(count, 0)
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    gap = 0.12 if count <= 16 else 0.0
    axes.broken_barh([(0, length)], (0, count), facecolors=IDLE)
    for (worker, what), found in _grouped(spans).items():
        bars = [
            (max(span.start - start, 0), min(span.end - start, length) - max(span.start - start, 0)) for span in found
        ]
        axes.broken_barh(bars, (worker + gap / 2, 1 - gap), facecolors=COLOURS[what], linewidth=0)
    if count <= 48:
        for row in range(1, count):
            axes.axhline(row, color="white", linewidth=0.6)


def _grouped(spans: Sequence[Span]) -> dict[tuple[int, str], list[Span]]:
    found: dict[tuple[int, str], list[Span]] = {}
    for span in spans:
        found.setdefault((span.worker, span.what), []).append(span)
    return found


def _phases(axes: Any, phases: Mapping[str, float], limits: tuple[float, float]) -> None:
    """What the trainer waits for, as a ruler over the rows."""
    axes.set_xlim(*limits)
    axes.set_ylim(0, 1)
    axes.axis("off")
    at, total = 0.0, sum(phases.values())
    for name, seconds in phases.items():
        if seconds <= 0:
            continue
        axes.plot([at, at + seconds], [0.12, 0.12], color=SOFT, linewidth=1.2, solid_capstyle="butt")
        for edge in (at, at + seconds):
            axes.plot([edge, edge], [0.02, 0.22], color=SOFT, linewidth=1.0)
        if seconds > LABEL_SHARE * total:
            text = f"{name} {seconds:.1f} s" if seconds > 0.1 * total else f"{seconds:.1f} s"
            axes.text(at + seconds / 2, 0.32, text, ha="center", va="bottom", fontsize=8.5, color=INK)
        at += seconds


def _legend(figure: Any, spans: Sequence[Span], height: float) -> None:
    from matplotlib.patches import Patch

    used = {span.what for span in spans}
    handles = [Patch(color=colour, label=what) for what, colour in COLOURS.items() if what in used]
    handles.append(Patch(color=IDLE, label="idle"))
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        bbox_to_anchor=(0.54, 0.06 / height),
        handlelength=1.1,
        columnspacing=1.3,
    )


def _counted(role: str, count: int) -> str:
    noun = "replica" if role.startswith("reward ") else "worker"
    return f"{count} {noun}{'s' * (count != 1)}"
