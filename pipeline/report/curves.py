"""Curves over training: losses, distillation ratios, and the few numbers that say what the injection does.

Curves are thinned to bins of equal width in samples, each point the mean of its bin, so that a run of a million steps
is as light as one of a hundred. A line that lacks a figure (a null: it was not finite) leaves that point out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.report.run_tables import TERMS
from pipeline.report.runs import Group, Run
from pipeline.report.style import DASHES, RUN_LEGEND, Figure, draw, legend, light, series
from pipeline.report.text import compact, shortened, slug

POINTS = 240  # of a thinned curve

Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Panel:
    """A figure and the groups drawn in it."""

    figure: Figure
    groups: list[Group]


@dataclass(frozen=True)
class Section:
    """Panels that stand together in the page; `shown` are the groups in them, for one legend."""

    figures: list[Figure] = field(default_factory=list)
    shown: list[Group] = field(default_factory=list)

    @classmethod
    def of(cls, panels: Iterable[Panel | None]) -> Section:
        there = [panel for panel in panels if panel is not None]
        shown = dict.fromkeys(group for panel in there for group in panel.groups)
        return cls([panel.figure for panel in there], sorted(shown, key=lambda group: group.index))


def training(groups: Sequence[Group], runs: dict[str, Run]) -> Section:
    """Training loss and InfoNCE, and what validation rows say, over samples seen."""
    panels = [
        _curves("train_loss", "Training loss", groups, _read(runs, ["train/loss"])),
        _curves("train_info_nce", "InfoNCE, training", groups, _read(runs, ["train/info_nce"])),
        _curves("val_info_nce", "InfoNCE, validation", groups, _read(runs, ["val/info_nce"])),
        _curves(
            "val_recall", "Mean R@1, validation (%)", groups, _read(runs, ["val/i2t_r1", "val/t2i_r1"], 100), zero=True
        ),
        _curves("val_kendall_tau", "Kendall τ, validation", groups, _read(runs, ["val/kendall_tau"])),
    ]
    return Section.of(panels)


def distilled(groups: Sequence[Group], runs: dict[str, Run]) -> Section:
    """Every distillation term over samples, as a share of what ignoring the image costs; validation as points."""
    keys = {key[6:] for run in runs.values() for line in run.metrics for key in line if key.startswith("train/")}
    panels = []
    for term in sorted(keys, key=lambda term: ([*TERMS, ""].index(_family(term)), term)):
        if not term.startswith(TERMS):
            continue
        lines, points = _read(runs, [f"train/{term}"]), _read(runs, [f"val/{term}"])
        panels.append(_curves(f"ratio_{slug(term)}", term, groups, lines, points=points, zero=True, level=1))
    return Section.of(panels)


def _family(term: str) -> str:
    return next((family for family in TERMS if term.startswith(family)), "")


def trajectories(groups: Sequence[Group], runs: dict[str, Run]) -> Section:
    """γ, the gates' means and β over samples, where they were logged."""
    keys = {key[6:] for run in runs.values() for line in run.metrics for key in line if key.startswith("train/")}
    asked = (
        ("gamma", "γ", ["gamma/image", "gamma/text"]),
        ("gate_mean", "Mean gate", ["gate_mean/image", "gate_mean/text"]),
        ("beta_image", "β, image candidates", sorted(key for key in keys if key.startswith("beta/image/"))),
        ("beta_text", "β, text candidates", sorted(key for key in keys if key.startswith("beta/text/"))),
    )
    panels = []
    for name, title, terms in asked:
        curves = {term: _read(runs, [f"train/{term}"]) for term in terms}
        labels = {
            t: t.rpartition("/")[2] if not t.startswith("beta") else f"order {t.rpartition('/')[2]}" for t in terms
        }
        panels.append(_several(name, title, groups, {labels[term]: curve for term, curve in curves.items()}))
    return Section.of(panels)


def _read(runs: dict[str, Run], keys: list[str], factor: float = 1.0) -> dict[str, Curve]:
    """Run → (samples, mean of `keys` × factor), wherever a line has all of them."""
    found = {}
    for name, run in runs.items():
        x, y = [], []
        for line in run.metrics:
            values = [line.get(key) for key in keys]
            if "samples" in line and all(isinstance(value, int | float) for value in values):
                x.append(float(line["samples"]))
                y.append(factor * float(np.mean([float(value) for value in values if value is not None])))
        if x:
            found[name] = (x, y)
    return found


def thin(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> Curve:
    """At most `points` means over bins of equal width in x; short curves stay as they are."""
    if len(x) <= points:
        return list(x), list(y)
    xs, ys = np.asarray(x), np.asarray(y)
    width = (xs.max() - xs.min()) / points or 1.0
    bins = np.minimum(((xs - xs.min()) / width).astype(int), points - 1)
    count = np.bincount(bins, minlength=points)
    kept = count > 0
    means = [np.bincount(bins, weights=v, minlength=points)[kept] / count[kept] for v in (xs, ys)]
    return means[0].tolist(), means[1].tolist()


def _curves(
    name: str,
    title: str,
    groups: Sequence[Group],
    curves: dict[str, Curve],
    *,
    points: dict[str, Curve] | None = None,
    zero: bool = False,
    level: float | None = None,
) -> Panel | None:
    """One curve a run in its group's colour; `points` as markers over it; `level`: a dashed line."""
    points = points or {}
    present = [group for group in groups if any(run in curves or run in points for run in group.runs)]
    if not present:
        return None

    def paint(axes: Axes) -> None:
        for group in present:
            style = series(group.index)
            for run in group.runs:
                if run in curves:
                    x, y = thin(*curves[run])
                    mark = style["marker"] if len(x) <= 12 else ""
                    axes.plot(
                        x, y, color=style["color"], linestyle=style["linestyle"], linewidth=1.5, marker=mark, ms=4
                    )
                if run in points:
                    axes.plot(*points[run], linestyle="", marker=style["marker"], color=style["color"], ms=5.5)
        if level is not None:
            axes.axhline(level, color=light("ink"), linewidth=1.1, linestyle=DASHES[1])
        _samples_axis(axes)
        if zero:
            axes.set_ylim(bottom=0)
        run_legend(axes, present)

    last = {run: values[-1] for source in (curves, points) for run, (_, values) in source.items()}
    ends = "; ".join(f"{run} ends at {last[run]:.3g}" for group in present for run in group.runs if run in last)
    return Panel(draw(name, title, f"{title} over samples seen. {ends}.", paint), present)


def _several(name: str, title: str, groups: Sequence[Group], named: dict[str, dict[str, Curve]]) -> Panel | None:
    """Several quantities a run: colour tells the run, the dash which quantity."""
    present = [group for group in groups if any(run in curves for curves in named.values() for run in group.runs)]
    if not present:
        return None

    def paint(axes: Axes) -> None:
        for number, curves in enumerate(named.values()):
            for group in present:
                for run in group.runs:
                    if run in curves:
                        colour = series(group.index)["color"]
                        axes.plot(
                            *thin(*curves[run]), color=colour, linestyle=DASHES[number % len(DASHES)], linewidth=1.6
                        )
        _samples_axis(axes)
        axes.margins(y=0.15)
        keys = [
            Line2D([], [], color=light("ink"), linestyle=DASHES[i % len(DASHES)], label=label)
            for i, label in enumerate(named)
        ]
        across = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.985), "ncols": len(keys), "borderaxespad": 0.0}
        legend(axes, gid="quantities", handles=keys, columnspacing=1.4, **across)
        run_legend(axes, present)

    ends = "; ".join(
        f"{run} {label} ends at {curves[run][1][-1]:.3g}"
        for label, curves in named.items()
        for group in present
        for run in group.runs
        if run in curves
    )
    return Panel(draw(name, title, f"{title} over samples seen. {ends}.", paint, above=0.2), present)


def _samples_axis(axes: Axes) -> None:
    axes.set_xlabel("samples seen", color=light("soft"))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: compact(value).replace(".00", "").replace(".0 ", " "))
    )


def run_legend(axes: Axes, groups: Sequence[Group], *, lines_only: bool = True) -> None:
    """Which colour is which run, for the files; the page hides it and has one of its own."""
    handles = []
    for group in groups:
        style: dict[str, Any] = series(group.index)
        if not lines_only:
            style["linestyle"] = ""
        handles.append(Line2D([], [], label=shortened(group.label), markersize=5, **style))
    legend(axes, gid=RUN_LEGEND, handles=handles, loc="best")
